// Dot products of rows: y[m][n] = sum_k x[m][k] w[n][k], both row-major, weights in any format that
// a `load` widens.  Every result is summed in the same order whatever the tile it falls in (one chain
// of vectors, then the lanes), so that a row of a batch has the bits of a batch of one.
#pragma once
#include "rows.h"

inline f32v load(const int8_t* p) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    f32v v;
    for (int i = 0; i < LANES; ++i) v[i] = p[i];
    return v;
#endif
}
inline float to_float(int8_t x) { return x; }

// f(0), f(1), ... f(N - 1) with constant arguments: arrays indexed by them live in registers, where a
// loop unrolled later would leave every sum in memory.
#define INLINED __attribute__((always_inline))
template <class F, int... I>
INLINED inline void unrolled(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F> INLINED inline void unrolled(F f) {
    unrolled(f, std::make_integer_sequence<int, N>());
}

constexpr int TILE_ROWS = 4;    // rows of weights side by side
constexpr int BLOCK_ROWS = 16;  // rows of weights widened at once for a large batch
// Rows of x whose sums fit the registers beside one another: 6 x 4 sums, 6 rows of x, 1 of weights.
constexpr int MOST_ROWS = LANES == 16 ? 6 : 2;

// out[r] = the sum of the lanes of v[r], for four at once: a third of the instructions of four sums.
inline void lanes_sums(const f32v (&v)[TILE_ROWS], float* out) {
#if defined(__AVX512F__)
    const auto pair = [](f32v a, f32v b) INLINED {
        return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                                              _mm512_unpackhi_ps((__m512)a, (__m512)b)));
    };
    const __m512d a = pair(v[0], v[1]), b = pair(v[2], v[3]);
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    for (int r = 0; r < TILE_ROWS; ++r) out[r] = sum(v[r]);
#endif
}
#if defined(__AVX512F__)
inline void lanes_sums(const i32v (&v)[TILE_ROWS], int32_t* out) {
    const auto pair = [](i32v a, i32v b) INLINED {
        return _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)a, (__m512i)b),
                                _mm512_unpackhi_epi32((__m512i)a, (__m512i)b));
    };
    const __m512i a = pair(v[0], v[1]), b = pair(v[2], v[3]);
    const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four),
                                          _mm512_extracti64x4_epi64(four, 1));
    _mm_storeu_si128((__m128i*)out, _mm_add_epi32(_mm256_castsi256_si128(half),
                                                  _mm256_extracti128_si256(half, 1)));
}
#endif
inline float lanes_sum(f32v v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    return sum(v);
#endif
}

// How one vector of activations meets one of weights, and from how many rows of activations it pays
// to widen the weights ahead of the products.
struct Plain {  // how activations stand in memory, where nothing else is said
    static constexpr int PLANES = 1;         // numbers of X per activation
    static constexpr bool PADDED = false;    // whether rows of x are filled up to whole steps
    static constexpr int MOST = MOST_ROWS;
    // Bytes from what is read to what is fetched in each of four streams; 0: whole tiles.  Of a plain
    // read's rate 1 KB gave bytes times bytes 0.93, 2 KB 0.89, tiles 0.80; bytes times floats, which
    // wait for arithmetic, 0.68 and tiles 0.82.
    static constexpr int64_t NEAR = 0;
};
struct Fma : Plain {  // fp32 activations
    using X = float;
    using Vector = f32v;
    using Sum = f32v;
    using Total = float;
    static constexpr int STEP = LANES;
    static constexpr int WIDEN_ONCE = LANES == 16 ? 1 << 30 : 5;  // six rows share a conversion
    template <class W> static Vector widen(const W* p) { return load(p); }
    static f32v mac(f32v acc, Vector x, Vector w) { return fma(x, w, acc); }
};
#if defined(__AVX512BF16__)
struct DotBf16 : Plain {  // bf16 activations: products of pairs, exact, added in fp32
    using X = bf16;
    using Vector = __m512bh;
    using Sum = f32v;
    using Total = float;
    static constexpr int STEP = 32;
    static constexpr int WIDEN_ONCE = 32;
    static Vector widen(const bf16* p) { return load_as<Vector>(p); }
    static Vector widen(const int8_t* p) {  // every int8 is a bf16
        return _mm512_cvtne2ps_pbh((__m512)load(p + 16), (__m512)load(p));
    }
    static f32v mac(f32v acc, Vector x, Vector w) {
        return (f32v)_mm512_dpbf16_ps((__m512)acc, x, w);
    }
};
#endif
#if defined(__AVX512VNNI__)
struct DotInt8 : Plain {  // int8 activations, kept as x + 128: exact int32 sums of products of four
    using X = uint8_t;
    using Vector = __m512i;
    using Sum = i32v;
    using Total = int32_t;
    static constexpr int STEP = 64;
    static constexpr int WIDEN_ONCE = 1 << 30;  // nothing to widen
    static Vector widen(const uint8_t* p) { return load_as<Vector>(p); }
    static Vector widen(const int8_t* p) { return load_as<Vector>(p); }
    static i32v mac(i32v acc, Vector x, Vector w) {
        return (i32v)_mm512_dpbusd_epi32((__m512i)acc, x, w);
    }
};
inline int32_t lanes_sum(i32v v) { return _mm512_reduce_add_epi32((__m512i)v); }
#endif

