// Linear layers over weights of four bits: 16 outputs side by side, so that each lane of a vector
// sums one output, nothing is added across lanes, and the weights are one stream from memory.
// packed (N / 16, K / 8, 16) uint32: eight inputs of one output, as 8 + q; nibble j holds input
// 2 (j % 4) + j / 4, so that a shift leaves pairs of inputs in the halves of a lane, and the low
// and the high nibbles of its bytes are four inputs each.  scale (N / 16, K / group, 16) bf16.
// Every result is summed in one order whatever the tile: a row of a batch has the bits of one alone.
#pragma once
#include "dot.h"

constexpr int SIDE = 16;                // outputs side by side
constexpr int PARTS = SIDE / LANES;     // vectors that hold them
// Dwords from here to what is fetched into the second-level cache, where more lines may be under way
// than into the first: of what a plain read takes, 0.97, twice as far 0.83, four times 0.79, and into
// the first 0.73.
constexpr int64_t FAR = 16 * SIDE;
constexpr int MOST_TILE = LANES == 16 ? 8 : 2;  // rows of x that meet a weight in registers
// Blocks of 16 outputs that are read together for M rows of x, as the registers allow: four streams
// keep a core's memory busy (of the bandwidth that one stream has, one block took 0.8, four took 1).
constexpr int blocks_at_once(int64_t M) {
    return LANES == 16 ? (M <= 2 ? 4 : M <= 7 ? 2 : 1) : LANES == 8 && M == 1 ? 2 : 1;
}

struct Widened {  // a sum or two for each row and block
    static constexpr int MOST = MOST_TILE;
    static constexpr int blocks(int64_t M) { return blocks_at_once(M); }
};

struct Int4 {
    const uint32_t* packed;
    const bf16* scale;
    int64_t k, group;
    const uint32_t* block(int64_t b) const { return packed + b * k * (SIDE / 8); }
    const bf16* scales(int64_t b) const { return scale + b * (k / group) * SIDE; }
};

// How weights of eight inputs meet them: `weights` widens nibble J of each lane.
struct Int4Fp32 {
    template <int J> static f32v weights(u32v v) {
#if defined(__AVX512F__)
        // shifts and tables share two of the four vector units of a Zen 4: most nibbles become the
        // last bits of a float where they stand, whose implied ones are then subtracted
        if constexpr (J > 4) {
            return weights<J - 5>((u32v)_mm512_srli_epi32((__m512i)v, 20));
        } else if constexpr (J == 0) {
            const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
            return (f32v)_mm512_permutexvar_ps((__m512i)v, levels);
        } else {
            constexpr int exponent = (127 + 23 - 4 * J) << 23;
            const __m512i bits = _mm512_ternarylogic_epi32(  // (v & 15 << 4 J) | exponent
                (__m512i)v, _mm512_set1_epi32(15 << 4 * J), _mm512_set1_epi32(exponent), 0xea);
            return (f32v)bits - float((1 << (23 - 4 * J)) + 8);
        }
#else
        return __builtin_convertvector((i32v)(v >> (4 * J) & 15), f32v) - 8.f;
#endif
    }
    template <int J> static f32v at(const float* x) { return splat(x[J % 4 * 2 + J / 4]); }
};

// out[r][m][i] = x row m . (scale * q) row 16 (b + r far) + i, for M rows of x and R blocks.
template <int M, int R>
inline void int4_tile(const float* x, int64_t x_stride, const Int4& w, int64_t b, int64_t far,
                      float out[R][M][SIDE]) {
    f32v total[R][PARTS][M] = {};
    const uint32_t* p = w.block(b);
    const bf16* scale = w.scales(b);
    const int64_t next = w.block(far) - w.packed, next_scale = w.scales(far) - w.scale;
    int64_t left = w.group;
    for (int64_t k = 0; k < w.k; k += 32) {
        f32v acc[R][PARTS][M][2] = {};  // two chains hide what an addition takes
        for (int64_t i = k; i < k + 32; i += 8, p += SIDE) {
            unrolled<R>([&](auto r) INLINED {
                __builtin_prefetch(p + r * next + FAR, 0, 2);
                unrolled<PARTS>([&](auto part) INLINED {
                    const u32v v = load_as<u32v>(p + r * next + part * LANES);
                    unrolled<8>([&](auto j) INLINED {
                        const f32v weights = Int4Fp32::weights<j>(v);
                        unrolled<M>([&](auto m) INLINED {
                            f32v& sum = acc[r][part][m][j % 2];
                            sum = fma(Int4Fp32::at<j>(x + m * x_stride + i), weights, sum);
                        });
                    });
                });
            });
        }
        unrolled<R>([&](auto r) INLINED {
            unrolled<PARTS>([&](auto part) INLINED {
                const f32v s = load(scale + r * next_scale + part * LANES);
                unrolled<M>([&](auto m) INLINED {
                    const f32v sum = acc[r][part][m][0] + acc[r][part][m][1];
                    total[r][part][m] = fma(sum, s, total[r][part][m]);
                });
            });
        });
        if (!(left -= 32)) scale += SIDE, left = w.group;
    }
    unrolled<R * PARTS * M>([&](auto i) INLINED {
        constexpr int m = i % M, part = i / M % PARTS, r = i / M / PARTS;
        store(out[r][m] + part * LANES, total[r][part][m]);
    });
}

