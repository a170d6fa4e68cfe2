// Products of many rows of activations (a prompt) with row-major weights: a panel of up to 64
// outputs is turned over, widened on the way, and met from the second-level cache by six rows at a
// time.  Sums stand in other orders than in dot.h; the weights are read once, and never repacked.
#pragma once
#include "int4.h"
#include "softmax.h"

#if defined(__AVX512VNNI__)
struct Quads {  // four int8 of weights, four x + 128: exact sums, their bits in place of floats
    using Sum = i32v;
    static constexpr int PER_WORD = 4;
    static i32v mac(i32v acc, Word a, word_v b) {
        return (i32v)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(int(a)), (__m512i)b);
    }
};
#endif

typedef Word word4 __attribute__((vector_size(16)));

// Four words of a row of weights, as the products want them.
inline word4 words(Singles, const float* p) { return load_as<word4>(p); }
inline word4 words(Singles, const bf16* p) {
    typedef uint16_t half4 __attribute__((vector_size(8)));
    return __builtin_convertvector(load_as<half4>(p), word4) << 16;
}
#if defined(__AVX512BF16__)
inline word4 words(Pairs, const bf16* p) { return load_as<word4>(p); }
inline word4 words(Pairs, const int8_t* p) {  // every int8 is a bf16
    const __m256 wide =
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
    return (word4)_mm256_cvtneps_pbh(wide);
}
#endif
struct Bytes {  // four int8 of weights, as they are
    static constexpr int PER_WORD = 4;
};
inline word4 words(Bytes, const int8_t* p) { return load_as<word4>(p); }

