// y = gelu(x + bias), element by element, in the tanh form.  Large outputs bypass the caches.
#include "rows.h"

// 0.5 z (1 + tanh u) = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)
static inline f32v gelu(f32v z) {
    const f32v minus_2u = z * fma(z * z, splat(-0.0713548162726f), splat(-1.59576912161f));
    return z / (1.f + exponential(minus_2u));
}

template <class T>
static void gelu_bias(const T* x, int64_t stride, const T* bias, T* y, int64_t rows, int64_t n,
                      int threads) {
    each_row(rows, n, threads, [&](int64_t row) {
        const T* in = x + row * stride;
        fill_row(
            y + row * n, n, streams<T>(rows, n),
            [&](int64_t i) { return gelu(load(in + i) + load(bias + i)); },
            [&](int64_t i) { return gelu(splat(to_float(in[i]) + to_float(bias[i])))[0]; });
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void gelu_bias_##name(const T* x, int64_t stride, const T* bias, T* y,            \
                                     int64_t rows, int64_t n, int threads) {                     \
        gelu_bias(x, stride, bias, y, rows, n, threads);                                         \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
