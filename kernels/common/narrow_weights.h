// fp32 activations times weights of one or two bytes, at the rate at which a cache gives the
// weights: the activations are arranged once so that widening a weight takes no shuffle, or none at
// all.
#pragma once
#include "dot.h"

// ---- bf16 weights: the two halves of a word are two floats -----------------------------------
// A row of x stands in blocks of 2 LANES, those with even index first; padded with zeros to whole
// blocks.  A shift makes floats of a word's lower half, a mask of its upper: instructions that
// leave the multipliers alone, where a widening load keeps the shuffle unit busy for two cycles.
struct DotHalves : Plain {
    struct Vector {
        f32v even, odd;
    };
    using X = float;
    using Sum = f32v;
    using Total = float;
    static constexpr int STEP = 2 * LANES;
    static constexpr bool PADDED = true;
    static constexpr int MOST = LANES == 16 ? 4 : 2;
    static constexpr int WIDEN_ONCE = 1 << 30;
    static Vector widen(const float* x) { return {load(x), load(x + LANES)}; }
    static Vector widen(const bf16* p) {
        const u32v pairs = load_as<u32v>(p);
        return {(f32v)(pairs << 16), (f32v)(pairs & 0xffff0000)};
    }
    static f32v mac(f32v acc, const Vector& x, const Vector& w) {
        return fma(x.odd, w.odd, fma(x.even, w.even, acc));
    }
};

inline void split_halves(const float* from, int64_t K, float* to) {
    i32v even, odd;
    for (int i = 0; i < LANES; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    for (int64_t k = 0; k < K; k += 2 * LANES) {
        float padded[2 * LANES] = {};
        const float* x = from + k;
        if (k + 2 * LANES > K) x = (float*)std::memcpy(padded, x, (K - k) * sizeof(float));
        const f32v a = load(x), b = load(x + LANES);
        store(to + k, __builtin_shuffle(a, b, even));
        store(to + k + LANES, __builtin_shuffle(a, b, odd));
    }
}

// ---- int8 weights: activations of 24 bits, as three bytes -------------------------------------
#if defined(__AVX512VNNI__)
// x = scale * (n - 2^23) with whole n < 2^24: as exact, for the largest of a row, as fp32 itself.
// Each byte of n meets the weights in an instruction that multiplies 64 of them, which leaves
// nothing to widen: 3 instructions for 64 weights, where floats take 4 and as many conversions.
// A row of x stands in blocks of 64: the upper bytes, the middle ones, the lower ones.
struct DotBytes : Plain {
    struct Vector {
        __m512i upper, middle, lower;
    };
    struct Sum {
        i32v upper, middle, lower;
    };
    using Total = double;  // the sum of n w: whole numbers up to 2^53 are exact
    using X = uint8_t;
    static constexpr int STEP = 64, PLANES = 3, MOST = 2, WIDEN_ONCE = 1 << 30;
    static constexpr bool PADDED = true;
    static Vector widen(const uint8_t* x) {
        return {load_as<__m512i>(x), load_as<__m512i>(x + 64), load_as<__m512i>(x + 128)};
    }
    static __m512i widen(const int8_t* p) {
        __m512i w = load_as<__m512i>(p);
        asm("" : "+v"(w));  // loaded once, not by each of the three instructions
        return w;
    }
    static Sum mac(const Sum& acc, const Vector& x, __m512i w) {
        return {(i32v)_mm512_dpbusd_epi32((__m512i)acc.upper, x.upper, w),
                (i32v)_mm512_dpbusd_epi32((__m512i)acc.middle, x.middle, w),
                (i32v)_mm512_dpbusd_epi32((__m512i)acc.lower, x.lower, w)};
    }
    // x . w, given the sum of the weights
    static float value(double total, int32_t weights, float scale) {
        return float(total - 8388608. * weights) * scale;
    }
};
inline void lanes_sums(const DotBytes::Sum (&v)[TILE_ROWS], double* out) {
    i32v upper[TILE_ROWS];
    f32v rest[TILE_ROWS];
    unrolled<TILE_ROWS>([&](auto r) INLINED {
        upper[r] = v[r].upper;
        rest[r] = fma(__builtin_convertvector(v[r].middle, f32v), splat(256.f),
                      __builtin_convertvector(v[r].lower, f32v));
    });
    alignas(16) int32_t whole[TILE_ROWS];
    alignas(16) float part[TILE_ROWS];
    lanes_sums(upper, whole);
    lanes_sums(rest, part);
    _mm256_storeu_pd(
        out, _mm256_add_pd(_mm256_mul_pd(_mm256_cvtepi32_pd(_mm_load_si128((const __m128i*)whole)),
                                         _mm256_set1_pd(65536.)),
                           _mm256_cvtps_pd(_mm_load_ps(part))));
}

// to: 3 bytes per activation, K rounded up to 64: the upper ones of each 64 `block` after those of
// the 64 before, the middle and the lower ones one and two `plane`s further.  A row with NaN or
// infinity has the scale NaN.
inline void split_bytes(const float* from, int64_t K, uint8_t* to, float* scale,
                        int64_t block = 192, int64_t plane = 64) {
    f32v most = {}, poison = {};  // 0 * NaN and 0 * infinity are NaN
    const auto some_of = [&](int64_t k) INLINED {
        if (k + LANES <= K) return load(from + k);
        float padded[LANES] = {};
        if (k < K) std::memcpy(padded, from + k, (K - k) * sizeof(float));
        return load(padded);
    };
    for (int64_t k = 0; k < K; k += LANES) {
        const f32v v = some_of(k);
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    }
    const float top = maximum(most);
    const bool finite = sum(poison) == 0;
    constexpr float MOST = 8388600.f;  // its products may be rounded up and stay below 2^23
    const bool some = top > 1e-30f;    // of less, no inverse is finite
    *scale = !finite ? NAN : some ? top / MOST : 1.f;
    const float inverse = finite && some ? MOST / top : 0.f;
    for (int64_t k = 0; k < K; k += 64)
        for (int64_t i = 0; i < 64; i += LANES) {
            const f32v v = finite ? some_of(k + i) : f32v{};
            const __m512i n = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)(v * inverse)),
                                               _mm512_set1_epi32(1 << 23));
            uint8_t* at = to + k / 64 * block + i;
            _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(_mm512_srli_epi32(n, 16)));
            _mm_storeu_si128((__m128i*)(at + plane), _mm512_cvtepi32_epi8(_mm512_srli_epi32(n, 8)));
            _mm_storeu_si128((__m128i*)(at + 2 * plane), _mm512_cvtepi32_epi8(n));
        }
}

