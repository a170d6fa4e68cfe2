// Attention of a few tokens over cached keys and values, which stand in pages: the time is that of
// reading them, once, for all the queries of a kv head.  Rows are cut into chunks of keys; a thread
// takes a chunk, and the chunks of a row are merged in their order, so that results depend neither
// on the number of threads nor on the other rows.  A row's cache without pages is one long page.
#pragma once
#include <atomic>
#include <memory>
#include "softmax.h"

struct Cached {
    int64_t batch, heads, kv_heads, queries, dim;
    int64_t blocks, page, max_blocks;       // pages there are; tokens in one; most in a row
    int64_t k[3], v[3], q[3], y[3];         // elements from one (page or row, head, token) to the next
};
constexpr int64_t CHUNK = 512;  // keys of a unit of work
constexpr int64_t BLOCK = 64;   // keys whose scores are held at once; a multiple of LANES
constexpr int64_t AHEAD = 2 * 16;  // keys between the one that is read and the one that is fetched

// A query row's state over one chunk, and where it ends up: out (wide) before division by total.
struct Partial {
    float top, total;
};

template <class D, class T> class Attend {
    using X = typename D::X;
    const Cached& c;
    const T *k, *v;
    const int32_t* table;
    const int64_t dim, wide, rows;
    std::unique_ptr<float[]> score;

public:
    Attend(const Cached& c, const T* k, const T* v, const int32_t* table)
        : c(c), k(k), v(v), table(table), dim(c.dim), wide((c.dim + PANEL - 1) / PANEL * PANEL),
          rows(c.heads / c.kv_heads * c.queries), score(new float[rows * BLOCK]) {}

    // Keys [first, last) of batch row b and kv head h; row r of q (rows, apart) sees `seen(r)` keys.
    template <class Seen>
    void chunk(const X* q, int64_t q_stride, int64_t b, int64_t h, int64_t first, int64_t last,
               Seen seen, Partial* state, float* out) {
        for (int64_t r = 0; r < rows; ++r) state[r] = {-INFINITY, 0};
        std::memset(out, 0, rows * wide * sizeof(float));
        const T *all_keys[CHUNK + AHEAD], *all_values[CHUNK + AHEAD];
        const int64_t count = last - first;
        for (int64_t i = 0, page = b, slot = first; i < count; ++i, ++slot) {
            if (table && (i == 0 || slot == c.page)) {
                page = table[b * c.max_blocks + (first + i) / c.page];
                slot = (first + i) % c.page;
            }
            all_keys[i] = k + page * c.k[0] + h * c.k[1] + slot * c.k[2];
            all_values[i] = v + page * c.v[0] + h * c.v[1] + slot * c.v[2];
        }
        for (int64_t i = count > 0 ? count : CHUNK + AHEAD; i < CHUNK + AHEAD; ++i) {
            all_keys[i] = all_keys[count - 1];
            all_values[i] = all_values[count - 1];
        }
        for (int64_t s = first; s < last; s += BLOCK) {
            const int64_t n = last - s < BLOCK ? last - s : BLOCK;
            const int64_t even = (n + LANES - 1) / LANES * LANES;
            const T *const *keys = all_keys + (s - first), *const *values = all_values + (s - first);
            for (int64_t i = 0; i < even; i += LANES)
                for (int64_t r = 0; r < rows; ++r) {
                    fetch(keys + i + AHEAD, LANES * r / rows, LANES * (r + 1) / rows);
                    store(score.get() + r * BLOCK + i, scores(q + r * q_stride, keys + i));
                }
            float keep[4];
            for (int64_t r = 0; r < rows; r += 4) {
                const int64_t held = rows - r < 4 ? rows - r : 4;
                for (int64_t i = 0; i < held; ++i)
                    keep[i] = soften(score.get() + (r + i) * BLOCK, even, seen(r + i) - s, state[r + i]);
                float *to = out + r * wide, *p = score.get() + r * BLOCK;
                if (held == 4) weigh<4>(values, p, n, keep, to);
                else if (held == 3) weigh<3>(values, p, n, keep, to);
                else if (held == 2) weigh<2>(values, p, n, keep, to);
                else weigh<1>(values, p, n, keep, to);
            }
        }
    }

private:
    // The hardware follows a stream in order; the keys of a vector are read side by side.  Each query
    // fetches its share of them, so that reading goes on while the others compute.
    void fetch(const T* const* from, int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; ++i)
            for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(from[i] + d);
    }

    f32v scores(const X* q, const T* const* keys) const {
        f32v acc[LANES] = {};
        int64_t d = 0;
        for (; d + D::STEP <= dim; d += D::STEP) {
            const auto one = D::widen(q + d);
            unrolled<LANES>([&](auto i) INLINED { acc[i] = D::mac(acc[i], one, D::widen(keys[i] + d)); });
        }
        if (d < dim) {
            const auto one = widen_tail<D>(q + d, dim - d);
            for (int i = 0; i < LANES; ++i)
                acc[i] = D::mac(acc[i], one, widen_tail<D>(keys[i] + d, dim - d));
        }
        return sums(acc);
    }

    // Scores (scale and log2(e) are in q or here) -> weights; returns what earlier sums shrink by.
    float soften(float* s, int64_t n, int64_t visible, Partial& state) const {
        if (visible <= 0) {
            std::memset(s, 0, n * sizeof(float));
            return 1;
        }
        for (int64_t i = visible; i < n; ++i) s[i] = -INFINITY;
        f32v most = splat(state.top);
        for (int64_t i = 0; i < n; i += LANES) most = larger(most, load(s + i));
        const float now = largest(most), keep = decay((state.top - now) * scale);
        f32v part = {};
        for (int64_t i = 0; i < n; i += LANES) {
            const f32v p = decay((load(s + i) - now) * scale);
            part += p;
            store(s + i, p);
        }
        state.top = now;
        state.total = state.total * keep + lanes_sum(part);
        return keep;
    }

    // out[r] = keep[r] * out[r] + sum_i p[r][i] values[i]
    template <int R> void weigh(const T* const* values, const float* p, int64_t n, const float* keep,
                                float* out) const {
        constexpr int V = R > 2 ? VECS : VECS * 2 > 4 ? 4 : VECS;
        int64_t d = 0;
        for (; d + V * LANES <= dim; d += V * LANES) {
            f32v acc[R][V];
            unrolled<R>([&](auto r) INLINED {
                unrolled<V>([&](auto u) INLINED { acc[r][u] = load(out + r * wide + d + u * LANES) * keep[r]; });
            });
            for (int64_t i = 0; i < n; ++i) {
                f32v row[V];
                unrolled<V>([&](auto u) INLINED {
                    if (u * LANES * sizeof(T) % 64 == 0) __builtin_prefetch(values[i + AHEAD] + d + u * LANES);
                    row[u] = load(values[i] + d + u * LANES);
                });
                unrolled<R>([&](auto r) INLINED {
                    const f32v one = splat(p[r * BLOCK + i]);
                    unrolled<V>([&](auto u) INLINED { acc[r][u] = fma(one, row[u], acc[r][u]); });
                });
            }
            unrolled<R>([&](auto r) INLINED {
                unrolled<V>([&](auto u) INLINED { store(out + r * wide + d + u * LANES, acc[r][u]); });
            });
        }
        for (; d < dim; ++d)
            for (int r = 0; r < R; ++r) {
                float acc = out[r * wide + d] * keep[r];
                for (int64_t i = 0; i < n; ++i) acc += p[r * BLOCK + i] * to_float(values[i][d]);
                out[r * wide + d] = acc;
            }
    }

