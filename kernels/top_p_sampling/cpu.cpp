// A token of the nucleus of softmax(x / temperature).  Nothing is sorted: one pass finds the largest
// logit, one the weights e^((x - max) / temperature), one the masses above PIVOTS logits; of what
// lies between two of them a copy is made, and so on until it fits a sort of at most FEW.
#include <cfloat>
#include <memory>
#include <vector>
#include "softmax.h"

constexpr int64_t CHUNK = 2048;  // tokens whose weights are added up in fp32; further in double
constexpr int64_t FEW = 64;
constexpr int PIVOTS = 8;

// f(i, x, e) for vectors of x and e from begin on; past the end stand -infinity and 0.
template <class T, class F>
INLINED inline void each_vector(const T* x, const float* e, int64_t begin, int64_t end, F f) {
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) f(i, load(x + i), load(e + i));
    if (i < end) {
        float some_x[LANES], some_e[LANES] = {};
        for (int u = 0; u < LANES; ++u) some_x[u] = i + u < end ? to_float(x[i + u]) : -INFINITY;
        std::memcpy(some_e, e + i, (end - i) * sizeof(float));
        f(i, load(some_x), load(some_e));
    }
}

// The tokens of a row with these logits or more, of equal ones `ties`, are its nucleus.
struct Cut {
    float logit;
    int64_t ties;
};

// Tokens among which the cut lies, in the vocabulary's order; `above` is the mass of those before.
struct Candidates {
    float *x, *e;
    int64_t n = 0;
    double above = 0;

    // Keeps those of x[0..n) with low <= x <= high.
    template <class T>
    void keep(const T* from_x, const float* from_e, int64_t count, float low, float high) {
        n = 0;
        each_vector(from_x, from_e, 0, count, [&](int64_t, f32v vx, f32v ve) INLINED {
#if defined(__AVX512F__)
            const __mmask16 in = _mm512_cmp_ps_mask((__m512)vx, _mm512_set1_ps(low), _CMP_GE_OQ) &
                                 _mm512_cmp_ps_mask((__m512)vx, _mm512_set1_ps(high), _CMP_LE_OQ);
            if (!in) return;
            store(x + n, (f32v)_mm512_maskz_compress_ps(in, (__m512)vx));
            store(e + n, (f32v)_mm512_maskz_compress_ps(in, (__m512)ve));
            n += __builtin_popcount(in);
#elif defined(__AVX2__)
            const i32v between = (i32v)(vx >= splat(low)) & (i32v)(vx <= splat(high));
            int in = _mm256_movemask_ps((__m256)between);
            if (!in) return;  // most vectors: no lane is taken out of any
            float lane_x[LANES], lane_e[LANES];
            store(lane_x, vx);
            store(lane_e, ve);
            for (; in; in &= in - 1, ++n) {
                x[n] = lane_x[__builtin_ctz(in)];
                e[n] = lane_e[__builtin_ctz(in)];
            }
#else
            for (int u = 0; u < LANES; ++u) {
                x[n] = vx[u];
                e[n] = ve[u];
                n += vx[u] >= low && vx[u] <= high;
            }
#endif
        });
    }
};

// Masses above each pivot: of x > pivot.
template <class T>
static void masses_above(const T* x, const float* e, int64_t n, const float* pivot, double* mass) {
    std::fill(mass, mass + PIVOTS, 0.);
    for (int64_t c = 0; c < n; c += CHUNK) {
        f32v part[PIVOTS] = {};
        each_vector(x, e, c, std::min(c + CHUNK, n), [&](int64_t, f32v vx, f32v ve) INLINED {
            unrolled<PIVOTS>([&](auto p) INLINED {
#if defined(__AVX512F__)
                const __mmask16 in = _mm512_cmp_ps_mask((__m512)vx, _mm512_set1_ps(pivot[p]), _CMP_GT_OQ);
                part[p] = (f32v)_mm512_mask_add_ps((__m512)part[p], in, (__m512)part[p], (__m512)ve);
#else
                part[p] += (f32v)((i32v)(vx > splat(pivot[p])) & (i32v)ve);
#endif
            });
        });
        for (int p = 0; p < PIVOTS; ++p) mass[p] += lanes_sum(part[p]);
    }
}