// The same without a sum of the weights: x = scale * n, n in two signed bytes; weights as w + 128,
// a bit turned on the way, so that what a sum is too large depends on the row of x alone.
// A row of x stands in blocks of 64, upper bytes first, and ends in what `Ending` says.
template <int DIGITS> struct DotDigits : Plain {
    struct Vector {
        __m512i digit[DIGITS];
    };
    struct Sum {
        i32v digit[DIGITS];
    };
    using Total = int64_t;  // the sum of n (w + 128), exact
    using X = uint8_t;
    static constexpr int STEP = 64, PLANES = DIGITS, MOST = 3;
    static constexpr int64_t NEAR = 1 << 10;
    static constexpr int WIDEN_ONCE = 1 << 30;
    static constexpr bool PADDED = true;
    static Vector widen(const uint8_t* x) {
        Vector v;
        unrolled<DIGITS>([&](auto d) INLINED { v.digit[d] = load_as<__m512i>(x + 64 * d); });
        return v;
    }
    static __m512i widen(const int8_t* p) {
        return _mm512_xor_si512(load_as<__m512i>(p), _mm512_set1_epi8(-128));
    }
    static Sum mac(Sum acc, const Vector& x, __m512i w) {
        unrolled<DIGITS>([&](auto d) INLINED {
            acc.digit[d] = (i32v)_mm512_dpbusd_epi32((__m512i)acc.digit[d], w, x.digit[d]);
        });
        return acc;
    }
};
inline void lanes_sums(const DotDigits<2>::Sum (&v)[TILE_ROWS], int64_t* out) {
    alignas(16) int32_t whole[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; ++r) out[r] = 0;
    for (int d = 0; d < 2; ++d) {
        i32v digit[TILE_ROWS];
        unrolled<TILE_ROWS>([&](auto r) INLINED { digit[r] = v[r].digit[d]; });
        lanes_sums(digit, whole);
        for (int r = 0; r < TILE_ROWS; ++r) out[r] = 256 * out[r] + whole[r];
    }
}
constexpr int64_t MOST_INPUTS = 1 << 16;  // sums of so many products fit 32 bits

struct Ending {  // of a row of digits
    float scale;
    int64_t too_large;  // 128 times the sum of n
};
inline int64_t ending_at(int64_t K, int digits) { return (K + 63) / 64 * 64 * digits; }

// Digits of a row, but of one whose largest number is more than `peak` times the root of its mean
// square, or has no scale: what they round off would be more than what floats do.
template <int DIGITS> inline bool split_row(const float* from, int64_t K, float peak, uint8_t* to) {
    constexpr float LEVELS = 32639.f;  // two signed bytes hold them
    f32v most = {}, squares = {};
    const auto some_of = [&](int64_t k) INLINED {
        if (k + LANES <= K) return load(from + k);
        float padded[LANES] = {};
        if (k < K) std::memcpy(padded, from + k, (K - k) * sizeof(float));
        return load(padded);
    };
    f32v poison = {};  // 0 * NaN and 0 * infinity are NaN
    for (int64_t k = 0; k < K; k += LANES) {
        const f32v v = some_of(k);
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    }
    const float top = maximum(most);
    if (sum(poison) != 0 || K > MOST_INPUTS || (top != 0 && top <= 1e-30f)) return false;
    const float inverse = top != 0 ? LEVELS / top : 0.f, unit = top != 0 ? 1.f / top : 0.f;
    i32v total = {};
    int64_t all = 0;
    for (int64_t k = 0; k < K; k += 64) {
        for (int64_t i = 0; i < 64; i += LANES) {
            const f32v v = some_of(k + i);
            squares += (v * unit) * (v * unit);
            __m512i n = _mm512_cvtps_epi32((__m512)(v * inverse));
            total += (i32v)n;
            unrolled<DIGITS>([&](auto d) INLINED {
                uint8_t* at = to + k * DIGITS + 64 * (DIGITS - 1 - d) + i;
                _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(n));
                n = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
            });
        }
        if (k % 2048 == 1984 || k + 64 >= K) {  // 128 of them fit 32 bits
            alignas(64) int32_t lane[LANES];
            std::memcpy(lane, &total, sizeof lane);
            for (int i = 0; i < LANES; ++i) all += lane[i];
            total = i32v{};
        }
    }
    const Ending ending{top != 0 ? top / LEVELS : 0.f, 128 * all};
    std::memcpy(to + ending_at(K, DIGITS), &ending, sizeof ending);
    return float(K) <= peak * peak * sum(squares) || top == 0;
}
#endif
