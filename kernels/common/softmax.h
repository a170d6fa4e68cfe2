// Pieces of attention: exponentials of differences, and products of small blocks held in registers.
#pragma once
#include "dot.h"

// e^(x scale) for x <= 0 or NaN; 0 for -infinity.  To 2 units in the last place, or within 1e-4, an
// eighth of the rounding of the bf16 that it becomes.  decay(0) is 1.  Minimax polynomials.
// Without AVX-512 what is below the smallest normal number, beside a weight of 1, may become 0.
template <bool ROUGH = false> inline f32v decay(f32v x, float scale = 1) {
    // 2^(whole + rest); the maximum keeps NaN (its second operand) and turns -infinity finite.  A
    // factor beyond the largest float would make NaN of 0.
    const float bits = std::min(scale * 1.44269504f, 3.4e38f);
#if defined(__AVX512F__)
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-160.f), (__m512)(x * bits));
    const __m512 whole = _mm512_roundscale_ps(y, 8);
    const f32v rest = (f32v)_mm512_sub_ps(y, whole);
#else
    // Added to 1.5 x 2^23, a number is rounded to a whole one, which stands in the sum's low bits;
    // with 127 they are the exponent of 2^whole, and 0 where that is 2^-127.
    constexpr float MAGIC = 12582912.f + 127.f;
    const f32v y = larger(splat(-127.f), x * bits), shifted = y + MAGIC;
    const f32v rest = y - (shifted - MAGIC);
    const f32v power = (f32v)((i32v)shifted << 23);
#endif
    f32v p;
    if constexpr (ROUGH) {
        p = fma(splat(5.500893126e-2f), rest, splat(2.422109678e-1f));
        p = fma(p, rest, splat(6.932829281e-1f));
    } else {
        p = fma(splat(1.535336206e-4f), rest, splat(1.339887456e-3f));
        p = fma(p, rest, splat(9.618437358e-3f));
        p = fma(p, rest, splat(5.550332471e-2f));
        p = fma(p, rest, splat(2.402264791e-1f));
        p = fma(p, rest, splat(6.931472029e-1f));
    }
#if defined(__AVX512F__)
    p = fma(p, rest, splat(1.f));
    return (f32v)_mm512_scalef_ps((__m512)p, whole);
#else
    return fma(p, rest * power, power);
#endif
}
inline float decay(float x, float scale = 1) { return decay(splat(x), scale)[0]; }

inline float largest(f32v v) {  // of numbers, or of numbers and -infinity
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v),
                                   _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float m = v[0];
    for (int i = 1; i < LANES; ++i) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// lane i of the result is the sum of the lanes of v[i]