// Narrows low < cut <= high (first: low <= cut) to one of the spaces between pivots: the masses
// above its ends stand on both sides of target.  Returns what is above the new high.
template <class T>
static double narrow(const T* x, const float* e, int64_t n, double above, double target, float* low,
                     float* high) {
    float pivot[PIVOTS];
    double mass[PIVOTS];
    // the first pivot is low itself: what stands there is told from the rest, so each turn shrinks
    for (int p = 0; p < PIVOTS; ++p)
        pivot[p] = float(*low + (double(*high) - *low) * p / PIVOTS);
    masses_above(x, e, n, pivot, mass);
    int p = PIVOTS;  // pivot[p - 1] < cut <= pivot[p]
    while (p > 0 && above + mass[p - 1] < target) --p;
    if (p < PIVOTS) {
        *high = pivot[p];
        above += mass[p];
    }
    *low = p ? std::nextafterf(pivot[p - 1], INFINITY) : *low;
    return above;
}

template <class T>
static Cut cut_at(const T* x, const float* e, int64_t n, double target, float low, float high,
                  Candidates& some) {
    some.above = narrow(x, e, n, 0, target, &low, &high);
    some.keep(x, e, n, low, high);
    while (some.n > FEW && low < high) {
        some.above = narrow(some.x, some.e, some.n, some.above, target, &low, &high);
        some.keep(some.x, some.e, some.n, low, high);
    }
    std::vector<int64_t> order(some.n);
    for (int64_t i = 0; i < some.n; ++i) order[i] = i;
    if (low < high)
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return some.x[a] > some.x[b]; });
    Cut cut = {high, 0};
    double mass = some.above;
    for (int64_t i : order) {
        cut.ties = some.x[i] == cut.logit ? cut.ties + 1 : 1;
        cut.logit = some.x[i];
        mass += some.e[i];
        if (mass >= target) break;
    }
    return cut;
}

class Row {
    const int64_t vocab;
    const float inverse;  // 1 / temperature
    const double top_p;
    float top;  // the largest logit
    std::unique_ptr<float[]> kept;
    float* const e;              // weights
    std::vector<double> mass;    // of each chunk
    std::vector<int64_t> equal;  // its tokens with the logit of the cut
    Candidates some;

public:
    Row(int64_t vocab, float inverse, double top_p)
        : vocab(vocab), inverse(inverse), top_p(top_p), kept(new float[3 * (vocab + LANES)]),
          e(kept.get()), mass((vocab + CHUNK - 1) / CHUNK), equal(mass.size()) {
        some.x = e + vocab + LANES;
        some.e = some.x + vocab + LANES;
    }

    template <class T> int64_t draw(const T* x, float uniform) {
        if (!find_top(x) || uniform != uniform) return -1;
        double total = weigh(x);
        Cut cut = {-INFINITY, vocab};
        if (top_p < 1) {
            const double target = std::max(total * top_p, double(FLT_MIN));
            // all that stands below, however much, weighs less than what top_p leaves out
            const double floor = top + std::log((1 - top_p) * total / double(vocab)) / inverse;
            const double margin = 1e-5 * (std::fabs(floor) + std::fabs(top));
            const float low = float(std::max(floor - margin, -double(FLT_MAX)));
            cut = cut_at(x, e, vocab, target, std::min(low, top), top, some);
            total = cut_masses(x, cut);
        }
        return find(x, cut, double(uniform) * total);
    }

private:
    // body(chunk, begin, end) for every chunk of the vocabulary.
    template <class F> void each_chunk(F body) {
        for (int64_t c = 0; c * CHUNK < vocab; ++c)
            body(c, c * CHUNK, std::min((c + 1) * CHUNK, vocab));
    }

    // Whether the row has a distribution: a finite largest logit, and no NaN.
    template <class T> bool find_top(const T* x) {
        each_chunk([&](int64_t c, int64_t begin, int64_t end) {
            f32v most = splat(-INFINITY);
            i32v good = i32v{} - 1;
            int64_t i = begin;
            for (; i + LANES <= end; i += LANES) {
                const f32v v = load(x + i);
                good &= (i32v)(v < splat(INFINITY));
                most = larger(v, most);
            }
            bool all = true;
            for (int u = 0; u < LANES; ++u) all = all && good[u];
            float found = largest(most);
            for (; i < end; ++i) {
                const float v = to_float(x[i]);
                all = all && v < INFINITY;
                found = v > found ? v : found;
            }
            mass[c] = all ? found : INFINITY;
        });
        top = float(*std::max_element(mass.begin(), mass.end()));
        return std::isfinite(top);
    }

