// y = gelu(x + bias), by the erf or in the tanh form, a block per row.  `step`: elements from one
// row of x to the next.
#include "cuda_common.cuh"

// z Phi(z), Phi(z) = erfc(-z / sqrt 2) / 2: nothing cancels for negative z
__device__ inline float gelu_erf(float z) { return z * (0.5f * erfcf(z * -0.707106781187f)); }

// 0.5 z (1 + tanh u) = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)
__device__ inline float gelu_tanh(float z) {
    return z / (1.f + expf(z * (-1.59576912161f - 0.0713548162726f * z * z)));
}

template <class T, class Gelu>
__device__ void gelu_bias(const T* x, const T* bias, T* y, int64 step, int n, Gelu gelu) {
    zip_row(y + int64(blockIdx.x) * n, x + blockIdx.x * step, bias, n,
            [&](int, float v, float b) { return gelu(v + b); });
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    gelu_bias_##name(const T* x, const T* bias, T* y, int64 step, int n) {                       \
        gelu_bias(x, bias, y, step, n, [](float z) { return gelu_erf(z); });                     \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    gelu_bias_tanh_##name(const T* x, const T* bias, T* y, int64 step, int n) {                  \
        gelu_bias(x, bias, y, step, n, [](float z) { return gelu_tanh(z); });                    \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
