// Activations as whole numbers times weights of four bits, at the rate at which memory gives the
// weights: x = scale * n, a scale for each row and group of inputs, n in two or three signed bytes.
// Each byte meets the nibbles in an instruction that adds up four products of a lane: 4 or 6 of
// them for 128 weights, where floats take 8 and as many conversions.  Sums within a group are exact.
#pragma once
#include "int4.h"

constexpr int64_t digits_bytes(int64_t K) { return 4 * apart(K); }  // of a row of x

#if defined(__AVX512VNNI__)
constexpr float MOST_OF_DIGITS[] = {0.f, 127.f, 32639.f, 8355700.f};  // of |n|; products round up
// Of each eight inputs a row holds the upper bytes, then the lower ones, in the order
// 0 4 1 5 2 6 3 7 as the nibbles of a weight come; then, from byte DIGITS * apart(K) on, per group
// and digit -8 times the digits' sum, which makes the weights' levels 0 .. 15 those of -8 .. 7, and
// the scale.

// Whether digits hold a row as exactly as floats do: it is finite, and no inverse of a scale is not.
inline bool fits_digits(const float* x, int64_t K) {
    f32v most = {}, poison = {};  // 0 * NaN and 0 * infinity are NaN
    for (int64_t k = 0; k < K; k += LANES) {
        const f32v v = load(x + k);
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    }
    const float top = maximum(most);
    return sum(poison) == 0 && (top == 0 || top > 1e-18f);
}

// to: the row of digits.  The scale of a group with NaN or infinity is NaN; one whose numbers are
// all below 1e-30 counts as zeros.
template <int DIGITS>
inline void split_digits(const float* from, int64_t K, int64_t group, uint8_t* to) {
    const __m512i order =
        _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    auto* shift = (int32_t*)(to + DIGITS * apart(K));
    for (int64_t k = 0; k < K;) {
        const int64_t end = k + group;
        f32v most = {}, poison = {};  // 0 * NaN and 0 * infinity are NaN
        for (int64_t i = k; i < end; i += LANES) {
            const f32v v = load(from + i);
            most = larger(most, larger(v, -v));
            poison += v * 0.f;
        }
        const float top = maximum(most);
        const bool finite = sum(poison) == 0, some = top > 1e-30f;  // of less, no inverse is finite
        const float inverse = finite && some ? MOST_OF_DIGITS[DIGITS] / top : 0.f;
        const float scale = !finite ? NAN : some ? top / MOST_OF_DIGITS[DIGITS] : 0.f;
        __m512i total[DIGITS + 1] = {};  // of n, and of what is left of it without its lower bytes
        for (; k < end; k += LANES, to += 2 * 8 * DIGITS) {
            const f32v v = finite ? load(from + k) * inverse : f32v{};
            __m512i n = _mm512_permutexvar_epi32(order, _mm512_cvtps_epi32((__m512)v));
            unrolled<DIGITS>([&](auto i) INLINED {
                constexpr int d = DIGITS - 1 - i;
                total[d] = _mm512_add_epi32(total[d], n);
                const __m128i bytes = _mm512_cvtepi32_epi8(n);
                _mm_storel_epi64((__m128i*)(to + 8 * d), bytes);
                _mm_storel_epi64((__m128i*)(to + 8 * (DIGITS + d)), _mm_srli_si128(bytes, 8));
                n = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
            });
        }
        int32_t above = 0;
        for (int d = 0; d < DIGITS; ++d) {
            const int32_t sum = _mm512_reduce_add_epi32(total[d]);
            *shift++ = -8 * (sum - 256 * above);
            above = sum;
        }
        std::memcpy(shift++, &scale, sizeof scale);
    }
}

template <int DIGITS> struct Digits {  // so many sums for each row and block
    static constexpr int MOST = DIGITS == 3 ? 6 : 8;
    static constexpr int blocks(int64_t M) { return M == 1 ? 4 : M <= 6 - DIGITS ? 2 : 1; }
};

// out[r][m][i] = x row m . (scale * q) row 16 (b + r far) + i, for M rows `stride` bytes apart.
template <int DIGITS, int M, int R>
inline void int4_digits_tile(const uint8_t* x, int64_t stride, const Int4& w, int64_t b,
                             int64_t far, float out[R][M][SIDE]) {
    f32v total[R][M] = {};
    const uint32_t* p = w.block(b);
    const bf16* scale = w.scales(b);
    const int64_t next = w.block(far) - w.packed, next_scale = w.scales(far) - w.scale;
    const uint8_t* shift = x + DIGITS * apart(w.k);
    for (int64_t g = 0; g < w.k / w.group; ++g, scale += SIDE, shift += 4 * (DIGITS + 1)) {
        __m512i acc[R][M][DIGITS];
        unrolled<R * M * DIGITS>([&](auto i) INLINED {
            constexpr int d = i % DIGITS, m = i / DIGITS % M, r = i / DIGITS / M;
            acc[r][m][d] = _mm512_set1_epi32(load_as<int32_t>(shift + m * stride + 4 * d));
        });
        for (const uint8_t* end = x + w.group * DIGITS; x < end; x += 8 * DIGITS, p += SIDE) {
            unrolled<R>([&](auto r) INLINED {
                __builtin_prefetch(p + r * next + FAR, 0, 2);
                const u32v v = load_as<u32v>(p + r * next);
                const __m512i half[2] = {(__m512i)(v & 0x0f0f0f0f), (__m512i)(v >> 4 & 0x0f0f0f0f)};
                unrolled<2 * M * DIGITS>([&](auto i) INLINED {
                    constexpr int d = i % DIGITS, h = i / DIGITS % 2, m = i / DIGITS / 2;
                    const auto four = load_as<int32_t>(x + m * stride + 8 * d + 4 * h);
                    __m512i& sum = acc[r][m][d];
                    sum = _mm512_dpbusd_epi32(sum, half[h], _mm512_set1_epi32(four));
                });
            });
        }
        unrolled<R>([&](auto r) INLINED {
            const f32v s = load(scale + r * next_scale);
            unrolled<M>([&](auto m) INLINED {
                const auto scale_x = load_as<float>(shift + m * stride + 4 * DIGITS);
                const __m512i(&sum)[DIGITS] = acc[r][m];
                const __m512i lower = _mm512_add_epi32(
                    _mm512_slli_epi32(sum[DIGITS - 2], 8), sum[DIGITS - 1]);  // below 2^26
                f32v n = __builtin_convertvector((i32v)lower, f32v);
                if constexpr (DIGITS == 3)
                    n = fma(__builtin_convertvector((i32v)sum[0], f32v), splat(65536.f), n);
                total[r][m] = fma(n * scale_x, s, total[r][m]);
            });
        });
    }
    unrolled<R * M>([&](auto i) INLINED { store(out[i / M][i % M], total[i / M][i % M]); });
}

// done(n, m, dot) for outputs n0 <= n < n1 and M rows of x.
template <int DIGITS, class Done>
inline void int4_digits_rows(const uint8_t* x, int64_t stride, int64_t M, const Int4& w,
                             int64_t n0, int64_t n1, Done done) {
    in_tiles<Digits<DIGITS>>(
        M, n0, n1,
        [&](auto rows, auto blocks, int64_t m0, int64_t b, int64_t far, auto& out) {
            int4_digits_tile<DIGITS, rows, blocks>(x + m0 * stride, stride, w, b, far, out);
        },
        done);
}
#endif