// panel[w][n] = words [w0, w1) of rows n0 + n of w, for n < PANEL; rows past n1 repeat the last.
template <class F, class W>
inline void turn(const W* w, int64_t K, int64_t n0, int64_t n1, int64_t w0, int64_t w1,
                 Word* panel) {
    constexpr int PER = F::PER_WORD;
    for (int64_t n = 0; n < PANEL && n0 + n < n1; n += 4) {
        const W* rows[4];
        for (int i = 0; i < 4; ++i) rows[i] = w + std::min(n0 + n + i, n1 - 1) * K;
        for (int64_t at = w0; at < w1; at += 4) {
            word4 r[4];
            // the next panel's weights come while the products of this one run
            if ((at - w0) % 16 == 0)
                for (int i = 0; i < 4; ++i)
                    __builtin_prefetch(rows[i] + PANEL * K + at * PER, 0, 2);
            for (int i = 0; i < 4; ++i) {
                W padded[4 * PER] = {};
                const W* p = rows[i] + at * PER;
                if ((at + 4) * PER > K) p = (W*)std::memcpy(padded, p, (K - at * PER) * sizeof(W));
                r[i] = words(F(), p);
            }
            transpose((Word*)r, 4, 4, 4, panel + (at - w0) * PANEL + n, PANEL);
        }
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_TURN_QUADS 1
// each(k, side, v) for whole 32s of inputs in k0 <= k < k1, four at a time, and sides 0 and 8 of a
// panel: v holds the bytes k .. k + 3 of eight rows from n0 + side on; rows past n1 repeat the last,
// and inputs past K are zeros.
template <class B, class Each>
inline void turn_quads(const B* w, int64_t K, int64_t n0, int64_t n1, int64_t k0, int64_t k1,
                       Each each) {
    static_assert(sizeof(B) == 1);
    for (int side = 0; side < PANEL; side += 8) {
        const int64_t first = n0 + side, last = n1 - 1;
        const auto sixteen = [&](const B* const(&from)[8], int64_t k) INLINED {
            __m256i r[4], pair[4];
            unrolled<4>([&](auto i) INLINED {
                r[i] = _mm256_inserti128_si256(
                    _mm256_castsi128_si256(load_as<__m128i>(from[i])), load_as<__m128i>(from[i + 4]),
                    1);
            });
            pair[0] = _mm256_unpacklo_epi32(r[0], r[1]);
            pair[1] = _mm256_unpacklo_epi32(r[2], r[3]);
            pair[2] = _mm256_unpackhi_epi32(r[0], r[1]);
            pair[3] = _mm256_unpackhi_epi32(r[2], r[3]);
            each(k, side, _mm256_unpacklo_epi64(pair[0], pair[1]));
            each(k + 4, side, _mm256_unpackhi_epi64(pair[0], pair[1]));
            each(k + 8, side, _mm256_unpacklo_epi64(pair[2], pair[3]));
            each(k + 12, side, _mm256_unpackhi_epi64(pair[2], pair[3]));
        };
        int64_t k = k0;
        for (; k + 64 <= std::min(K, k1); k += 64) {  // whole lines of the cache
            const B* from[8];
            unrolled<8>([&](auto i) INLINED {
                from[i] = w + std::min(first + i, last) * K + k;
                __builtin_prefetch(from[i] + PANEL * K, 0, 2);  // the next panel's
            });
            unrolled<4>([&](auto part) INLINED {
                const B* at[8];
                unrolled<8>([&](auto i) INLINED { at[i] = from[i] + 16 * part; });
                sixteen(at, k + 16 * part);
            });
        }
        for (; k < k1; k += 32) {
            B padded[8][32] = {};
            for (int i = 0; i < 8 && k < K; ++i)
                std::memcpy(padded[i], w + std::min(first + i, last) * K + k, std::min<int64_t>(K - k, 32));
            for (int half = 0; half < 32; half += 16) {
                const B* at[8];
                for (int i = 0; i < 8; ++i) at[i] = padded[i] + half;
                sixteen(at, k + half);
            }
        }
    }
}
// int8 weights for floats.
inline void turn_wide(const int8_t* w, int64_t K, int64_t n0, int64_t n1, int64_t w0, int64_t w1,
                      Word* panel) {
    turn_quads(w, K, n0, n1, w0, w1, [&](int64_t k, int side, __m256i v) INLINED {
        Word* to = panel + (k - w0) * PANEL + side;
        unrolled<4>([&](auto i) INLINED {
            const i32v whole = (i32v)_mm256_slli_epi32(v, 24 - 8 * i) >> 24;
            store((float*)(to + i * PANEL), __builtin_convertvector(whole, f32v));
        });
    });
}
#else
// The same of int8 weights for floats: four inputs are turned as one word, then widened.
inline void turn_wide(const int8_t* w, int64_t K, int64_t n0, int64_t n1, int64_t w0, int64_t w1,
                      Word* panel) {
    constexpr int64_t SOME = 32;  // words at once
    Word four[SOME * PANEL];
    const int64_t end = (w1 + 3) / 4,
                  columns = std::min<int64_t>(PANEL, (n1 - n0 + LANES - 1) / LANES * LANES);
    for (int64_t at = w0 / 4; at < end; at += SOME) {
        const int64_t to = std::min(at + SOME, end);
        turn<Bytes>(w, K, n0, n1, at, to, four);
        for (int64_t q = at; q < to; ++q)
            for (int64_t n = 0; n < columns; n += LANES) {
                const word_v v = load_as<word_v>(four + (q - at) * PANEL + n);
                Word* out = panel + (4 * q - w0) * PANEL + n;
                for (int i = 0; i < 4;
                     ++i)  // panels have room for the words that fill the last one
                    store((float*)(out + i * PANEL),
                          __builtin_convertvector((i32v)(v << (24 - 8 * i)) >> 24, f32v));
            }
    }
}
#endif

// The same of int4 weights: sixteen outputs already stand side by side.
#if defined(__AVX2__) && !defined(__AVX512F__)
inline void turn(const Int4& w, int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
    for (int64_t n = 0; n < PANEL && n0 + n < n1; n += LANES) {
        const int64_t block = (n0 + n) / SIDE, side = (n0 + n) % SIDE;
        const uint32_t* p = w.block(block) + side;
        const bf16* scales = w.scales(block) + side;
        for (int64_t k = w0; k < w1; k += 8) {  // exact: four bits times a scale of eight
            const f32v scale = load(scales + k / w.group * SIDE), minus = scale * -8.f;
            const u32v v = load_as<u32v>(p + k / 8 * SIDE);
            Word* to = panel + (k - w0) * PANEL + n;
            unrolled<8>([&](auto j) INLINED {  // nibble j holds input 2 (j % 4) + j / 4
                const f32v q = __builtin_convertvector((i32v)(v >> (4 * j) & 15), f32v);
                store((float*)(to + (j % 4 * 2 + j / 4) * PANEL), fma(q, scale, minus));
            });
        }
    }
}
#else
inline void turn(const Int4& w, int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
    for (int64_t n = 0; n < PANEL && n0 + n < n1; n += LANES) {
        const int64_t block = (n0 + n) / SIDE, side = (n0 + n) % SIDE;
        const uint32_t* p = w.block(block) + side;
        const bf16* scale = w.scales(block) + side;
        for (int64_t k = w0; k < w1; ++k) {
            const uint32_t nibble = k % 2 * 4 + k % 8 / 2;  // where input k of eight stands
            const u32v v = load_as<u32v>(p + k / 8 * SIDE) >> (4 * nibble) & 15;
            const f32v q = __builtin_convertvector((i32v)v, f32v) - 8.f;
            store((float*)panel + (k - w0) * PANEL + n, q * load(scale + k / w.group * SIDE));
        }
    }
}
#endif

constexpr int64_t tall(int64_t M) { return (M + TALL - 1) / TALL * TALL; }
#if defined(__AVX512F__)
constexpr int64_t PANEL_WORDS = 2048;  // of the summed dimension in a panel: half a megabyte
// Words of scratch of `panel_rows` for M rows of x of this many words, or three times as many rows
// of bytes.
constexpr int64_t panel_scratch(int64_t M, int64_t words) {
    return (words + 4 + tall(3 * M)) * PANEL;
}

// done(m, n, count, sums) for rows m < M of x and runs of outputs in n0 <= n < n1: sums[i] is
// x row m . weights of output n + i.  x stands in rows of `words` words, x_stride apart, tall(M) of
// them readable; fill(first output, past the last, first word, past the last, panel) turns weights.
template <class F, class Fill, class Done>
inline void panel_rows(const Word* x, int64_t x_stride, int64_t M, int64_t words, int64_t n0,
                       int64_t n1, Word* scratch, Fill fill, Done done) {
    // sums of whole numbers are not to be multiplied by a factor: all their words in one panel
    const int64_t most = F::PER_WORD == 4 ? words : PANEL_WORDS;
    float *sums = (float*)scratch, keep[TALL];
    for (int i = 0; i < TALL; ++i) keep[i] = 1.f;
    Word* panel = scratch + tall(M) * PANEL;
    for (int64_t n = n0; n < n1; n += PANEL) {
        const int64_t count = std::min<int64_t>(PANEL, n1 - n);
        const int64_t columns = (count + LANES - 1) / LANES * LANES;
        for (int64_t w0 = 0; w0 < words; w0 += most) {
            const int64_t w1 = std::min(w0 + most, words);
            fill(n, n1, w0, w1, panel);
            for (int64_t m = 0; m < M; m += TALL) {
                const Word* rows = x + m * x_stride + w0;
                float* to = sums + m * PANEL;
                if (w0)
                    tiles<F, true>(rows, x_stride, panel, PANEL, w1 - w0, to, PANEL, columns, keep);
                else
                    tiles<F, false>(rows, x_stride, panel, PANEL, w1 - w0, to, PANEL, columns,
                                    keep);
            }
        }
        for (int64_t m = 0; m < M; ++m) done(m, n, count, sums + m * PANEL);
    }
}
#else
// A panel is half of the first-level cache, so that of each step only two loads of it and one word of
// each row are waited for; rows of x come from the second level, a kilobyte of each at a time.
constexpr int64_t PANEL_WORDS = 256;
// Words of scratch of `panel_rows`: a panel, what fills up its last 32 inputs, sums of up to 64 bits.
constexpr int64_t panel_scratch(int64_t M, int64_t) { return (PANEL_WORDS + 32 + 2 * M) * PANEL; }
template <class F, class = void> struct TotalOf { using type = float; };
template <class F> struct TotalOf<F, std::void_t<typename F::Total>> {
    using type = typename F::Total;
};

inline void accumulate(float* to, f32v sum, bool add) { store(to, add ? load(to) + sum : sum); }
#if defined(__AVX2__)
inline void accumulate(double* to, i32v sum, bool add) {
    const __m128i half[2] = {_mm256_castsi256_si128((__m256i)sum),
                             _mm256_extracti128_si256((__m256i)sum, 1)};
    for (int i = 0; i < 2; ++i) {
        const __m256d part = _mm256_cvtepi32_pd(half[i]);
        _mm256_storeu_pd(to + 4 * i, add ? _mm256_add_pd(_mm256_loadu_pd(to + 4 * i), part) : part);
    }
}
#endif

// c[r][n] = (or +=) sum_w a[r][w] b[w][n] for ROWS rows and the columns of a panel.
template <class F, int ROWS, class Total>
inline void panel_tile(const Word* a, int64_t a_stride, const Word* b, int64_t words, bool add,
                       Total* c) {
    typename F::Sum acc[ROWS][VECS] = {};
    for (int64_t w = 0; w < words; ++w) {
        word_v row[VECS];
        unrolled<VECS>([&](auto v) INLINED { row[v] = load_as<word_v>(b + w * PANEL + v * LANES); });
        unrolled<ROWS>([&](auto r) INLINED {
            const Word one = a[r * a_stride + w];
            unrolled<VECS>([&](auto v) INLINED { acc[r][v] = F::mac(acc[r][v], one, row[v]); });
        });
    }
    unrolled<ROWS * VECS>([&](auto i) INLINED {
        accumulate(c + i / VECS * PANEL + i % VECS * LANES, acc[i / VECS][i % VECS], add);
    });
}

// done(m, n, count, sums) for rows m < M of x and runs of outputs in n0 <= n < n1: sums[i] is
// x row m . weights of output n + i.  x stands in rows of `words` words, x_stride apart;
// fill(first output, past the last, first word, past the last, panel) turns weights.
template <class F, class Fill, class Done>
inline void panel_rows(const Word* x, int64_t x_stride, int64_t M, int64_t words, int64_t n0,
                       int64_t n1, Word* scratch, Fill fill, Done done) {
    using Total = typename TotalOf<F>::type;
    auto* sums = (Total*)(scratch + (PANEL_WORDS + 32) * PANEL);  // words that fill up the last 32
    const int64_t tiles = (M + TALL - 1) / TALL;
    for (int64_t n = n0; n < n1; n += PANEL) {
        const int64_t count = std::min<int64_t>(PANEL, n1 - n);
        for (int64_t w0 = 0; w0 < words || !w0; w0 += PANEL_WORDS) {
            const int64_t w1 = std::min(w0 + PANEL_WORDS, words);
            fill(n, n1, w0, w1, scratch);
            for (int64_t t = 0; t < tiles; ++t) {  // of like heights: eight rows are twice four
                const int64_t m = M * t / tiles, height = M * (t + 1) / tiles - m;
                unrolled<TALL>([&](auto i) INLINED {
                    if (height == i + 1)
                        panel_tile<F, i + 1>(x + m * x_stride + w0, x_stride, scratch, w1 - w0, w0,
                                             sums + m * PANEL);
                });
            }
        }
        for (int64_t m = 0; m < M; ++m) done(m, n, count, sums + m * PANEL);
    }
}
#endif
