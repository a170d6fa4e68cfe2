// One step of a Llama-type decoder: embedding, layers, last norm, lm_head, argmax, for B rows of T
// tokens, in one parallel region: threads meet at barriers of their own and never go back to sleep.
// Activations are fp32 whatever the weights; each output is summed in an order that depends neither
// on the batch nor on the number of threads, so a verify step has the bits of single steps.
#include <atomic>
#include <memory>
#include <sched.h>
#include "int4.h"

enum Kind : int32_t { FP32, BF16, INT8, INT8_DYNAMIC, INT4 };

struct Linear {  // w (n, k) row-major; scale (n,) fp32 for int8; sums (n,) of w for INT8_DYNAMIC
    const void* w;         // INT4: w and scale as in int4.h
    const float *scale, *bias;
    const int32_t* sums;
    int64_t n, k;
    int64_t kind, group;
    int64_t unit() const { return kind == INT4 ? SIDE : TILE_ROWS; }  // outputs that stay together
};
struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two: null without
    Linear q, k, v, o, gate, up, down;
    void *keys, *values;  // (B, kv_heads, slots, head_dim)
};
struct Model {
    int64_t layers, hidden, inner, heads, kv_heads, head_dim, vocab, window, cache_bf16, slots;
    double eps;
    const float *final_norm, *cos, *sin;  // tables (positions, head_dim), sine signed
    Linear embed, head;
    Layer* layer;
};

static inline void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

class Team {  // the barrier of a step's threads: spins, and yields when others need the core
    std::atomic<int> waiting{0}, phase{0};

public:
    const int size;
    explicit Team(int n) : size(n) {}
    void meet() {
        if (size == 1) return;
        const int mine = phase.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            waiting.store(0, std::memory_order_relaxed);
            phase.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == mine; ++spins)
            spins < 4000 ? pause() : (void)sched_yield();
    }
};

// Activations (M, K) as the linears want them: fp32 rows, and quantized when one of them asks.
struct Rows {
    const float* wide;
    const uint8_t* narrow;  // x / scale + 128, rounded
    const float* scale;     // (M,)
    int64_t M, K;
};

// out[m * stride + n] = (or +=) x row m . w row n * scale + bias, for n0 <= n < n1
template <bool ADD>
static void linear(const Linear& l, const Rows& x, int64_t n0, int64_t n1, float* out,
                   int64_t stride, float* scratch) {
    const auto put = [&](int64_t n, int64_t m, float v) {
        if (l.bias) v += l.bias[n];
        float& to = out[m * stride + n];
        to = ADD ? to + v : v;
    };
    switch (l.kind) {
    case FP32:
        return matmul_rows<Fma>(x.wide, x.K, x.M, (const float*)l.w, l.k, n0, n1, l.k, scratch, put);
    case BF16:
        return matmul_rows<Fma>(x.wide, x.K, x.M, (const bf16*)l.w, l.k, n0, n1, l.k, scratch, put);
    case INT8:
        return matmul_rows<Fma>(x.wide, x.K, x.M, (const int8_t*)l.w, l.k, n0, n1, l.k, scratch,
                                [&](int64_t n, int64_t m, float v) { put(n, m, v * l.scale[n]); });
    case INT4:
        return int4_rows<Int4Fp32>(x.wide, x.K, x.M,
                                   {(const uint32_t*)l.w, (const bf16*)l.scale, l.k, l.group}, n0,
                                   n1, put);
    case INT8_DYNAMIC:
#if defined(__AVX512VNNI__)
        return matmul_rows<DotInt8>(
            x.narrow, x.K, x.M, (const int8_t*)l.w, l.k, n0, n1, l.k, (uint8_t*)nullptr,
            [&](int64_t n, int64_t m, int32_t v) {
                put(n, m, float(v - 128 * l.sums[n]) * (x.scale[m] * l.scale[n]));
            });
#else  // the quantized activations stand in `wide`
        return matmul_rows<Fma>(
            x.wide, x.K, x.M, (const int8_t*)l.w, l.k, n0, n1, l.k, scratch,
            [&](int64_t n, int64_t m, float v) { put(n, m, v * (x.scale[m] * l.scale[n])); });
#endif
    }
}

