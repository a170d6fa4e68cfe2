// y = (int8(x) w^T) * scale_x * scale + bias.  Rows of x are quantized first, shared by the threads;
// then each thread takes a run of rows of w.  With VNNI, products of four int8 are added up in
// int32 by one instruction; with AVX2 alone 16 of 16 bits, added two by two; elsewhere the same whole
// numbers meet in fp32.
#include <memory>
#include "panels.h"
#include "shorts.h"

#if defined(__AVX512VNNI__)
// The unit multiplies unsigned by signed bytes: weights stand as w + 128, a bit turned on the way,
// so that what each sum is too large depends on the row of x alone.
struct Path : DotInt8 {
    using DotInt8::widen;
    static constexpr int64_t NEAR = 1 << 10;
    static Vector widen(const int8_t* p) {
        return _mm512_xor_si512(load_as<Vector>(p), _mm512_set1_epi8(-128));
    }
    static i32v mac(i32v acc, Vector x, Vector w) { return DotInt8::mac(acc, w, x); }
};
static int32_t too_large(uint8_t* x, int64_t K) {  // x + 128 becomes x; returns 128 times its sum
    i32v acc = {};
    int64_t k = 0;
    const __m512i ones = _mm512_set1_epi8(1);
    for (; k + 64 <= K; k += 64) {
        const __m512i q = Path::widen((int8_t*)x + k);
        std::memcpy(x + k, &q, sizeof q);
        acc = DotInt8::mac(acc, ones, q);
    }
    int32_t total = lanes_sum(acc);
    for (; k < K; ++k) total += int8_t(x[k] ^= 128);
    return 128 * total;
}
#elif !defined(HAS_SHORTS)
using Path = Fma;
static int32_t too_large(float*, int64_t) { return 0; }
#endif

#if defined(__AVX512VNNI__)
// Many rows of x meet panels of 64 outputs.  Sums are whole: in another order they have the same bits.
constexpr int64_t MANY = 64;  // below, turning the weights costs what it saves
struct TurnedQuads : Quads {  // four x, four of weights as w + 128
    static i32v mac(i32v acc, Word x, word_v w) {
        return (i32v)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(int(x)));
    }
};
struct TurnedBytes : Bytes {};
inline word4 words(TurnedBytes, const int8_t* p) { return load_as<word4>(p) ^ 0x80808080u; }
#endif

