// Activations as whole numbers of 16 bits times int8 weights, where AVX2 is the best there is: an
// instruction multiplies 16 pairs and adds them two by two, in 32 bits, exactly.  On a Zen 3 core
// that and the addition run at 1.6 times the products of fp32 fused multiply-adds, and weights are
// widened by three shifts for 32 of them; to floats, four conversions and four widening loads of two
// cycles each.  A number of more than 16 bits stands in two rows, upper and lower halves.
#pragma once
#include "panels.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_SHORTS 1

// acc + the products of 16 pairs, added two by two: as one piece, for the compiler would multiply
// ahead and leave sums in memory.
INLINED inline i32v add_pairs(i32v acc, __m256i a, __m256i b) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(products) : "x"(a), "x"(b));
    return acc;
}

// A row of x stands in blocks of 32, those with even index first, padded with zeros to whole blocks.
struct DotShorts : Plain {
    struct Vector {
        __m256i even, odd;
    };
    struct Sum {
        i32v lanes;
    };
    using Total = double;  // whole numbers up to 2^53 are exact
    using X = int16_t;
    static constexpr int STEP = 32, MOST = 2, WIDEN_ONCE = 1 << 30;
    static constexpr bool PADDED = true;
    static Vector widen(const int16_t* x) {
        return {load_as<__m256i>(x), load_as<__m256i>(x + 16)};
    }
    static Vector widen(const int8_t* p) {
        const __m256i w = load_as<__m256i>(p);
        return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
    }
    static Sum mac(Sum acc, const Vector& x, const Vector& w) {
        return {add_pairs(add_pairs(acc.lanes, x.even, w.even), x.odd, w.odd)};
    }
};
inline void lanes_sums(const DotShorts::Sum (&v)[TILE_ROWS], double* out) {
    __m256d row[TILE_ROWS];
    unrolled<TILE_ROWS>([&](auto r) INLINED {
        const __m256i lanes = (__m256i)v[r].lanes;
        row[r] = _mm256_add_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(lanes)),
                               _mm256_cvtepi32_pd(_mm256_extracti128_si256(lanes, 1)));
    });
    const __m256d a = _mm256_hadd_pd(row[0], row[1]), b = _mm256_hadd_pd(row[2], row[3]);
    _mm256_storeu_pd(out, _mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20),
                                        _mm256_permute2f128_pd(a, b, 0x31)));
}
// Inputs whose products a lane of 32 bits can add up: 128 times 4 of at most 32767 * 128.
constexpr int64_t LANE_INPUTS = 4096;
constexpr int64_t MOST_INPUTS = 1 << 16;  // whose sums of two halves a double holds
// Rows of shorts from which panels are faster than dot products: these took 0.62 times as long at 8
// rows, 0.77 at 16, 0.98 at 32, 1.06 at 48 (inputs and outputs 4096, two threads).
constexpr int64_t TURNED = 40;

// done(n, m, sum) for rows n0 <= n < n1 of w and M rows of shorts, `apart(K)` from one another.  More
// than a tile of these meet TILE_ROWS of w in the first-level cache, up to four by two at a time; the
// first four fetch the next of w.  More rows of w would not stay: 4096 bytes apart, all take one set.
template <class Done>
inline void shorts_rows(const int16_t* x, int64_t M, const int8_t* w, int64_t n0, int64_t n1,
                        int64_t K, bool narrow, Done done) {
    if (M <= DotShorts::MOST && (narrow || K <= LANE_INPUTS))
        return matmul_rows<DotShorts>(x, apart(K), M, w, K, n0, n1, K, nullptr, done);
    const int64_t tiles = (M + 3) / 4;
    const std::unique_ptr<double[][TILE_ROWS]> total(new double[M][TILE_ROWS]);
    for (int64_t n = n0; n < n1; n += TILE_ROWS) {
        const int64_t rows = std::min<int64_t>(TILE_ROWS, n1 - n);
        std::memset(total.get(), 0, M * sizeof total[0]);
        const auto meet = [&](auto height, auto width, int64_t m, int64_t r, int64_t k) {
            constexpr int H = decltype(height)::value, W = decltype(width)::value;
            double sums[W][H];
            const auto run = [&](auto fetch) {
                dot_tile<DotShorts, int8_t, H, W, fetch>(
                    x + m * apart(K) + k, apart(K), w + (n + r) * K + k, K, TILE_ROWS * K,
                    std::min(LANE_INPUTS, K - k), sums);
            };
            if (m == 0) run(std::true_type());
            else run(std::false_type());
            for (int i = 0; i < W; ++i)
                for (int j = 0; j < H; ++j) total[m + j][r + i] += sums[i][j];
        };
        for (int64_t k = 0; k < K; k += LANE_INPUTS)
            for (int64_t tile = 0; tile < tiles; ++tile) {  // six rows are twice three
                const int64_t m = M * tile / tiles, end = M * (tile + 1) / tiles;
                unrolled<4>([&](auto i) INLINED {
                    const std::integral_constant<int, 1 + i> height;
                    const std::integral_constant<int, 1> one;
                    const std::integral_constant<int, 2> two;
                    if (end - m != height) return;
                    int64_t r = 0;
                    for (; r + 2 <= rows; r += 2) meet(height, two, m, r, k);
                    if (r < rows) meet(height, one, m, r, k);
                });
            }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t m = 0; m < M; ++m) done(n + r, m, total[m][r]);
    }
}