template <class D, class W> inline auto widen_tail(const W* p, int64_t n) {
    W padded[D::STEP] = {};
    std::memcpy(padded, p, n * sizeof(W));
    return D::widen(padded);
}

template <class D> using Out = typename D::Total;

// How rows of weights are read: in blocks from the cache; once, as four streams through memory, which
// answers four far places faster than four neighbouring rows, the more so the shorter these are; or
// the streams fetched ahead.
enum Read { CACHED, STREAMED, FETCHED };

// Ahead into the second-level cache: the first has fewer lines under way.  Of what one thread of a
// Zen 4 reads from memory, GB/s, fetched into the first and into the second level: rows of 2048 fp32
// 24 and 28, bf16 17 and 25, int8 13 and 22; 20 MB of bf16 from the third 33 and 57.  A Zen 3, whose
// vectors ask for half as much at once, is quicker left alone: 1.24 times in fp32, 1.10 in bf16, 1.06
// in int8 from memory, 1.2, 1.08 and 1.07 from the third-level cache.
constexpr Read BEST_READ = LANES == 16 ? FETCHED : STREAMED;
constexpr int64_t AHEAD_BYTES = 16 << 10;  // bytes between what is read and what is fetched, about
template <class D, class W>
inline int64_t numbers_ahead(bool streams, int64_t next, int64_t tile) {
    if (streams && D::NEAR) return D::NEAR / int64_t(sizeof(W));
    return (1 + AHEAD_BYTES / std::max<int64_t>(1, tile * sizeof(W))) * next;
}

// acc[r][m] = x row m . w row r, for M rows of x and R rows of w; what is fetched meanwhile stands
// `ahead` numbers from these.
template <class D, class W, int M, int R, bool PREFETCH>
inline void dot_tile(const typename D::X* x, int64_t x_stride, const W* w, int64_t w_stride,
                     int64_t ahead, int64_t K, Out<D> out[R][M]) {
    constexpr int LINE = 64 / sizeof(W) > D::STEP ? 64 / sizeof(W) : D::STEP;  // of the cache
    typename D::Sum acc[R][M] = {};
    const W* fetched = w + ahead;  // beside w, not an addition in each address: 6 % of one row
    int64_t k = 0;
    const auto row_at = [&](int m, int64_t at) INLINED {
        return D::widen(x + m * x_stride + at * D::PLANES);
    };
    const auto weights_at = [&](int r, int64_t at) INLINED {
        return D::widen(w + r * w_stride + at);
    };
    const auto step = [&](int64_t at) INLINED {
        if constexpr (2 * R <= M) {  // the fewer are held in registers while the others pass
            typename D::Vector weights[R];
            unrolled<R>([&](auto r) INLINED { weights[r] = weights_at(r, at); });
            unrolled<M>([&](auto m) INLINED {
                const auto row = row_at(m, at);
                unrolled<R>([&](auto r) INLINED {
                    acc[r][m] = D::mac(acc[r][m], row, weights[r]);
                });
            });
        } else {
            typename D::Vector row[M];
            unrolled<M>([&](auto m) INLINED { row[m] = row_at(m, at); });
            unrolled<R>([&](auto r) INLINED {
                const auto weights = weights_at(r, at);
                unrolled<M>([&](auto m) INLINED {
                    acc[r][m] = D::mac(acc[r][m], row[m], weights);
                });
            });
        }
    };
    for (; k + LINE <= K; k += LINE) {
        if (PREFETCH)  // the same place in rows to come: the hardware stops at each row's end
            unrolled<R>([&](auto r) INLINED { __builtin_prefetch(fetched + r * w_stride + k, 0, 2); });
        unrolled<LINE / D::STEP>([&](auto i) INLINED { step(k + i * D::STEP); });
    }
    for (; k + D::STEP <= K; k += D::STEP) step(k);
    if (k < K)
        unrolled<R>([&](auto r) INLINED {
            const auto weights = widen_tail<D>(w + r * w_stride + k, K - k);
            unrolled<M>([&](auto m) INLINED {
                const auto* from = x + m * x_stride + k * D::PLANES;
                if constexpr (D::PADDED) acc[r][m] = D::mac(acc[r][m], D::widen(from), weights);
                else acc[r][m] = D::mac(acc[r][m], widen_tail<D>(from, K - k), weights);
            });
        });
    unrolled<M>([&](auto m) INLINED {
        typename D::Sum rows[TILE_ROWS];
        unrolled<TILE_ROWS>([&](auto r) INLINED { rows[r] = acc[r < R ? r : 0][m]; });
        Out<D> sums[TILE_ROWS];
        lanes_sums(rows, sums);
        unrolled<R>([&](auto r) INLINED { out[r][m] = sums[r]; });
    });
}