inline f32v sums(const f32v (&v)[LANES]) {
#if defined(__AVX512F__)
    __m512 pair[8], four[4], half[2];
    unrolled<8>([&](auto i) INLINED {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    });
    unrolled<4>([&](auto i) INLINED {
        const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    });
    const auto fold = [](__m512 a, __m512 b) INLINED {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    half[0] = fold(four[0], four[1]);
    half[1] = fold(four[2], four[3]);
    return (f32v)fold(half[0], half[1]);
#elif defined(__AVX2__)
    __m256 pair[4], four[2];
    unrolled<4>([&](auto i) INLINED {
        const __m256 a = (__m256)v[2 * i], b = (__m256)v[2 * i + 1];
        pair[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    });
    unrolled<2>([&](auto i) INLINED {
        const __m256d a = _mm256_castps_pd(pair[2 * i]), b = _mm256_castps_pd(pair[2 * i + 1]);
        four[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                                _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    });
    return (f32v)_mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                               _mm256_permute2f128_ps(four[0], four[1], 0x31));
#else
    f32v all;
    for (int i = 0; i < LANES; ++i) all[i] = sum(v[i]);
    return all;
#endif
}

// A block's operands are arrays of 32-bit words: a float, or a pair of bf16 that neighbour one
// another in the summed dimension.
using Word = uint32_t;
typedef Word word_v __attribute__((vector_size(4 * LANES)));

struct Singles {
    using Sum = f32v;
    static constexpr int PER_WORD = 1;
    static f32v mac(f32v acc, Word a, word_v b) {
        return fma(splat(bit_cast<float>(a)), (f32v)b, acc);
    }
    template <class T> static void from(Word* to, const T* row, int64_t n) {  // n numbers
        fill_row(reinterpret_cast<float*>(to), n, false, [&](int64_t i) { return load(row + i); },
                 [&](int64_t i) { return to_float(row[i]); });
    }
};
#if defined(__AVX512BF16__)
struct Pairs {  // exact products, summed in fp32
    using Sum = f32v;
    static constexpr int PER_WORD = 2;
    static f32v mac(f32v acc, Word a, word_v b) {
        return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
    }
    static void from(Word* to, const bf16* row, int64_t n) {
        if (n % 2) to[n / 2] = 0;
        std::memcpy(to, row, n * sizeof(bf16));
    }
};
#endif

constexpr int VECS = LANES == 16 ? 4 : 2;   // columns of a tile, in vectors
constexpr int PANEL = VECS * LANES;
constexpr int TALL = 6;  // its rows: TALL * VECS sums, one row of b and one word of a fill the registers

// c[r][n] = keep[r] * c[r][n] + sum_w a[r][w] b[w][n] for TALL rows and V vectors of n.
template <class F, int V, bool KEEP>
INLINED inline void tile(const Word* a, int64_t a_stride, const Word* b, int64_t b_stride,
                         int64_t words, float* c, int64_t c_stride, const float* keep) {
    typename F::Sum acc[TALL][V];
    unrolled<TALL>([&](auto r) INLINED {
        unrolled<V>([&](auto v) INLINED {
            if constexpr (KEEP) acc[r][v] = (typename F::Sum)(load(c + r * c_stride + v * LANES) * keep[r]);
            else acc[r][v] = typename F::Sum{};
        });
    });
    for (int64_t w = 0; w < words; ++w) {
        word_v row[V];
        unrolled<V>([&](auto v) INLINED { row[v] = load_as<word_v>(b + w * b_stride + v * LANES); });
        unrolled<TALL>([&](auto r) INLINED {
            const Word one = a[r * a_stride + w];
            unrolled<V>([&](auto v) INLINED { acc[r][v] = F::mac(acc[r][v], one, row[v]); });
        });
    }
    unrolled<TALL>([&](auto r) INLINED {
        unrolled<V>([&](auto v) INLINED { store(c + r * c_stride + v * LANES, (f32v)acc[r][v]); });
    });
}

// The same for any multiple of LANES columns.
template <class F, bool KEEP>
inline void tiles(const Word* a, int64_t a_stride, const Word* b, int64_t b_stride, int64_t words,
                  float* c, int64_t c_stride, int64_t columns, const float* keep) {
    int64_t n = 0;
    for (; n + PANEL <= columns; n += PANEL)
        tile<F, VECS, KEEP>(a, a_stride, b + n, b_stride, words, c + n, c_stride, keep);
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        tile<F, 2, KEEP>(a, a_stride, b + n, b_stride, words, c + n, c_stride, keep);
    for (; n < columns; n += LANES)
        tile<F, 1, KEEP>(a, a_stride, b + n, b_stride, words, c + n, c_stride, keep);
}

// to[w][n] = from[n][w] for n < rows and w < words, both rounded up to multiples of 4.
inline void transpose(const Word* from, int64_t from_stride, int64_t rows, int64_t words, Word* to,
                      int64_t to_stride) {
    for (int64_t n = 0; n < rows; n += 4)
        for (int64_t w = 0; w < words; w += 4) {
#if defined(__SSE2__)
            __m128 r[4];
            for (int i = 0; i < 4; ++i) r[i] = load_as<__m128>(from + (n + i) * from_stride + w);
            _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
            for (int i = 0; i < 4; ++i) std::memcpy(to + (w + i) * to_stride + n, &r[i], 16);
#else
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j)
                    to[(w + i) * to_stride + n + j] = from[(n + j) * from_stride + w + i];
#endif
        }
}