// Panels of shorts: the words of 32 inputs are the pairs of a row's block in its order.
struct Shorts {
    using Sum = i32v;
    using Total = double;
    static constexpr int PER_WORD = 2;
    static i32v mac(i32v acc, Word a, word_v b) {
        return add_pairs(acc, _mm256_set1_epi32(int(a)), (__m256i)b);
    }
};
inline void turn_shorts(const int8_t* w, int64_t K, int64_t n0, int64_t n1, int64_t w0, int64_t w1,
                        Word* panel) {
    turn_quads(w, K, n0, n1, 2 * w0, 2 * w1, [&](int64_t k, int side, __m256i v) INLINED {
        Word* to = panel + (k / 32 * 16 + k % 32 / 4 - w0) * PANEL + side;
        store((float*)to, (f32v)_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
        store((float*)(to + 8 * PANEL), (f32v)_mm256_srai_epi16(v, 8));
    });
}

// The numbers of 32 floats in the order of a block, n = round(from * factor): `upper` and `lower`
// halves of n = 32768 upper + lower, or where n fits one, all of it in `upper`.
template <bool HALVES>
inline void split_block(const float* from, float factor, int16_t* upper, int16_t* lower) {
    __m256i whole[4], high[4];
    for (int i = 0; i < 4; ++i) {
        whole[i] = _mm256_cvtps_epi32((__m256)(load(from + 8 * i) * factor));
        high[i] = _mm256_srai_epi32(_mm256_add_epi32(whole[i], _mm256_set1_epi32(1 << 14)), 15);
        if (HALVES) whole[i] = _mm256_sub_epi32(whole[i], _mm256_slli_epi32(high[i], 15));
    }
    const __m256i low_half = _mm256_set1_epi32(0xffff);
    const auto put = [&](const __m256i(&n)[4], int16_t* to) INLINED {
        // even numbers stand in the lower halves of pairs of words once these are shorts in order
        const auto pack = [](__m256i a, __m256i b) INLINED {
            return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        };
        const __m256i a = pack(n[0], n[1]), b = pack(n[2], n[3]);
        const auto store_to = [](int16_t* p, __m256i v) INLINED { std::memcpy(p, &v, sizeof v); };
        const auto halves = [](__m256i c, __m256i d) INLINED {
            return _mm256_permute4x64_epi64(_mm256_packus_epi32(c, d), 0xd8);
        };
        store_to(to, halves(_mm256_and_si256(a, low_half), _mm256_and_si256(b, low_half)));
        store_to(to + 16, halves(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)));
    };
    put(HALVES ? high : whole, upper);
    if (HALVES) put(whole, lower);
}

// A row as shorts, one number or two halves an input, relative to a power of two above its largest:
// x = scale * n, exact but for what is below 2^-15 (of bf16) or 2^-29 of that.  False for a row whose
// largest is more than `peak` times the root of its mean square, or that no scale fits: floats hold it
// better.
template <bool HALVES>
inline bool split_shorts(const float* from, int64_t K, float peak, int16_t* to, float* scale) {
    f32v most = {}, poison = {}, squares = {};  // 0 * NaN and 0 * infinity are NaN
    float rest[32] = {};
    const int64_t whole = K / 32 * 32;
    if (K > whole) std::memcpy(rest, from + whole, (K - whole) * sizeof(float));
    const auto each = [&](auto f) {
        for (int64_t k = 0; k < whole; k += LANES) f(load(from + k));
        for (int i = 0; i < 32; i += LANES) f(load(rest + i));
    };
    each([&](f32v v) {
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    });
    const float top = maximum(most);
    // of less or more no power of two is a float, nor is the square
    if (sum(poison) != 0 || K > MOST_INPUTS || (top != 0 && (top < 1e-28f || top > 1e28f)))
        return false;
    int exponent = 0;
    std::frexp(top, &exponent);  // top < 2^exponent
    const int bits = HALVES ? 29 : 15;  // |n| < 2^bits: a bf16 is not rounded up to it
    const float factor = std::ldexp(1.f, bits - exponent), unit = std::ldexp(1.f, -exponent);
    *scale = std::ldexp(1.f, exponent - bits);
    each([&](f32v v) { squares += (v * unit) * (v * unit); });
    const float share = top * unit;
    if (top != 0 && share * share * float(K) > peak * peak * sum(squares)) return false;
    for (int64_t k = 0; k < K; k += 32)
        split_block<HALVES>(k < whole ? from + k : rest, factor, to + k, to + apart(K) + k);
    return true;
}
#endif