    // e = exp((x - top) / temperature); returns their sum.
    template <class T> double weigh(const T* x) {
        each_chunk([&](int64_t c, int64_t begin, int64_t end) {
            f32v sum = {};
            int64_t i = begin;
            for (; i + LANES <= end; i += LANES) {
                const f32v p = decay((load(x + i) - top) * inverse);
                store(e + i, p);
                sum += p;
            }
            if (i < end) {  // as a vector too: equal logits weigh the same
                float rest[LANES];
                for (int u = 0; u < LANES; ++u) rest[u] = i + u < end ? to_float(x[i + u]) : -INFINITY;
                const f32v p = decay((load(rest) - top) * inverse);
                store(e + i, p);
                sum += p;
            }
            mass[c] = lanes_sum(sum);
        });
        double total = 0;
        for (const double m : mass) total += m;
        return total;
    }

    // The same of the nucleus alone.
    template <class T> double cut_masses(const T* x, Cut cut) {
        each_chunk([&](int64_t c, int64_t begin, int64_t end) {
            f32v sum = {};
            i32v count = {};
            each_vector(x, e, begin, end, [&](int64_t, f32v vx, f32v ve) INLINED {
                sum += (f32v)((i32v)(vx > splat(cut.logit)) & (i32v)ve);
                count -= (i32v)(vx == splat(cut.logit));
            });
            mass[c] = lanes_sum(sum);
            equal[c] = 0;
            for (int u = 0; u < LANES; ++u) equal[c] += count[u];
        });
        const float each = decay((cut.logit - top) * inverse);
        double total = 0;
        for (size_t c = 0; c < mass.size(); ++c) {
            const int64_t taken = std::min(cut.ties, equal[c]);
            cut.ties -= taken;
            total += mass[c] += double(taken) * each;
        }
        return total;
    }

    // The first token of the nucleus at which its running mass exceeds `goal`, or its last.
    template <class T> int64_t find(const T* x, Cut cut, double goal) const {
        double before = 0, running = 0;
        size_t chunk = 0;
        for (size_t c = 0; c < mass.size(); ++c) {
            if (mass[c] > 0) {
                chunk = c;
                before = running;
                running += mass[c];
                if (running > goal) break;
            }
        }
        if (top_p < 1)
            for (size_t c = 0; c < chunk; ++c) cut.ties -= std::min(cut.ties, equal[c]);
        int64_t last = -1;
        const int64_t end = std::min(int64_t(chunk + 1) * CHUNK, vocab);
        for (int64_t i = int64_t(chunk) * CHUNK; i < end; ++i) {
            const float v = to_float(x[i]);
            if (e[i] == 0 || v < cut.logit || (v == cut.logit && cut.ties-- <= 0)) continue;
            last = i;
            if ((before += e[i]) > goal) break;
        }
        return last;
    }
};

// Rows are shared by the threads.  One row is not: a dozen short readings wait longer for a second
// thread than it saves (128256 tokens: 106 us alone, 199 us by two).
template <class T>
static void top_p_sampling(const T* x, int64_t step, const float* uniform, int64_t* token,
                           int64_t rows, int64_t vocab, float inverse, double top_p, int threads) {
    if (rows == 1 || threads <= 1 || rows * vocab < SERIAL_ELEMENTS) {
        Row row(vocab, inverse, top_p);
        for (int64_t r = 0; r < rows; ++r) token[r] = row.draw(x + r * step, uniform[r]);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Row row(vocab, inverse, top_p);
#pragma omp for schedule(dynamic)
        for (int64_t r = 0; r < rows; ++r) token[r] = row.draw(x + r * step, uniform[r]);
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" void top_p_sampling_##name(const T* x, int64_t step, const float* uniform,        \
                                          int64_t* token, int64_t rows, int64_t vocab,           \
                                          float inverse, double top_p, int threads) {            \
        top_p_sampling(x, step, uniform, token, rows, vocab, inverse, top_p, threads);           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
