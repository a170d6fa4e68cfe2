// y = (int8(x) w^T) * scale_x * scale + bias.  Rows of x are quantized first, shared by the threads;
// then each thread takes a run of rows of w.  With VNNI, products of four int8 are added up in
// int32 by one instruction; elsewhere the same whole numbers meet in fp32.
#include <memory>
#include "dot.h"

#if defined(__AVX512VNNI__)
using Path = DotInt8;
static int32_t too_large(const int8_t* w, int64_t K) {
    i32v acc = {};
    int64_t k = 0;
    const __m512i ones = _mm512_set1_epi8(1);
    for (; k + 64 <= K; k += 64) acc = DotInt8::mac(acc, ones, DotInt8::widen(w + k));
    int32_t total = lanes_sum(acc);
    for (; k < K; ++k) total += w[k];
    return 128 * total;
}
#else
using Path = Fma;
static int32_t too_large(const int8_t*, int64_t) { return 0; }
#endif

template <class T>
static void w8a8_linear(const T* x, int64_t x_stride, const int8_t* w, const float* scale,
                        const float* bias, T* y, int64_t M, int64_t N,
                        int64_t K, int threads) {
    using X = Path::X;
    const std::unique_ptr<X[]> rows(new X[M * apart(K)]);
    const std::unique_ptr<float[]> row_scale(new float[M]);
    const auto quantize = [&](int64_t m, float* wide) {
        const T* row = x + m * x_stride;
        fill_row(wide, K, false, [&](int64_t k) { return load(row + k); },
                 [&](int64_t k) { return to_float(row[k]); });
        quantize_row(wide, K, (uint8_t*)(rows.get() + m * apart(K)), (float*)(rows.get() + m * apart(K)),
                     row_scale.get() + m);
    };
    const auto multiply = [&](int thread, int of) {
        const Share share(N, thread, of, TILE_ROWS);
        std::unique_ptr<X[]> scratch(M >= Path::WIDEN_ONCE ? new X[BLOCK_ROWS * apart(K)] : nullptr);
        for (int64_t n0 = share.begin; n0 < share.end; n0 += BLOCK_ROWS) {
            const int64_t n1 = std::min(n0 + BLOCK_ROWS, share.end);
            int32_t shift[BLOCK_ROWS];  // x stands as x + 128: this much too large
            for (int64_t n = n0; n < n1; ++n) shift[n - n0] = too_large(w + n * K, K);
            matmul_rows<Path>(rows.get(), apart(K), M, w, K, n0, n1, K, scratch.get(),
                              [&](int64_t n, int64_t m, Out<Path> sum) {
                                  const float v = float(sum - shift[n - n0]) * (row_scale[m] * scale[n]);
                                  from_float(y + m * N + n, v + (bias ? bias[n] : 0.f));
                              });
        }
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

#define ENTRY(T, name)                                                                           \
    extern "C" void w8a8_linear_##name(const T* x, int64_t x_stride, const int8_t* w,            \
                                       const float* scale, const float* bias, T* y, int64_t M,   \
                                       int64_t N, int64_t K, int threads) {                      \
        w8a8_linear(x, x_stride, w, scale, bias, y, M, N, K, threads);                           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