static void embed_row(const Linear& e, int64_t id, float* to) {
    const int64_t C = e.k;
    const auto fill = [&](auto* row, float scale) {
        fill_row(to, C, false, [&](int64_t i) { return load(row + i) * scale; },
                 [&](int64_t i) { return to_float(row[i]) * scale; });
    };
    if (e.kind == FP32) fill((const float*)e.w + id * C, 1.f);
    if (e.kind == BF16) fill((const bf16*)e.w + id * C, 1.f);
    if (e.kind == INT8) fill((const int8_t*)e.w + id * C, e.scale[id]);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; ++i) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + b * sin[i];  // sin is negated in the first half
        x[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

// out (D) = softmax(q . keys[first .. last]) values, keys in blocks so that the sums of a query
// depend on its own position only.
template <class T>
static void attend(const float* q, const T* keys, const T* values, int64_t first, int64_t last,
                   int64_t D, float* out) {
    constexpr int64_t BLOCK = 64;
    float score[BLOCK], top = -INFINITY, total = 0;
    for (int64_t d = 0; d < D; ++d) out[d] = 0;
    for (int64_t s = first; s <= last; s += BLOCK) {
        const int64_t n = last + 1 - s < BLOCK ? last + 1 - s : BLOCK;
        dot_rows<Fma, T, 1>(q, D, keys + s * D, D, 0, n, D, true,
                            [&](int64_t i, int64_t, float v) { score[i] = v; });
        float most = top;
        for (int64_t i = 0; i < n; ++i) most = score[i] > most ? score[i] : most;
        const float shrink = exponential(top - most);
        top = most;
        for (int64_t i = n; i < BLOCK; ++i) score[i] = -INFINITY;
        f32v part = {};
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            const f32v p = exponential(load(score + i) - top);
            store(score + i, p);
            part += p;
        }
        total = total * shrink + sum(part);
        int64_t d = 0;
        for (; d + 4 * LANES <= D; d += 4 * LANES) {
            f32v acc[4];
            for (int u = 0; u < 4; ++u) acc[u] = load(out + d + u * LANES) * shrink;
            for (int64_t i = 0; i < n; ++i)
                for (int u = 0; u < 4; ++u) acc[u] = fma(splat(score[i]), load(values + (s + i) * D + d + u * LANES), acc[u]);
            for (int u = 0; u < 4; ++u) store(out + d + u * LANES, acc[u]);
        }
        for (; d < D; ++d) {
            float acc = out[d] * shrink;
            for (int64_t i = 0; i < n; ++i) acc += score[i] * to_float(values[(s + i) * D + d]);
            out[d] = acc;
        }
    }
    for (int64_t d = 0; d < D; ++d) out[d] /= total;
}

// What one call works on; the buffers are shared by its threads.
struct Step {
    const Model& m;
    const int64_t *ids, *positions;  // (B, T)
    int64_t B, T;
    float *logits;      // (B, outputs, V) fp32, or null
    int64_t* argmax;    // (B, outputs), or null
    int64_t outputs;    // tokens per row that get logits: T, or 1 for the last
    float *x, *h, *qkv, *attended, *act, *up;
    uint8_t* narrow;
    float* scales;
    Team& team;
    float* best;        // (threads, B * outputs)
    int64_t* best_at;

    int64_t rows() const { return B * T; }

    // h = norm(x) * weight for this thread's share of rows; quantized too when asked
    void normalize(const float* weight, bool quantized, int thread, const float* from, int64_t n) {
        const Share share(n, thread, team.size, 1);
        for (int64_t r = share.begin; r < share.end; ++r) {
            const float* in = from + r * m.hidden;
            norm_row(in, weight, h + r * m.hidden, m.hidden,
                     inverse_rms(in, m.hidden, float(m.eps)), false);
            if (quantized) quantize_in_place(h + r * m.hidden, r, m.hidden);
        }
    }
    void quantize_in_place(float* row, int64_t r, int64_t K) {
        quantize_row(row, K, narrow + r * K, row, scales + r);
    }
    void quantize(float* rows_, int64_t n, int64_t K, int thread) {
        const Share share(n, thread, team.size, 1);
        for (int64_t r = share.begin; r < share.end; ++r) quantize_in_place(rows_ + r * K, r, K);
        team.meet();
    }
    Rows activations(const float* from, int64_t n, int64_t K) const {
        return {from, narrow, scales, n, K};
    }

