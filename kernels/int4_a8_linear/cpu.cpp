// y = x (scale * q)^T + bias with q of four bits and x in int8, quantized here per row and group.
// A cache line of weights becomes bytes by a shift and two masks; with VNNI an instruction adds up
// four products of a lane in int32.  Elsewhere the same whole numbers meet in pairs of 16 bits.
#include <memory>
#include "int4_digits.h"

template <class T>
static void int4_a8_linear(const T* x, int64_t x_stride, const uint32_t* packed, const bf16* scale,
                           const float* bias, T* y, int64_t M, int64_t N, int64_t K, int64_t group,
                           int threads) {
    const int64_t groups = K / group;
    const std::unique_ptr<int8_t[]> bytes(new int8_t[M * apart(K)]);
    const std::unique_ptr<float[]> scales(new float[M * groups]);
    const std::unique_ptr<int32_t[]> shifts(new int32_t[M * groups]);
    const Int8Rows rows{bytes.get(), scales.get(), shifts.get(), apart(K), groups};
    const Int4 w{packed, scale, K, group};
    const auto quantize = [&](int64_t m) {
        const std::unique_ptr<float[]> wide(new float[group]);
        for (int64_t g = 0; g < groups; ++g) {
            const T* from = x + m * x_stride + g * group;
            for (int64_t i = 0; i < group; i += LANES) store(wide.get() + i, load(from + i));
            quantize_group(wide.get(), group, rows.bytes + m * rows.stride + g * group,
                           rows.scale + m * groups + g, rows.shift + m * groups + g);
        }
    };
    const auto multiply = [&](int thread, int of) {
        const Share share(N, thread, of, SIDE);
        const auto put = [&](int64_t n, int64_t m, float v) {
            from_float(y + m * N + n, v + (bias ? bias[n] : 0.f));
        };
#if defined(HAS_INT4_DIGITS)
        int4_digits_rows<1>(OneDigit{rows}, M, w, share.begin, share.end, put);
#else
        int4_a8_rows(rows, M, w, share.begin, share.end, put);
#endif
    };
    if (threads <= 1 || N * K < SERIAL_ELEMENTS) {
        for (int64_t m = 0; m < M; ++m) quantize(m);
        return multiply(0, 1);
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; ++m) quantize(m);
        multiply(omp_get_thread_num(), omp_get_num_threads());
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" void int4_a8_linear_##name(const T* x, int64_t x_stride, const uint32_t* packed,  \
                                          const bf16* scale, const float* bias, T* y, int64_t M, \
                                          int64_t N, int64_t K, int64_t group, int threads) {    \
        int4_a8_linear(x, x_stride, packed, scale, bias, y, M, N, K, group, threads);            \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