// done(n, m, dot) for rows n0 <= n < n1 of w and M <= D::MOST rows of x.
template <class D, class W, int M, class Done>
inline void dot_rows(const typename D::X* x, int64_t x_stride, const W* w, int64_t w_stride,
                     int64_t n0, int64_t n1, int64_t K, Read read, Done done) {
    const int64_t tiles = (n1 - n0) / TILE_ROWS;
    const bool streams = read != CACHED && n1 - n0 > BLOCK_ROWS;  // each through a quarter of them
    const int64_t between = streams ? tiles : 1, step = streams ? 1 : TILE_ROWS;
    const int64_t ahead = numbers_ahead<D, W>(streams, step * w_stride, K * TILE_ROWS);
    for (int64_t t = 0; t < tiles; ++t) {
        Out<D> out[TILE_ROWS][M];
        const int64_t n = n0 + t * step;
        const W* rows = w + n * w_stride;
        const auto tile = [&](auto fetch) {
            dot_tile<D, W, M, TILE_ROWS, fetch>(x, x_stride, rows, between * w_stride,
                                                ahead, K, out);
        };
        if (read == FETCHED && t + 1 < tiles) tile(std::true_type());
        else tile(std::false_type());
        for (int r = 0; r < TILE_ROWS; ++r)
            for (int m = 0; m < M; ++m) done(n + r * between, m, out[r][m]);
    }
    for (int64_t n = n0 + tiles * TILE_ROWS; n < n1; ++n) {
        Out<D> out[1][M];
        dot_tile<D, W, M, 1, false>(x, x_stride, w + n * w_stride, w_stride, w_stride, K, out);
        for (int m = 0; m < M; ++m) done(n, m, out[0][m]);
    }
}

// The same for any number of rows of x: all of them in one tile while they fit, then tiles of 4.
template <class D, class W, class Done>
inline void dot_all(const typename D::X* x, int64_t x_stride, int64_t M, const W* w,
                    int64_t w_stride, int64_t n0, int64_t n1, int64_t K, Read read, Done done) {
    int64_t m = 0;
    const auto run = [&](auto tile) {
        dot_rows<D, W, decltype(tile)::value>(
            x + m * x_stride, x_stride, w, w_stride, n0, n1, K, read,
            [&](int64_t n, int64_t t, Out<D> v) { done(n, m + t, v); });
        m += decltype(tile)::value;
    };
    while (m < M) {
        const int64_t left = M - m;
        const int64_t tile = left <= D::MOST ? left : left <= 8 && D::MOST > 4 ? 4 : D::MOST;
        if (tile == 1) run(std::integral_constant<int, 1>());
        else if (tile == 2) run(std::integral_constant<int, 2>());
        else if constexpr (D::MOST == 3) run(std::integral_constant<int, 3>());
        else if constexpr (D::MOST >= 4) {
            if (tile == 3) run(std::integral_constant<int, 3>());
            else if (tile == 4) run(std::integral_constant<int, 4>());
            else if constexpr (D::MOST >= 6) {
                if (tile == 5) run(std::integral_constant<int, 5>());
                else run(std::integral_constant<int, 6>());
            }
        }
    }
}