    template <class T_> void attention(const Layer& layer, int thread) {
        const int64_t D = m.head_dim, H = m.heads, G = H / m.kv_heads,
                      width = (H + 2 * m.kv_heads) * D, tasks = B * m.kv_heads;
        for (int64_t task = thread; task < tasks; task += team.size) {
            const int64_t b = task / m.kv_heads, head = task % m.kv_heads;
            T_* keys = (T_*)layer.keys + task * m.slots * D;
            T_* values = (T_*)layer.values + task * m.slots * D;
            for (int64_t t = 0; t < T; ++t) {
                const int64_t p = positions[b * T + t];
                float* row = qkv + (b * T + t) * width;
                const float *cos = m.cos + p * D, *sin = m.sin + p * D;
                float *k = row + (H + head) * D, *v = row + (H + m.kv_heads + head) * D;
                if (layer.k_norm) norm_row(k, layer.k_norm, k, D, inverse_rms(k, D, float(m.eps)), false);
                rotate(k, cos, sin, D);
                for (int64_t d = 0; d < D; ++d) {
                    from_float(keys + p * D + d, k[d]);
                    from_float(values + p * D + d, v[d]);
                }
                for (int64_t g = 0; g < G; ++g) {
                    float* q = row + (head * G + g) * D;
                    if (layer.q_norm)
                        norm_row(q, layer.q_norm, q, D, inverse_rms(q, D, float(m.eps)), false);
                    rotate(q, cos, sin, D);
                    const float scale = 1.f / std::sqrt(float(D));
                    for (int64_t d = 0; d < D; ++d) q[d] *= scale;
                }
            }
            for (int64_t t = 0; t < T; ++t) {
                const int64_t p = positions[b * T + t];
                const int64_t first = m.window && p >= m.window ? p - m.window + 1 : 0;
                for (int64_t g = 0; g < G; ++g)
                    attend(qkv + (b * T + t) * width + (head * G + g) * D, keys, values, first, p, D,
                           attended + (b * T + t) * H * D + (head * G + g) * D);
            }
        }
    }

    // this thread's part of several linears of one input, side by side in rows of `out`
    template <int N>
    void linears(const Linear* const (&parts)[N], const Rows& in, float* out, int64_t stride,
                 int thread, float* scratch) {
        int64_t total = 0, at = 0;
        for (auto* l : parts) total += l->n;
        const Share share(total, thread, team.size, parts[0]->unit());
        for (auto* l : parts) {
            const int64_t begin = std::max(share.begin - at, int64_t(0));
            const int64_t end = std::min(share.end - at, l->n);
            if (begin < end) linear<false>(*l, in, begin, end, out + at, stride, scratch);
            at += l->n;
        }
    }

