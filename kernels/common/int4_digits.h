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
#elif defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_INT4_DIGITS 1
constexpr float MOST_OF_DIGITS[] = {0.f, 127.f, 32639.f, 8355700.f};  // of |n|; products round up

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

// A row of digits stands as with AVX-512: of each eight inputs the upper bytes first, in the order
// 0 4 1 5 2 6 3 7; then per group and digit -8 times the digits' sum, and the scale.
template <int DIGITS>
inline void split_digits(const float* from, int64_t K, int64_t group, uint8_t* to) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);  // the lower byte of each word
    auto* shift = (int32_t*)(to + DIGITS * apart(K));
    for (int64_t k = 0; k < K;) {
        const int64_t end = k + group;
        f32v most = {};
        for (int64_t i = k; i < end; i += LANES) {
            const f32v v = load(from + i);
            most = larger(most, larger(v, -v));
        }
        const float top = maximum(most);
        const bool some = top > 1e-30f;  // of less, no inverse is finite
        const float inverse = some ? MOST_OF_DIGITS[DIGITS] / top : 0.f;
        const float scale = some ? top / MOST_OF_DIGITS[DIGITS] : 0.f;
        i32v total[DIGITS + 1] = {};  // of n, and of what is left of it without its lower bytes
        for (; k < end; k += 8, to += 8 * DIGITS) {
            const __m256 v = (__m256)(load(from + k) * inverse);
            i32v n = (i32v)_mm256_permutevar8x32_epi32(_mm256_cvtps_epi32(v), order);
            unrolled<DIGITS>([&](auto i) INLINED {
                constexpr int d = DIGITS - 1 - i;
                total[d] += n;
                const __m256i bytes = _mm256_shuffle_epi8((__m256i)n, lowest);
                const int32_t half[2] = {_mm256_extract_epi32(bytes, 0),
                                         _mm256_extract_epi32(bytes, 4)};
                std::memcpy(to + 8 * d, half, 8);
                n = (n + 128) >> 8;
            });
        }
        int32_t above = 0;
        for (int d = 0; d < DIGITS; ++d) {
            int32_t sum = 0;
            for (int i = 0; i < LANES; ++i) sum += total[d][i];
            *shift++ = -8 * (sum - 256 * above);
            above = sum;
        }
        std::memcpy(shift++, &scale, sizeof scale);
    }
}

// acc + the products of 32 unsigned and signed bytes, added two by two in 16 bits: as one piece, for
// the compiler would multiply ahead and leave sums in memory.
INLINED inline __m256i add_bytes(__m256i acc, __m256i levels, __m256i digits) {
    __m256i products;
    asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0"
        : "+x"(acc), "=&x"(products) : "x"(digits), "x"(levels));
    return acc;
}

template <int DIGITS> struct DigitRows {  // as `split_digits` leaves them
    const uint8_t* x;
    int64_t stride, K;
    const uint8_t* bytes(int64_t m) const { return x + m * stride; }
    const int32_t* ending(int64_t m, int64_t g) const {
        return (const int32_t*)(x + m * stride + DIGITS * apart(K)) + g * (DIGITS + 1);
    }
    int32_t shift(int64_t m, int64_t g, int d) const { return ending(m, g)[d]; }
    float scale(int64_t m, int64_t g) const { return load_as<float>(ending(m, g) + DIGITS); }
};
struct OneDigit {  // as `quantize_group` leaves them
    const Int8Rows& x;
    const uint8_t* bytes(int64_t m) const { return (const uint8_t*)x.bytes + m * x.stride; }
    int32_t shift(int64_t m, int64_t g, int) const { return x.shift[m * x.groups + g]; }
    float scale(int64_t m, int64_t g) const { return x.scale[m * x.groups + g]; }
};

struct ByDigits {
    static constexpr int MOST = 8;
    static constexpr int blocks(int64_t M) { return M == 1 ? 4 : M == 2 ? 2 : 1; }
};

