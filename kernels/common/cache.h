// Attention of a few tokens over cached keys and values, which stand in pages: the time is that of
// reading them, once, for all the queries of a kv head.  Rows are cut into chunks of keys; a thread
// takes a chunk, and the chunks of a row are merged in their order, so that results depend neither
// on the number of threads nor on the other rows.  A row's cache without pages is one long page.
#pragma once
#include "cache_streams.h"

constexpr int64_t BLOCK = 64;   // keys whose scores are held at once; a multiple of LANES
// Keys between the one that is read and the one that is fetched.  Into the second-level cache: it was
// 1.4 to 1.7 times the bytes a second that fetching into the first gave, which was as good as none.
constexpr int64_t AHEAD = BLOCK;

template <class D, class T> class Attend {
    using X = typename D::X;
    static constexpr bool PAIRS = std::is_same_v<X, bf16>;  // weights become bf16, as values are
    const Cached& c;
    const T *k, *v;
    const int32_t* table;
    const int64_t dim, wide, rows;
    std::unique_ptr<float[]> score;
    const T *all_keys[CHUNK + AHEAD], *all_values[CHUNK + AHEAD];

public:
    Attend(const Cached& c, const T* k, const T* v, const int32_t* table)
        : c(c), k(k), v(v), table(table), dim(c.dim), wide((c.dim + PANEL - 1) / PANEL * PANEL),
          rows(c.heads / c.kv_heads * c.queries), score(new float[rows * BLOCK]()) {}

    // Where the keys and values of this unit stand, and behind them the first of the `next`, for
    // whoever fetches ahead.
    void find(const Unit& unit, const Unit& next) {
        const int64_t count = point(unit, 0, CHUNK);
        int64_t i = count + point(next, count, AHEAD);
        for (; count > 0 && i < count + AHEAD; ++i) {
            all_keys[i] = all_keys[i - 1];
            all_values[i] = all_values[i - 1];
        }
    }

    // Row r of q (rows, apart) sees `seen(r)` keys of the unit that was found.
    template <class Seen>
    void chunk(const X* q, int64_t q_stride, const Unit& unit, Seen seen, Partial* state, float* out) {
        for (int64_t r = 0; r < rows; ++r) state[r] = {-INFINITY, 0};
        std::memset(out, 0, rows * wide * sizeof(float));
        for (int64_t s = unit.first; s < unit.last; s += BLOCK) {
            const int64_t n = unit.last - s < BLOCK ? unit.last - s : BLOCK;
            const int64_t even = (n + LANES - 1) / LANES * LANES;
            const T *const *keys = all_keys + (s - unit.first), *const *values = all_values + (s - unit.first);
            by_rows([&](auto held, int64_t r) {
                constexpr int R = decltype(held)::value;
                for (int64_t i = 0; i < even; i += LANES / R) {
                    if (r == 0) scores<R, true>(q, q_stride, keys + i, score.get() + i);
                    else scores<R, false>(q + r * q_stride, q_stride, keys + i, score.get() + r * BLOCK + i);
                }
            });
            by_rows([&](auto held, int64_t r) {
                constexpr int R = decltype(held)::value;
                float keep[R], *p = score.get() + r * BLOCK;
                for (int i = 0; i < R; ++i)
                    keep[i] = soften(p + i * BLOCK, even, seen(r + i) - s, state[r + i]);
                weigh<R>(values, p, n, keep, out + r * wide, r == 0);
            });
        }
    }

private:
    // f(rows at once, first of them): as many as share a vector of scores, four or two or one.
    template <class F> void by_rows(F f) const {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>(), r);
        if (r + 2 <= rows) f(std::integral_constant<int, 2>(), r), r += 2;
        if (r < rows) f(std::integral_constant<int, 1>(), r);
    }

    int64_t point(const Unit& unit, int64_t at, int64_t most) {
        const int64_t count = std::min(unit.last - unit.first, most);
        int64_t page = unit.b, slot = unit.first;
        for (int64_t i = 0; i < count; ++i, ++slot) {
            if (table && (i == 0 || slot == c.page)) {
                page = table[unit.b * c.max_blocks + (unit.first + i) / c.page];
                slot = (unit.first + i) % c.page;
            }
            all_keys[at + i] = k + page * c.k[0] + unit.h * c.k[1] + slot * c.k[2];
            all_values[at + i] = v + page * c.v[0] + unit.h * c.v[1] + slot * c.v[2];
        }
        return count > 0 ? count : 0;
    }

    // to[r][i] = q row r . key i, for R rows and as many keys as fill a vector with them.
    template <int R, bool FETCH>
    void scores(const X* q, int64_t q_stride, const T* const* keys, float* to) const {
        constexpr int KEYS = LANES / R;
        f32v acc[LANES] = {};
        typename D::Vector row[R];
        int64_t d = 0;
        for (; d + D::STEP <= dim; d += D::STEP) {
            unrolled<R>([&](auto r) INLINED { row[r] = D::widen(q + r * q_stride + d); });
            unrolled<KEYS>([&](auto i) INLINED {
                if (FETCH) __builtin_prefetch(keys[i + AHEAD] + d, 0, 2);
                const auto key = D::widen(keys[i] + d);
                unrolled<R>([&](auto r) INLINED {
                    acc[r * KEYS + i] = D::mac(acc[r * KEYS + i], row[r], key);
                });
            });
        }
        if (d < dim) {
            unrolled<R>([&](auto r) INLINED { row[r] = widen_tail<D>(q + r * q_stride + d, dim - d); });
            unrolled<KEYS>([&](auto i) INLINED {
                const auto key = widen_tail<D>(keys[i] + d, dim - d);
                unrolled<R>([&](auto r) INLINED {
                    acc[r * KEYS + i] = D::mac(acc[r * KEYS + i], row[r], key);
                });
            });
        }
        float all[LANES];
        store(all, sums(acc));
        for (int r = 0; r < R; ++r) std::memcpy(to + r * BLOCK, all + r * KEYS, KEYS * sizeof(float));
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
            const f32v p = decay<PAIRS>((load(s + i) - now) * scale);
            part += p;
            store(s + i, p);
        }
        state.top = now;
        state.total = state.total * keep + lanes_sum(part);
        return keep;
    }

    // out[r] = keep[r] * out[r] + sum_i p[r][i] values[i]
    template <int R> void weigh(const T* const* values, const float* p, int64_t n, const float* keep,
                                float* out, bool fetch) const {
        int64_t d = 0;
#if defined(__AVX512BF16__)
        if constexpr (PAIRS) {
            Word pair[R][BLOCK / 2];
            for (int r = 0; r < R; ++r)
                for (int64_t i = 0; i < n; i += 2 * LANES) {
                    const auto two = _mm512_cvtne2ps_pbh((__m512)load(p + r * BLOCK + i + LANES),
                                                         (__m512)load(p + r * BLOCK + i));
                    std::memcpy(pair[r] + i / 2, &two, sizeof two);
                }
            for (; d + 4 * LANES <= dim; d += 4 * LANES)
                weigh_pairs<R, 2>(values, pair[0], n, keep, out, d, fetch);
            for (; d + 2 * LANES <= dim; d += 2 * LANES)
                weigh_pairs<R, 1>(values, pair[0], n, keep, out, d, fetch);
        }
#endif
        for (; d + VECS * LANES <= dim; d += VECS * LANES)
            weigh_some<R, VECS>(values, p, n, keep, out, d, fetch);
        for (; d + LANES <= dim; d += LANES) weigh_some<R, 1>(values, p, n, keep, out, d, fetch);
        for (; d < dim; ++d)
            for (int r = 0; r < R; ++r) {
                float acc = out[r * wide + d] * keep[r];
                for (int64_t i = 0; i < n; ++i) acc += p[r * BLOCK + i] * to_float(values[i][d]);
                out[r * wide + d] = acc;
            }
    }

    // The same of V vectors from d on.
    template <int R, int V>
    void weigh_some(const T* const* values, const float* p, int64_t n, const float* keep, float* out,
                    int64_t d, bool fetch) const {
        f32v acc[R][V];
        unrolled<R>([&](auto r) INLINED {
            unrolled<V>([&](auto u) INLINED { acc[r][u] = load(out + r * wide + d + u * LANES) * keep[r]; });
        });
        for (int64_t i = 0; i < n; ++i) {
            f32v row[V];
            unrolled<V>([&](auto u) INLINED {
                if (fetch && u * LANES * sizeof(T) % 64 == 0)
                    __builtin_prefetch(values[i + AHEAD] + d + u * LANES, 0, 2);
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

#if defined(__AVX512BF16__)
    // The same in bf16, two keys an instruction, of V double vectors: side by side they stand in
    // another order of four elements each, which sums keep until the block ends.
    template <int R, int V>
    void weigh_pairs(const T* const* values, const Word* p, int64_t n, const float* keep, float* out,
                     int64_t d, bool fetch) const {
        f32v low[R][V], high[R][V];
        unrolled<R>([&](auto r) INLINED {
            unrolled<V>([&](auto u) INLINED {
                const float* from = out + r * wide + d + 2 * u * LANES;
                const __m512 a = (__m512)(load(from) * keep[r]), b = (__m512)(load(from + LANES) * keep[r]);
                low[r][u] = (f32v)_mm512_shuffle_f32x4(a, b, 0x88);
                high[r][u] = (f32v)_mm512_shuffle_f32x4(a, b, 0xdd);
            });
        });
        for (int64_t i = 0; i < n; i += 2) {
            const bool alone = i + 1 == n;  // beside the last: zeros, for 0 times infinity is NaN
            const T *a = values[i] + d, *b = values[alone ? i : i + 1] + d;
            word_v first[V], second[V];
            unrolled<V>([&](auto u) INLINED {
                if (fetch) {
                    __builtin_prefetch(values[i + AHEAD] + d + 2 * u * LANES, 0, 2);
                    __builtin_prefetch(values[i + AHEAD + 1] + d + 2 * u * LANES, 0, 2);
                }
                const __m512i even = load_as<__m512i>(a + 2 * u * LANES);
                const __m512i odd = alone ? __m512i{} : load_as<__m512i>(b + 2 * u * LANES);
                first[u] = (word_v)_mm512_unpacklo_epi16(even, odd);
                second[u] = (word_v)_mm512_unpackhi_epi16(even, odd);
            });
            unrolled<R>([&](auto r) INLINED {
                const Word one = p[r * (BLOCK / 2) + i / 2];
                unrolled<V>([&](auto u) INLINED {
                    low[r][u] = Pairs::mac(low[r][u], one, first[u]);
                    high[r][u] = Pairs::mac(high[r][u], one, second[u]);
                });
            });
        }
        const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        unrolled<R>([&](auto r) INLINED {
            unrolled<V>([&](auto u) INLINED {
                const __m512d a = (__m512d)low[r][u], b = (__m512d)high[r][u];
                float* to = out + r * wide + d + 2 * u * LANES;
                store(to, (f32v)_mm512_permutex2var_pd(a, front, b));
                store(to + LANES, (f32v)_mm512_permutex2var_pd(a, back, b));
            });
        });
    }
#endif

public:
    float scale = 1;
    int64_t width() const { return wide; }
};

template <class D, class T>
using Attending = std::conditional_t<LANES == 16, Attend<D, T>, AttendStreams<T>>;

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
    const auto unit_at = [&](int64_t u) {  // (b, h, chunk)
        const int64_t b = u / chunks / c.kv_heads, first = u % chunks * CHUNK;
        return Unit{b, u / chunks % c.kv_heads, first, std::min(lengths[b], first + CHUNK)};
    };
    std::atomic<int64_t> taken{0}, merged{0};
    const auto attend = [&] {
        Attending<D, T> one(c, k, v, table);
        one.scale = scale;
        std::unique_ptr<X[]> query(new X[rows * q_stride]);
        // the next one is known while one is computed, and its first keys are fetched
        for (int64_t u = taken.fetch_add(1), next; u < units; u = next) {
            next = taken.fetch_add(1);
            const Unit unit = unit_at(u);
            one.find(unit, next < units ? unit_at(next) : Unit{});
            const int64_t b = unit.b, h = unit.h;
            for (int64_t r = 0; r < rows; ++r) {
                const T* from = q + b * c.q[0] + (h * group + r % group) * c.q[1] + r / group * c.q[2];
                if constexpr (std::is_same_v<X, T>) std::memcpy(query.get() + r * q_stride, from, c.dim * sizeof(T));
                else for (int64_t d = 0; d < c.dim; ++d) query[r * q_stride + d] = to_float(from[d]);
            }
            one.chunk(query.get(), q_stride, unit, [&](int64_t r) { return last_seen(b, r); },
                      state.get() + u * rows, out.get() + u * rows * wide);
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
