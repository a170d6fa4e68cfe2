// y = exp(x - max x) / sum exp(x - max x).  A block per row, its size a multiple of 32; the row
// stays in shared memory between the passes.  `step`: elements from one row of x to the next.
#include "cuda_common.cuh"

template <class T> __device__ void softmax(const T* x, T* y, int64 step, int n) {
    DYNAMIC_SHARED(float, row);
    __shared__ float tops[32];
    __shared__ float sums[32];
    x += blockIdx.x * step;
    y += int64(blockIdx.x) * n;
    float top = -3.4e38f;  // below it only -infinity, whose exponential is 0 either way
    each_element(x, n, [&](int i, float v) {
        row[i] = v;
        top = fmaxf(top, v);
    });
    top = block_max(top, tops);  // its barrier also orders the row
    float sum = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += row[i] = expf(row[i] - top);
    const float scale = 1.f / block_sum(sum, sums);
    fill_row(y, n, [&](int i) { return row[i] * scale; });
}

// A row too long for shared memory is read again, from the cache while that holds it.
// The sum stands for the largest so far and follows when that grows.
template <class T> __device__ void long_row(const T* x, T* y, int64 step, int n) {
    __shared__ float tops[32];
    __shared__ float sums[32];
    x += blockIdx.x * step;
    y += int64(blockIdx.x) * n;
    float mine = -3.4e38f, sum = 0.f;
    each_element(x, n, [&](int, float v) {
        if (v > mine) {
            sum = sum * expf(mine - v) + (1.f + (v - v));  // infinity makes it NaN
            mine = v;
        } else {
            sum += expf(v - mine);
        }
    });
    const float top = block_max(mine, tops);
    const float scale = 1.f / block_sum(sum * expf(mine - top), sums);
    zip_row(y, x, x, n, [&](int, float v, float) { return expf(v - top) * scale; });
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    softmax_##name(const T* x, T* y, int64 step, int n) {                                        \
        softmax(x, y, step, n);                                                                  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    softmax_long_##name(const T* x, T* y, int64 step, int n) {                                   \
        long_row(x, y, step, n);                                                                 \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
