// y = x / sqrt(mean(x^2) + eps) * weight.  A block per row, its size a multiple of 32; the row
// stays in shared memory between the two passes.  `step`: elements from one row of x to the next.
#include "cuda_common.cuh"

template <class T>
__device__ void rms_norm(const T* x, const T* weight, T* y, int64 step, int n, float eps) {
    DYNAMIC_SHARED(float, row);
    __shared__ float partial[32];
    x += blockIdx.x * step;
    y += int64(blockIdx.x) * n;
    float sum = 0.f;
    each_element(x, n, [&](int i, float v) {
        row[i] = v;
        sum += v * v;
    });
    // its barrier also orders the row: the second pass may read what another thread wrote
    const float scale = rsqrtf(block_sum(sum, partial) / n + eps);
    fill_row(y, n, [&](int i) { return row[i] * scale * float(weight[i]); });
}

// A row too long for shared memory is read again, from the cache while that holds it.
template <class T>
__device__ void long_row(const T* x, const T* weight, T* y, int64 step, int n, float eps) {
    __shared__ float partial[32];
    x += blockIdx.x * step;
    y += int64(blockIdx.x) * n;
    float sum = 0.f;
    each_element(x, n, [&](int, float v) { sum += v * v; });
    const float scale = rsqrtf(block_sum(sum, partial) / n + eps);
    zip_row(y, x, weight, n, [&](int, float v, float w) { return v * scale * w; });
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    rms_norm_##name(const T* x, const T* weight, T* y, int64 step, int n, float eps) {           \
        rms_norm(x, weight, y, step, n, eps);                                                    \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    rms_norm_long_##name(const T* x, const T* weight, T* y, int64 step, int n, float eps) {      \
        long_row(x, weight, y, step, n, eps);                                                    \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