// out[r][m][i] = x row m0 + m . (scale * q) row 16 (b + r far) + i.  Of 32 inputs 8 sums of two
// products, each at most 2 * 15 * 128, fit 16 bits.
template <int DIGITS, int M, int R, class Rows>
inline void int4_digits_tile(const Rows& x, int64_t m0, const Int4& w, int64_t b, int64_t far,
                             float out[R][M][SIDE]) {
    constexpr int SOME = DIGITS == 1 ? 4 : 2;  // rows whose sums fit the registers
    const __m256i ones = _mm256_set1_epi16(1), levels = _mm256_set1_epi8(15);
    f32v total[R][M][PARTS] = {};
    const uint32_t* p = w.block(b);
    const bf16* scale = w.scales(b);
    const int64_t next = w.block(far) - w.packed, next_scale = w.scales(far) - w.scale;
    const uint8_t* rows[M];
    for (int m = 0; m < M; ++m) rows[m] = x.bytes(m0 + m);
    int64_t at = 0;  // in a row of digits
    for (int64_t g = 0; g < w.k / w.group; ++g, scale += SIDE) {
        i32v sums[R][M][DIGITS][PARTS];
        for (int m = 0; m < M; ++m)
            for (int d = 0; d < DIGITS; ++d) {
                const i32v start = i32v{} + x.shift(m0 + m, g, d);
                for (int r = 0; r < R; ++r)
                    for (int part = 0; part < PARTS; ++part) sums[r][m][d][part] = start;
            }
        for (int64_t i = 0; i < w.group; i += 32, p += 4 * SIDE, at += 32 * DIGITS) {
            unrolled<R>([&](auto r) INLINED {
                __m256i half[4][2][PARTS];
                unrolled<4>([&](auto word) INLINED {
                    const uint32_t* from = p + r * next + word * SIDE;
                    __builtin_prefetch(from + FAR, 0, 2);
                    unrolled<PARTS>([&](auto part) INLINED {
                        const auto v = load_as<__m256i>(from + part * LANES);
                        half[word][0][part] = _mm256_and_si256(v, levels);
                        half[word][1][part] = _mm256_and_si256(_mm256_srli_epi16(v, 4), levels);
                    });
                });
                unrolled<(M + SOME - 1) / SOME>([&](auto tile) INLINED {
                    constexpr int first = tile * SOME, count = M - first < SOME ? M - first : SOME;
                    __m256i acc[count][DIGITS][PARTS] = {};
                    unrolled<4 * 2 * count * DIGITS>([&](auto j) INLINED {
                        constexpr int d = j % DIGITS, m = j / DIGITS % count,
                                      h = j / DIGITS / count % 2, word = j / DIGITS / count / 2;
                        const auto four = _mm256_set1_epi32(load_as<int32_t>(
                            rows[first + m] + at + word * 8 * DIGITS + 8 * d + 4 * h));
                        unrolled<PARTS>([&](auto part) INLINED {
                            acc[m][d][part] = add_bytes(acc[m][d][part], half[word][h][part], four);
                        });
                    });
                    unrolled<count * DIGITS * PARTS>([&](auto j) INLINED {
                        constexpr int part = j % PARTS, d = j / PARTS % DIGITS, m = j / PARTS / DIGITS;
                        sums[r][first + m][d][part] +=
                            (i32v)_mm256_madd_epi16(acc[m][d][part], ones);
                    });
                });
            });
        }
        unrolled<R>([&](auto r) INLINED {
            unrolled<PARTS>([&](auto part) INLINED {
                const f32v s = load(scale + r * next_scale + part * LANES);
                for (int m = 0; m < M; ++m) {
                    const auto& sum = sums[r][m];
                    i32v lower = sum[DIGITS - 1][part];
                    if constexpr (DIGITS > 1) lower += sum[DIGITS - 2][part] << 8;  // below 2^26
                    f32v n = __builtin_convertvector(lower, f32v);
                    if constexpr (DIGITS == 3)
                        n = fma(__builtin_convertvector(sum[0][part], f32v), splat(65536.f), n);
                    total[r][m][part] = fma(n * x.scale(m0 + m, g), s, total[r][m][part]);
                }
            });
        });
    }
    unrolled<R * M * PARTS>([&](auto i) INLINED {
        constexpr int part = i % PARTS, m = i / PARTS % M, r = i / PARTS / M;
        store(out[r][m] + part * LANES, total[r][m][part]);
    });
}

// done(n, m, dot) for outputs n0 <= n < n1 and M rows of x.
template <int DIGITS, class Rows, class Done>
inline void int4_digits_rows(const Rows& x, int64_t M, const Int4& w, int64_t n0, int64_t n1,
                             Done done) {
    in_tiles<ByDigits>(
        M, n0, n1,
        [&](auto rows, auto blocks, int64_t m0, int64_t b, int64_t far, auto& out) {
            int4_digits_tile<DIGITS, rows, blocks>(x, m0, w, b, far, out);
        },
        done);
}
#endif