#if defined(HAS_SHORTS)
template <class T>
static void w8a8_linear(const T* x, int64_t x_stride, const int8_t* w, const float* scale,
                        const float* bias, T* y, int64_t M, int64_t N, int64_t K, int threads) {
    const std::unique_ptr<int16_t[]> rows(new int16_t[M * apart(K)]);
    const std::unique_ptr<float[]> row_scale(new float[M]);
    const auto quantize = [&](int64_t m, float* wide) {
        const T* from = x + m * x_stride;
        int16_t* row = rows.get() + m * apart(K);
        fill_row(wide, K, false, [&](int64_t k) { return load(from + k); },
                 [&](int64_t k) { return to_float(from[k]); });
        quantize_row(wide, K, (uint8_t*)row, wide, row_scale.get() + m);
        std::memset(wide + K, 0, (apart(K) - K) * sizeof(float));
        for (int64_t k = 0; k < K; k += 32) split_block<false>(wide + k, 1.f, row + k, nullptr);
    };
    const auto multiply = [&](int thread, int of) {
        const Share share(N, thread, of, M < TURNED ? int64_t(TILE_ROWS) : PANEL);
        if (M < TURNED)
            return shorts_rows(rows.get(), M, w, share.begin, share.end, K, true,
                               [&](int64_t n, int64_t m, double sum) {
                                   const float v = float(sum) * (row_scale[m] * scale[n]);
                                   from_float(y + m * N + n, v + (bias ? bias[n] : 0.f));
                               });
        const std::unique_ptr<Word[]> scratch(new Word[panel_scratch(M, 0)]);
        panel_rows<Shorts>(
            (const Word*)rows.get(), apart(K) / 2, M, (K + 31) / 32 * 16, share.begin, share.end,
            scratch.get(),
            [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
                turn_shorts(w, K, n0, n1, w0, w1, panel);
            },
            [&](int64_t m, int64_t n, int64_t count, const double* sums) {
                float whole[PANEL];
                for (int i = 0; i < PANEL; ++i) whole[i] = float(sums[i]);
                fill_row(
                    y + m * N + n, count, false,
                    [&](int64_t i) {
                        const f32v v = load(whole + i) * (row_scale[m] * load(scale + n + i));
                        return bias ? v + load(bias + n + i) : v + 0.f;
                    },
                    [&](int64_t i) {
                        return whole[i] * (row_scale[m] * scale[n + i]) + (bias ? bias[n + i] : 0.f);
                    });
            });
    };
    const bool alone = threads <= 1 || N * K < SERIAL_ELEMENTS;
    const bool few = alone || M == 1;  // no rows to share: no barrier
    if (few) {
        const std::unique_ptr<float[]> wide(new float[apart(K)]);
        for (int64_t m = 0; m < M; ++m) quantize(m, wide.get());
    }
    if (alone) return multiply(0, 1);
#pragma omp parallel num_threads(threads)
    {
        if (!few) {
            const std::unique_ptr<float[]> wide(new float[apart(K)]);
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; ++m) quantize(m, wide.get());
        }
        multiply(omp_get_thread_num(), omp_get_num_threads());
    }
}
#else
template <class T>
static void w8a8_linear(const T* x, int64_t x_stride, const int8_t* w, const float* scale,
                        const float* bias, T* y, int64_t M, int64_t N,
                        int64_t K, int threads) {
    using X = Path::X;
    const std::unique_ptr<X[]> rows(new X[tall(M) * apart(K)]);  // panels read whole tiles
    const std::unique_ptr<float[]> row_scale(new float[M]);
    const std::unique_ptr<int32_t[]> shift(new int32_t[M]);
    const auto quantize = [&](int64_t m, float* wide) {
        const T* from = x + m * x_stride;
        X* row = rows.get() + m * apart(K);
        fill_row(wide, K, false, [&](int64_t k) { return load(from + k); },
                 [&](int64_t k) { return to_float(from[k]); });
        quantize_row(wide, K, (uint8_t*)row, (float*)row, row_scale.get() + m);
        std::memset(row + K, 0, (apart(K) - K) * sizeof(X));
        shift[m] = too_large(row, K);
    };
    const auto value = [&](int64_t n, int64_t m, Out<Path> sum) {
        return float(sum - shift[m]) * (row_scale[m] * scale[n]) + (bias ? bias[n] : 0.f);
    };
    const auto multiply = [&](int thread, int of) {
#if defined(__AVX512VNNI__)
        if (M >= MANY) {
            const Share share(N, thread, of, PANEL);
            const int64_t words = (K + 3) / 4;
            const std::unique_ptr<Word[]> scratch(new Word[panel_scratch(M, words)]);
            panel_rows<TurnedQuads>(
                (const Word*)rows.get(), apart(K) / 4, M, words, share.begin, share.end,
                scratch.get(),
                [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
                    turn<TurnedBytes>(w, K, n0, n1, w0, w1, panel);
                },
                [&](int64_t m, int64_t n, int64_t count, const float* sums) {
                    const auto* whole = (const int32_t*)sums;
                    fill_row(
                        y + m * N + n, count, false,
                        [&](int64_t i) {
                            const i32v sum = load_as<i32v>(whole + i) - shift[m];
                            const f32v v = __builtin_convertvector(sum, f32v) *
                                           (row_scale[m] * load(scale + n + i));
                            return bias ? v + load(bias + n + i) : v + 0.f;
                        },
                        [&](int64_t i) { return value(n + i, m, whole[i]); });
                });
            return;
        }
#endif
        const Share share(N, thread, of, TILE_ROWS);
        const std::unique_ptr<X[]> scratch(M >= Path::WIDEN_ONCE ? new X[BLOCK_ROWS * apart(K)]
                                                                 : nullptr);
        matmul_rows<Path>(rows.get(), apart(K), M, w, K, share.begin, share.end, K, scratch.get(),
                          [&](int64_t n, int64_t m, Out<Path> sum) {
                              from_float(y + m * N + n, value(n, m, sum));
                          });
    };
    const bool alone = threads <= 1 || N * K < SERIAL_ELEMENTS;
    const bool few = alone || M == 1;  // no rows to share: no barrier (four rows gain by sharing)
    if (few) {
        const std::unique_ptr<float[]> wide(new float[K]);
        for (int64_t m = 0; m < M; ++m) quantize(m, wide.get());
    }
    if (alone) return multiply(0, 1);
#pragma omp parallel num_threads(threads)
    {
        if (!few) {
            const std::unique_ptr<float[]> wide(new float[K]);
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; ++m) quantize(m, wide.get());
        }
        multiply(omp_get_thread_num(), omp_get_num_threads());
    }
}
#endif

#define ENTRY(T, name)                                                                           \
    extern "C" void w8a8_linear_##name(const T* x, int64_t x_stride, const int8_t* w,            \
                                       const float* scale, const float* bias, T* y, int64_t M,   \
                                       int64_t N, int64_t K, int threads) {                      \
        w8a8_linear(x, x_stride, w, scale, bias, y, M, N, K, threads);                           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
