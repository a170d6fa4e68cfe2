// y = x (scale * q)^T + bias; q of four bits, a scale per group of inputs.  At small batch the time
// is that of reading q: once, in order, each thread a run of outputs.  A lane's eight nibbles become
// numbers by shifts, masks and a table in registers: 23 vector instructions a cache line with fp32
// activations, 11 with bf16 ones where the processor multiplies those.
#include <memory>
#include "int4.h"

template <class D, class T>
static void int4_linear(const T* x, int64_t x_stride, const uint32_t* packed, const bf16* scale,
                        const float* bias, T* y, int64_t M, int64_t N, int64_t K, int64_t group,
                        int threads) {
    using X = typename D::X;
    const X* rows;
    std::unique_ptr<X[]> copied;
    bool direct = false;
    if constexpr (std::is_same_v<X, T>) {
        direct = M == 1;
        rows = x;
    }
    if (!direct) {  // M * K numbers: widened, and rows off one another's cache sets
        copied.reset(new X[M * apart(K)]);
        for (int64_t m = 0; m < M; ++m) {
            if constexpr (std::is_same_v<X, T>)
                std::memcpy(copied.get() + m * apart(K), x + m * x_stride, K * sizeof(X));
            else
                fill_row(copied.get() + m * apart(K), K, false,
                         [&](int64_t k) { return load(x + m * x_stride + k); },
                         [&](int64_t k) { return to_float(x[m * x_stride + k]); });
        }
        rows = copied.get();
        x_stride = apart(K);
    }
    const Int4 w{packed, scale, K, group};
    const auto run = [&](int thread, int of) {
        const Share share(N, thread, of, SIDE);
        int4_rows<D>(rows, x_stride, M, w, share.begin, share.end,
                     [&](int64_t n, int64_t m, float v) {
                         from_float(y + m * N + n, v + (bias ? bias[n] : 0.f));
                     });
    };
    if (threads <= 1 || N * K < SERIAL_ELEMENTS) return run(0, 1);
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}

#if defined(__AVX512BF16__)
using Bf16Path = Int4Bf16;
#else
using Bf16Path = Int4Fp32;
#endif
#define ENTRY(T, D, name)                                                                        \
    extern "C" void int4_linear_##name(const T* x, int64_t x_stride, const uint32_t* packed,     \
                                       const bf16* scale, const float* bias, T* y, int64_t M,    \
                                       int64_t N, int64_t K, int64_t group, int threads) {       \
        int4_linear<D>(x, x_stride, packed, scale, bias, y, M, N, K, group, threads);            \
    }
ENTRY(float, Int4Fp32, f32)
ENTRY(bf16, Bf16Path, bf16)
ENTRY(f16, Int4Fp32, f16)
