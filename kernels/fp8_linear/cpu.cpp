// y = (e4m3(x) w^T) * scale_x * scale + bias, emulated: no CPU multiplies e4m3.  Every e4m3 is a bf16,
// and products of two are exact in fp32; so rows of x are rounded to e4m3 but kept in bf16 (fp32
// where the processor does not multiply bf16), and w, read as bytes, is widened on its way.
#include <memory>
#include "panels.h"

struct e4m3 { uint8_t bits; };

// Lanes that end in the bits of an e4m3, the others its sign, as floats.
inline f32v from_e4m3(i32v bits) {
    // sign, exponent and mantissa at their places, the exponent 120 too small: below the smallest
    // normal too
    const f32v v = (f32v)(bits << 20 & int(0x87f00000)) * 0x1p120f;
    return choose((bits & 0x7f) == 0x7f, splat(NAN), v);
}

inline f32v load(const e4m3* p) {
#if defined(__AVX512F__)
    const i32v bits = (i32v)_mm512_cvtepi8_epi32(load_as<__m128i>(p));
#elif defined(__AVX2__)
    const i32v bits = (i32v)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    i32v bits;
    for (int i = 0; i < LANES; ++i) bits[i] = int8_t(p[i].bits);
#endif
    return from_e4m3(bits);
}

#if defined(__AVX512BF16__)
// The bf16 of e4m3 magnitudes: 127 is the only NaN.
struct Table {
    alignas(64) uint16_t at[128];
    constexpr Table() : at() {
        for (int i = 0; i < 128; ++i) at[i] = uint16_t((i << 4) + (120 << 7));
        for (int i = 0; i < 8; ++i) {  // i / 512: no leading one
            const int lead = i >= 4 ? 2 : i >= 2 ? 1 : 0;
            at[i] = i ? uint16_t((127 - 9 + lead) << 7 | ((i << (7 - lead)) & 0x7f)) : 0;
        }
        at[127] = 0x7fc0;
    }
};
constexpr Table WIDE;

struct Path : DotBf16 {
    static constexpr int WIDEN_ONCE = 9;  // a table costs more than reading the result
    using DotBf16::widen;
    static Vector widen(const e4m3* p) {
        const __m512i bits = _mm512_cvtepu8_epi16(load_as<__m256i>(p));
        const __m512i* table = reinterpret_cast<const __m512i*>(WIDE.at);
        const __m512i small = _mm512_permutex2var_epi16(table[0], bits, table[1]);
        const __m512i large = _mm512_permutex2var_epi16(table[2], bits, table[3]);
        const __m512i magnitude =
            _mm512_mask_blend_epi16(_mm512_test_epi16_mask(bits, _mm512_set1_epi16(0x40)), small, large);
        // a | b & c
        return (Vector)_mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi16(bits, 8),
                                                 _mm512_set1_epi16(short(0x8000)), 0xf8);
    }
};
#else
using Path = Fma;
#endif
using X = Path::X;

#if defined(HAS_TURN_QUADS)
constexpr int64_t MANY = 8;  // rows from which panels are faster: sums stand in another order then
#endif

// v to the nearest e4m3, of two the even one; |v| is at most 448 and a little.
inline f32v rounded(f32v v) {
    // a number is added at which floats are as far apart as e4m3 are at v: an eighth of v's power of
    // two, and of 2^-6 below that
    const f32v power = larger((f32v)((i32v)v & 0x7f800000), splat(0x1p-6f));
    const f32v shift = power * 0x1.8p20f;
    return (v + shift) - shift;
}