// done(n, m, value) for outputs n0 <= n < n1 and M rows; tile(rows, blocks, first row, first block,
// far, out) computes out[blocks][rows][16], its first two arguments constants, which `Fit` chooses,
// of blocks `far` from one another: each is one of as many streams through the weights.
template <class Fit = Widened, class Tile, class Done>
inline void in_tiles(int64_t M, int64_t n0, int64_t n1, Tile tile, Done done) {
    const int64_t first = n0 / SIDE, end = (n1 + SIDE - 1) / SIDE;
    const int64_t streams = Fit::blocks(M), far = (end - first) / streams;
    const auto block = [&](auto rows, auto blocks, int64_t m0, int64_t b) {
        float out[blocks][rows][SIDE];
        tile(rows, blocks, m0, b, far, out);
        for (int r = 0; r < blocks; ++r) {
            const int64_t from = (b + r * far) * SIDE, to = std::min(n1, from + SIDE);
            for (int m = 0; m < rows; ++m)
                for (int64_t n = std::max(n0, from); n < to; ++n)
                    done(n, m0 + m, out[r][m][n - from]);
        }
    };
    for (int64_t b = first; b < end; b = b + 1 == first + far ? first + streams * far : b + 1) {
        const bool last = b >= first + streams * far;  // what the streams leave
        const auto run = [&](auto rows, int64_t m0) {
            constexpr int R = Fit::blocks(rows);
            if (last) return block(rows, std::integral_constant<int, 1>(), m0, b);
            unrolled<3>([&](auto i) INLINED {  // as many as M allows, not these rows alone
                constexpr int count = 1 << i;
                if constexpr (count <= R)
                    if (streams == count) block(rows, std::integral_constant<int, count>(), m0, b);
            });
        };
        int64_t m = 0;
        for (; m + Fit::MOST <= M; m += Fit::MOST) run(std::integral_constant<int, Fit::MOST>(), m);
        if constexpr (Fit::MOST > 2) {
            if (m + 4 <= M) run(std::integral_constant<int, 4>(), m), m += 4;
            if (m + 3 <= M) run(std::integral_constant<int, 3>(), m), m += 3;
            if (m + 2 <= M) run(std::integral_constant<int, 2>(), m), m += 2;
        }
        if (m < M) run(std::integral_constant<int, 1>(), m);
    }
}

// done(n, m, dot) for outputs n0 <= n < n1 and M rows of x.
template <class Done>
inline void int4_rows(const float* x, int64_t x_stride, int64_t M, const Int4& w, int64_t n0,
                      int64_t n1, Done done) {
    in_tiles(
        M, n0, n1,
        [&](auto rows, auto blocks, int64_t m0, int64_t b, int64_t far, auto& out) {
            int4_tile<rows, blocks>(x + m0 * x_stride, x_stride, w, b, far, out);
        },
        done);
}

// ---- activations in int8 ----------------------------------------------------------------------

// Rows of x, quantized per group: bytes in the order 0 4 1 5 2 6 3 7 of each eight, as the nibbles
// of a weight come; per group its scale, and -8 times the sum of its whole numbers.
struct Int8Rows {
    int8_t* bytes;   // (M, stride)
    float* scale;    // (M, groups)
    int32_t* shift;  // (M, groups)
    int64_t stride, groups;
};

