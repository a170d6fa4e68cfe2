// y = (x - mean x) / sqrt(var x + eps) * weight + bias.  A block per row, its size a multiple of
// 32; the row stays in shared memory between the passes.  `step`: from one row of x to the next.
#include "cuda_common.cuh"

template <class T>
__device__ void layer_norm(const T* x, const T* weight, const T* bias, T* y, int64 step, int n,
                           float eps) {
    DYNAMIC_SHARED(float, row);
    __shared__ float sums[32];
    __shared__ float squares[32];
    x += blockIdx.x * step;
    y += int64(blockIdx.x) * n;
    float sum = 0.f;
    each_element(x, n, [&](int i, float v) {
        row[i] = v;
        sum += v;
    });
    const float mean = block_sum(sum, sums) / n;  // its barrier also orders the row
    float square = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float centred = row[i] - mean;
        square += centred * centred;
    }
    const float scale = rsqrtf(block_sum(square, squares) / n + eps);
    fill_row(y, n,
             [&](int i) { return (row[i] - mean) * scale * float(weight[i]) + float(bias[i]); });
}

// A row too long for shared memory is read again, from the cache while that holds it.
template <class T>
__device__ void long_row(const T* x, const T* weight, const T* bias, T* y, int64 step, int n,
                         float eps) {
    __shared__ float sums[32];
    __shared__ float squares[32];
    x += blockIdx.x * step;
    y += int64(blockIdx.x) * n;
    float sum = 0.f, square = 0.f;
    each_element(x, n, [&](int, float v) { sum += v; });
    const float mean = block_sum(sum, sums) / n;
    each_element(x, n, [&](int, float v) { square += (v - mean) * (v - mean); });
    const float scale = rsqrtf(block_sum(square, squares) / n + eps);
    zip_row(y, x, weight, n,
            [&](int i, float v, float w) { return (v - mean) * scale * w + float(bias[i]); });
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    layer_norm_##name(const T* x, const T* weight, const T* bias, T* y, int64 step, int n,       \
                      float eps) {                                                               \
        layer_norm(x, weight, bias, y, step, n, eps);                                            \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    layer_norm_long_##name(const T* x, const T* weight, const T* bias, T* y, int64 step, int n,  \
                           float eps) {                                                          \
        long_row(x, weight, bias, y, step, n, eps);                                              \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