// The distance between rows of a buffer of ours: rows a multiple of 4096 bytes apart would share one
// set of the first-level cache and push one another out.
constexpr int64_t apart(int64_t K) { return (K + 63) / 64 * 64 + 64; }

// done(n, m, x row m . w row n) for rows n0 <= n < n1 of w: weights are read once, in order.
// `scratch` holds BLOCK_ROWS * apart(K) of D::X when M >= D::WIDEN_ONCE.
template <class D, class W, class Done>
inline void matmul_rows(const typename D::X* x, int64_t x_stride, int64_t M, const W* w,
                        int64_t w_stride, int64_t n0, int64_t n1, int64_t K,
                        typename D::X* scratch, Done done, Read read = BEST_READ) {
    using X = typename D::X;
    if (M < D::WIDEN_ONCE) {
        // more than one tile would read the weights again: from the cache, in blocks
        const int64_t block = M <= D::MOST ? n1 - n0 : BLOCK_ROWS;
        for (int64_t n = n0; n < n1; n += block)
            dot_all<D, W>(x, x_stride, M, w, w_stride, n, n + block < n1 ? n + block : n1, K, read,
                          done);
        return;
    }
    for (int64_t n = n0; n < n1; n += BLOCK_ROWS) {
        const int64_t rows = n + BLOCK_ROWS < n1 ? BLOCK_ROWS : n1 - n;
        if constexpr (sizeof(X) == sizeof(W)) {  // as they are
            dot_all<D, W>(x, x_stride, M, w + n * w_stride, w_stride, 0, rows, K, CACHED,
                          [&](int64_t r, int64_t m, Out<D> v) { done(n + r, m, v); });
        } else {
            for (int64_t r = 0; r < rows; ++r) {
                const W* from = w + (n + r) * w_stride;
                int64_t k = 0;
                for (; k + D::STEP <= K; k += D::STEP) {
                    const auto v = D::widen(from + k);
                    std::memcpy(scratch + r * apart(K) + k, &v, sizeof v);
                }
                if (k < K) {
                    const auto v = widen_tail<D>(from + k, K - k);
                    std::memcpy(scratch + r * apart(K) + k, &v, (K - k) * sizeof(X));
                }
            }
            dot_all<D, X>(x, x_stride, M, scratch, apart(K), 0, rows, K, CACHED,
                          [&](int64_t r, int64_t m, Out<D> v) { done(n + r, m, v); });
        }
    }
}

// Quantize a row to int8, symmetric, rounded to even: `narrow` gets x / scale + 128 where DotInt8
// reads it, `wide` (may be `from`) the whole numbers as floats where there is no such unit.
inline void quantize_row(const float* from, int64_t K, uint8_t* narrow, float* wide, float* scale) {
    f32v most = {}, poison = {};  // 0 * NaN and 0 * infinity are NaN
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        const f32v v = load(from + k);
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    }
    float top = maximum(most), bad = sum(poison);
    for (; k < K; ++k) {
        top = std::fabs(from[k]) > top ? std::fabs(from[k]) : top;
        bad += from[k] * 0.f;
    }
    if (bad != 0) {  // such a row has no scale: every result of it is NaN
        *scale = NAN;
        std::memset(narrow, 0, K);
        return;
    }
    *scale = std::max(top / 127.f, 0x1p-126f);  // of less, no inverse is finite
    const float inverse = 1.f / *scale;
    k = 0;
#if defined(__AVX512VNNI__)
    (void)wide;
    for (; k + LANES <= K; k += LANES) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps((__m512)load(from + k), _mm512_set1_ps(inverse)));
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128)));
        std::memcpy(narrow + k, &bytes, sizeof bytes);
    }
    for (; k < K; ++k) narrow[k] = uint8_t(int(std::nearbyint(from[k] * inverse)) + 128);
#else
    (void)narrow;
    for (; k + LANES <= K; k += LANES)
        store(wide + k, (load(from + k) * inverse + 12582912.f) - 12582912.f);
    for (; k < K; ++k) wide[k] = std::nearbyint(from[k] * inverse);
#endif
}

// The share of `total` items that thread i of `threads` takes: [begin, end), in multiples of `unit`.
struct Share {
    int64_t begin, end;
    Share(int64_t total, int64_t i, int64_t threads, int64_t unit) {
        const int64_t units = (total + unit - 1) / unit;
        begin = units * i / threads * unit;
        end = units * (i + 1) / threads * unit;
        if (begin > total) begin = total;
        if (end > total) end = total;
    }
};