inline void quantize_group(const float* x, int64_t n, int8_t* bytes, float* scale, int32_t* shift) {
    f32v most = {}, poison = {};  // 0 * NaN and 0 * infinity are NaN
    for (int64_t i = 0; i < n; i += LANES) {
        const f32v v = load(x + i);
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    }
    *shift = 0;
    if (sum(poison) != 0) {  // no scale fits: every result of this row is NaN
        *scale = NAN;
        std::memset(bytes, 0, n);
        return;
    }
    const float top = maximum(most);
    *scale = std::max(top / 127.f, 0x1p-126f);  // of less, no inverse is finite
    const float inverse = 1.f / *scale;
    int32_t total = 0;
    for (int64_t i = 0; i < n; i += 8) {
        float whole[8];
        for (int u = 0; u < 8; u += LANES < 8 ? LANES : 8) {
#if defined(__AVX2__)
            const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(inverse));
            _mm256_storeu_ps(whole, _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
            store(whole + u, (load(x + i + u) * inverse + 12582912.f) - 12582912.f);
#endif
        }
        for (int u = 0; u < 8; ++u) {
            const int8_t q = int8_t(whole[u / 2 + u % 2 * 4]);
            bytes[i + u] = q;
            total += q;
        }
    }
    *shift = -8 * total;
}

// acc + the products of four unsigned and four signed bytes of each lane, added.
inline i32v add_products(i32v acc, u32v w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (i32v)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)  // 15 * 127 twice fits 16 bits
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    return acc + (i32v)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
    const __m128i pairs = _mm_maddubs_epi16((__m128i)w, _mm_set1_epi32(x));
    return acc + (i32v)_mm_madd_epi16(pairs, _mm_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; ++byte)
        acc += (i32v)(w >> (8 * byte) & 255) * int32_t(int8_t(uint32_t(x) >> (8 * byte)));
    return acc;
#endif
}

// out[r][m][i] = sum over groups of (q . int8(x)) * scale_x * scale, for M quantized rows from m0 on.
template <int M, int R>
inline void int4_a8_tile(const Int8Rows& x, int64_t m0, const Int4& w, int64_t b, int64_t far,
                         float out[R][M][SIDE]) {
    f32v total[R][PARTS][M] = {};
    const uint32_t* p = w.block(b);
    const bf16* scale = w.scales(b);
    const int64_t next = w.block(far) - w.packed, next_scale = w.scales(far) - w.scale;
    const int8_t* bytes = x.bytes + m0 * x.stride;
    const float* scale_x = x.scale + m0 * x.groups;
    const int32_t* shift = x.shift + m0 * x.groups;
    for (int64_t g = 0; g < x.groups; ++g, scale += SIDE) {
        i32v acc[R][PARTS][M];
        unrolled<R * PARTS * M>([&](auto i) INLINED {
            constexpr int m = i % M, part = i / M % PARTS, r = i / M / PARTS;
            acc[r][part][m] = i32v{} + shift[m * x.groups + g];
        });
        for (const int8_t* end = bytes + w.group; bytes < end; bytes += 8, p += SIDE) {
            unrolled<R>([&](auto r) INLINED {
                __builtin_prefetch(p + r * next + FAR, 0, 2);
                unrolled<PARTS>([&](auto part) INLINED {
                    const u32v v = load_as<u32v>(p + r * next + part * LANES);
                    const u32v low = v & 0x0f0f0f0f, high = v >> 4 & 0x0f0f0f0f;
                    unrolled<M>([&](auto m) INLINED {
                        const int8_t* at = bytes + m * x.stride;
                        i32v& sum = acc[r][part][m];
                        sum = add_products(sum, low, load_as<int32_t>(at));
                        sum = add_products(sum, high, load_as<int32_t>(at + 4));
                    });
                });
            });
        }
        unrolled<R>([&](auto r) INLINED {
            unrolled<PARTS>([&](auto part) INLINED {
                const f32v s = load(scale + r * next_scale + part * LANES);
                unrolled<M>([&](auto m) INLINED {
                    const f32v sum = __builtin_convertvector(acc[r][part][m], f32v);
                    f32v& to = total[r][part][m];
                    to = fma(sum * scale_x[m * x.groups + g], s, to);
                });
            });
        });
    }
    unrolled<R * PARTS * M>([&](auto i) INLINED {
        constexpr int m = i % M, part = i / M % PARTS, r = i / M / PARTS;
        store(out[r][m] + part * LANES, total[r][part][m]);
    });
}

// done(n, m, product) for outputs n0 <= n < n1 and M rows of x.
template <class Done>
inline void int4_a8_rows(const Int8Rows& x, int64_t M, const Int4& w, int64_t n0, int64_t n1,
                         Done done) {
    in_tiles(
        M, n0, n1,
        [&](auto rows, auto blocks, int64_t m0, int64_t b, int64_t far, auto& out) {
            int4_a8_tile<rows, blocks>(x, m0, w, b, far, out);
        },
        done);
}