template <class T> static void quantize(const T* from, int64_t K, X* to, float* scale) {
    f32v most = {}, poison = {};  // 0 * NaN and 0 * infinity are NaN
    const auto each = [&](auto f) {
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) f(k, load(from + k), LANES);
        if (k == K) return;
        float rest[LANES] = {};
        for (int64_t i = k; i < K; ++i) rest[i - k] = to_float(from[i]);
        f(k, load(rest), int(K - k));
    };
    each([&](int64_t, f32v v, int) {
        most = larger(most, larger(v, -v));
        poison += v * 0.f;
    });
    if (sum(poison) != 0) {  // such a row has no scale: every result of it is NaN
        *scale = NAN;
        std::memset(to, 0, K * sizeof(X));
        return;
    }
    *scale = std::max(maximum(most) / 448.f, 0x1p-120f);
    const float inverse = 1.f / *scale;
    each([&](int64_t k, f32v v, int n) {
        X wide[LANES];
        store(wide, rounded(v * inverse));
        std::memcpy(to + k, wide, n * sizeof(X));
    });
}

template <class T>
static void fp8_linear(const T* x, int64_t x_stride, const e4m3* w, const float* scale,
                       const float* bias, T* y, int64_t M, int64_t N, int64_t K, int threads) {
    const std::unique_ptr<X[]> rows(new X[M * apart(K)]);
    const std::unique_ptr<float[]> row_scale(new float[M]);
    const auto quantize_row = [&](int64_t m) {
        quantize(x + m * x_stride, K, rows.get() + m * apart(K), row_scale.get() + m);
    };
    const auto multiply = [&](int thread, int of) {
#if defined(HAS_TURN_QUADS)
        if (M >= MANY) {
            const Share share(N, thread, of, PANEL);
            const std::unique_ptr<Word[]> scratch(new Word[panel_scratch(M, K)]);
            return panel_rows<Singles>(
                (const Word*)rows.get(), apart(K), M, K, share.begin, share.end, scratch.get(),
                [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
                    turn_quads(w, K, n0, n1, w0, w1, [&](int64_t k, int side, __m256i v) INLINED {
                        float* to = (float*)panel + (k - w0) * PANEL + side;
                        unrolled<4>([&](auto i) INLINED {
                            store(to + i * PANEL, from_e4m3((i32v)_mm256_slli_epi32(v, 24 - 8 * i) >> 24));
                        });
                    });
                },
                [&](int64_t m, int64_t n, int64_t count, const float* sums) {
                    fill_row(
                        y + m * N + n, count, false,
                        [&](int64_t i) {
                            const f32v v = load(sums + i) * (row_scale[m] * load(scale + n + i));
                            return bias ? v + load(bias + n + i) : v + 0.f;
                        },
                        [&](int64_t i) {
                            return sums[i] * (row_scale[m] * scale[n + i]) + (bias ? bias[n + i] : 0.f);
                        });
                });
        }
#endif
        const Share share(N, thread, of, TILE_ROWS);
        std::unique_ptr<X[]> scratch(M >= Path::WIDEN_ONCE ? new X[BLOCK_ROWS * apart(K)] : nullptr);
        matmul_rows<Path>(rows.get(), apart(K), M, w, K, share.begin, share.end, K, scratch.get(),
                          [&](int64_t n, int64_t m, float sum) {
                              const float v = sum * (row_scale[m] * scale[n]);
                              from_float(y + m * N + n, v + (bias ? bias[n] : 0.f));
                          });
    };
    const bool alone = threads <= 1 || N * K < SERIAL_ELEMENTS;
    const bool few = alone || M * K < SERIAL_ELEMENTS;  // no rows to share: no barrier after them
    if (few)
        for (int64_t m = 0; m < M; ++m) quantize_row(m);
    if (alone) return multiply(0, 1);
#pragma omp parallel num_threads(threads)
    {
        if (!few) {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; ++m) quantize_row(m);
        }
        multiply(omp_get_thread_num(), omp_get_num_threads());
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" void fp8_linear_emulated_##name(const T* x, int64_t x_stride, const e4m3* w,      \
                                               const float* scale, const float* bias, T* y,      \
                                               int64_t M, int64_t N, int64_t K, int threads) {   \
        fp8_linear(x, x_stride, w, scale, bias, y, M, N, K, threads);                            \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