public:
    float scale = 1;
    int64_t width() const { return wide; }
};

// Refusals: 0 is fine, 1 a length out of range, 2 a page out of range; `where` gets row and place.
inline int refuse(const Cached& c, const int32_t* table, const int64_t* lengths, int64_t* where) {
    const int64_t room = c.page * c.max_blocks;
    for (int64_t b = 0; b < c.batch; ++b) {
        where[0] = b;
        if (lengths[b] < 0 || lengths[b] > room) return 1;
        for (int64_t i = 0; table && i * c.page < lengths[b]; ++i) {
            where[1] = i;
            const int32_t page = table[b * c.max_blocks + i];
            if (page < 0 || page >= c.blocks) return 2;
        }
    }
    return 0;
}

// y = softmax(q k^T * scale) v; query t of row b sees the first lengths[b] - queries + t + 1 keys.
template <class D, class T>
static int attend_cached(const T* q, const T* k, const T* v, const int32_t* table,
                         const int64_t* lengths, T* y, const int64_t* shape, int64_t* where,
                         float scale, int threads) {
    using X = typename D::X;
    Cached c;
    std::memcpy(&c, shape, sizeof c);
    if (const int why = refuse(c, table, lengths, where)) return why;
    int64_t longest = 0, read = 0;
    for (int64_t b = 0; b < c.batch; ++b) {
        longest = lengths[b] > longest ? lengths[b] : longest;
        read += lengths[b] * c.kv_heads * c.dim;
    }
    const int64_t group = c.heads / c.kv_heads, rows = group * c.queries, pairs = c.batch * c.kv_heads;
    const int64_t chunks = longest ? (longest + CHUNK - 1) / CHUNK : 1, units = pairs * chunks;
    const int64_t wide = (c.dim + PANEL - 1) / PANEL * PANEL, q_stride = apart(c.dim);
    std::unique_ptr<Partial[]> state(new Partial[units * rows]);
    std::unique_ptr<float[]> out(new float[units * rows * wide]);
    const auto last_seen = [&](int64_t b, int64_t r) { return lengths[b] - c.queries + r / group + 1; };
    std::atomic<int64_t> taken{0}, merged{0};
    const auto attend = [&] {
        Attend<D, T> one(c, k, v, table);
        one.scale = scale;
        std::unique_ptr<X[]> query(new X[rows * q_stride]);
        for (int64_t u; (u = taken.fetch_add(1)) < units;) {  // (b, h, chunk)
            const int64_t b = u / chunks / c.kv_heads, h = u / chunks % c.kv_heads;
            const int64_t first = u % chunks * CHUNK;
            const int64_t last = lengths[b] < first + CHUNK ? lengths[b] : first + CHUNK;
            for (int64_t r = 0; r < rows; ++r) {
                const T* from = q + b * c.q[0] + (h * group + r % group) * c.q[1] + r / group * c.q[2];
                if constexpr (std::is_same_v<X, T>) std::memcpy(query.get() + r * q_stride, from, c.dim * sizeof(T));
                else for (int64_t d = 0; d < c.dim; ++d) query[r * q_stride + d] = to_float(from[d]);
            }
            one.chunk(query.get(), q_stride, b, h, first, last,
                      [&](int64_t r) { return last_seen(b, r); }, state.get() + u * rows,
                      out.get() + u * rows * wide);
        }
    };
    const auto merge = [&] {
        for (int64_t pair; (pair = merged.fetch_add(1)) < pairs;)
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t b = pair / c.kv_heads, h = pair % c.kv_heads, first = pair * chunks;
                float *to = out.get() + (first * rows + r) * wide;
                Partial& all = state[first * rows + r];
                for (int64_t i = 1; i < chunks && i * CHUNK < last_seen(b, r); ++i) {
                    const Partial part = state[(first + i) * rows + r];
                    const float* from = out.get() + ((first + i) * rows + r) * wide;
                    const float now = part.top > all.top ? part.top : all.top;
                    const float a = decay((all.top - now) * scale), p = decay((part.top - now) * scale);
                    for (int64_t d = 0; d < wide; d += LANES)
                        store(to + d, load(to + d) * a + load(from + d) * p);
                    all = {now, all.total * a + part.total * p};
                }
                const float share = all.total != 0 ? 1.f / all.total : 0.f;
                T* row = y + b * c.y[0] + (h * group + r % group) * c.y[1] + r / group * c.y[2];
                fill_row(row, c.dim, false, [&](int64_t i) { return load(to + i) * share; },
                         [&](int64_t i) { return to[i] * share; });
            }
    };
    if (threads <= 1 || read * rows < SERIAL_ELEMENTS) {
        attend();
        merge();
        return 0;
    }
#pragma omp parallel num_threads(threads)
    {
        attend();
#pragma omp barrier
        merge();
    }
    return 0;
}

#if defined(__AVX512BF16__)
using CachedBf16 = DotBf16;
#else
using CachedBf16 = Fma;
#endif
#define CACHED_ENTRIES(op)                                                                       \
    CACHED_ENTRY(op, float, Fma, f32)                                                            \
    CACHED_ENTRY(op, bf16, CachedBf16, bf16)                                                     \
    CACHED_ENTRY(op, f16, Fma, f16)
#define CACHED_ENTRY(op, T, D, name)                                                             \
    extern "C" int op##_##name(const T* q, const T* k, const T* v, const int32_t* table,         \
                               const int64_t* lengths, T* y, const int64_t* shape,               \
                               int64_t* where, float scale, int threads) {                       \
        return attend_cached<D>(q, k, v, table, lengths, y, shape, where, scale, threads);       \
    }