    void run(int thread, float* scratch) {
        const int64_t C = m.hidden, H = m.heads, D = m.head_dim, n = rows(),
                      width = (H + 2 * m.kv_heads) * D;
        const Share own(n, thread, team.size, 1);
        for (int64_t r = own.begin; r < own.end; ++r) embed_row(m.embed, ids[r], x + r * C);
        for (int64_t i = 0; i < m.layers; ++i) {
            const Layer& l = m.layer[i];
            if (i) team.meet();
            normalize(l.input_norm, l.q.kind == INT8_DYNAMIC, thread, x, n);
            team.meet();
            linears<3>({&l.q, &l.k, &l.v}, activations(h, n, C), qkv, width, thread, scratch);
            team.meet();
            m.cache_bf16 ? attention<bf16>(l, thread) : attention<float>(l, thread);
            team.meet();
            if (l.o.kind == INT8_DYNAMIC) quantize(attended, n, H * D, thread);
            const Share out(C, thread, team.size, std::max(l.o.unit(), l.down.unit()));
            linear<true>(l.o, activations(attended, n, H * D), out.begin, out.end, x, C, scratch);
            team.meet();
            normalize(l.post_norm, l.gate.kind == INT8_DYNAMIC, thread, x, n);
            team.meet();
            const Share in(m.inner, thread, team.size, l.gate.unit());
            linear<false>(l.gate, activations(h, n, C), in.begin, in.end, act, m.inner, scratch);
            linear<false>(l.up, activations(h, n, C), in.begin, in.end, up, m.inner, scratch);
            for (int64_t r = 0; r < n; ++r) {
                float *a = act + r * m.inner + in.begin, *u = up + r * m.inner + in.begin;
                fill_row(a, in.end - in.begin, false,
                         [&](int64_t j) { return silu(load(a + j)) * load(u + j); },
                         [&](int64_t j) { return silu(splat(a[j]))[0] * u[j]; });
            }
            team.meet();
            if (l.down.kind == INT8_DYNAMIC) quantize(act, n, m.inner, thread);
            linear<true>(l.down, activations(act, n, m.inner), out.begin, out.end, x, C, scratch);
        }
        team.meet();
        const float* last = x;
        const int64_t wanted = B * outputs;
        if (outputs < T) {  // the last token of each row, packed into `attended`'s neighbour `act`
            const Share some(B, thread, team.size, 1);
            for (int64_t b = some.begin; b < some.end; ++b)
                std::memcpy(up + b * C, x + (b * T + T - 1) * C, C * sizeof(float));
            last = up;
        }
        normalize(m.final_norm, m.head.kind == INT8_DYNAMIC, thread, last, wanted);
        team.meet();
        const Share share(m.vocab, thread, team.size, m.head.unit());
        linear<false>(m.head, activations(h, wanted, C), share.begin, share.end, logits, m.vocab, scratch);
        if (!argmax) return;
        for (int64_t r = 0; r < wanted; ++r) {
            const float* row = logits + r * m.vocab;
            int64_t at = share.begin;
            for (int64_t j = share.begin + 1; j < share.end; ++j)
                if (row[j] > row[at]) at = j;
            best[thread * wanted + r] = share.begin < share.end ? row[at] : -INFINITY;
            best_at[thread * wanted + r] = at;
        }
        team.meet();
        if (thread == 0)
            for (int64_t r = 0; r < wanted; ++r) {
                int most = 0;
                for (int t = 1; t < team.size; ++t)
                    if (best[t * wanted + r] > best[most * wanted + r]) most = t;
                argmax[r] = best_at[most * wanted + r];
            }
    }
};

// Floats of workspace that `decode_step` needs for this many rows, outputs and threads.
static int64_t widest(const Model& m) { return std::max({m.hidden, m.inner, m.heads * m.head_dim}); }
extern "C" int64_t decode_step_workspace(const Model* m, int64_t rows, int64_t threads) {
    const int64_t width = (m->heads + 2 * m->kv_heads) * m->head_dim, wide = widest(*m);
    return rows * (4 * wide + width + 2 * wide + wide / 4 + 64) +
           threads * (BLOCK_ROWS * apart(wide) + 4 * rows + 64) + 1024;
}

// Returns 0, or 1 for a token outside the vocabulary, 2 for a position outside the cache.
extern "C" int decode_step(const Model* m, const int64_t* ids, const int64_t* positions, int64_t B,
                           int64_t T, float* logits, int64_t* argmax, int64_t outputs,
                           float* workspace, int threads) {
    for (int64_t i = 0; i < B * T; ++i) {
        if (ids[i] < 0 || ids[i] >= m->vocab) return 1;
        if (positions[i] < 0 || positions[i] >= m->slots) return 2;
    }
    const int64_t rows = B * T, wide = widest(*m), width = (m->heads + 2 * m->kv_heads) * m->head_dim;
    float* at = workspace;
    const auto take = [&](int64_t n) {
        float* p = at;
        at += (n + 15) / 16 * 16;
        return p;
    };
    float *x = take(rows * m->hidden), *h = take(rows * m->hidden), *qkv = take(rows * width),
          *attended = take(rows * m->heads * m->head_dim), *act = take(rows * m->inner),
          *up = take(rows * std::max(m->inner, m->hidden)), *narrow = take(rows * (wide / 4 + 1)),
          *scales = take(rows), *best = take(threads * rows), *best_at = take(2 * threads * rows),
          *scratch = take(threads * BLOCK_ROWS * apart(wide));
    const auto run = [&](int thread, Team& team) {
        Step step{*m, ids, positions, B, T, logits, argmax, outputs, x, h, qkv, attended, act, up,
                  (uint8_t*)narrow, scales, team, best, (int64_t*)best_at};
        step.run(thread, scratch + thread * BLOCK_ROWS * apart(wide));
    };
    if (threads <= 1) {
        Team team(1);
        run(0, team);
        return 0;
    }
    std::unique_ptr<Team> team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team.reset(new Team(omp_get_num_threads()));
        run(omp_get_thread_num(), *team);
    }
    return 0;
}
