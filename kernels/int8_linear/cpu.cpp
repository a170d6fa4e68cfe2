// y = (x w^T) * scale + bias; w int8 (N, K) row-major, one scale per output.  At small batch the
// time is that of reading w: it is read once, in order, each thread a run of rows.
// fp32 activations meet weights in fp32; bf16 ones, where the processor multiplies bf16, in bf16
// pairs (exact products, sums in fp32).
#include <memory>
#include "dot.h"

template <class D, class T>
static void int8_linear(const T* x, int64_t x_stride, const int8_t* w, const float* scale,
                        const float* bias, T* y, int64_t M, int64_t N, int64_t K, int threads) {
    using X = typename D::X;
    const X* rows;
    std::unique_ptr<X[]> converted;
    if constexpr (std::is_same_v<X, T>) {
        rows = x;
    } else {  // activations of another type are widened once: M * K numbers
        converted.reset(new X[M * apart(K)]);
        for (int64_t m = 0; m < M; ++m)
            fill_row(converted.get() + m * apart(K), K, false,
                     [&](int64_t k) { return load(x + m * x_stride + k); },
                     [&](int64_t k) { return to_float(x[m * x_stride + k]); });
        rows = converted.get();
        x_stride = apart(K);
    }
    const auto run = [&](int thread, int of) {
        const Share share(N, thread, of, TILE_ROWS);
        std::unique_ptr<X[]> scratch(M >= D::WIDEN_ONCE ? new X[BLOCK_ROWS * apart(K)] : nullptr);
        matmul_rows<D>(rows, x_stride, M, w, K, share.begin, share.end, K, scratch.get(),
                       [&](int64_t n, int64_t m, float v) {
                           from_float(y + m * N + n, v * scale[n] + (bias ? bias[n] : 0.f));
                       });
    };
    if (threads <= 1 || N * K < SERIAL_ELEMENTS) return run(0, 1);
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}

#if defined(__AVX512BF16__)
using Bf16Path = DotBf16;
#else
using Bf16Path = Fma;
#endif
#define ENTRY(T, D, name)                                                                        \
    extern "C" void int8_linear_##name(const T* x, int64_t x_stride, const int8_t* w,            \
                                       const float* scale, const float* bias, T* y, int64_t M,   \
                                       int64_t N, int64_t K, int threads) {                      \
        int8_linear<D>(x, x_stride, w, scale, bias, y, M, N, K, threads);                        \
    }
ENTRY(float, Fma, f32)
ENTRY(bf16, Bf16Path, bf16)
ENTRY(f16, Fma, f16)
