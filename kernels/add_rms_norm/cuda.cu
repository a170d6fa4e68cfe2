// total = x + residual, y = total / sqrt(mean(total^2) + eps) * weight.  A block per row, its size
// a multiple of 32; the row stays in shared memory between the two passes.
#include "cuda_common.cuh"

template <class T>
__device__ void add_rms_norm(const T* x, const T* residual, const T* weight, T* y, T* total,
                             int64 x_step, int64 residual_step, int n, float eps) {
    DYNAMIC_SHARED(float, row);
    __shared__ float partial[32];
    x += blockIdx.x * x_step;
    residual += blockIdx.x * residual_step;
    y += int64(blockIdx.x) * n;
    total += int64(blockIdx.x) * n;
    each_element(x, n, [&](int i, float v) { row[i] = v; });
    __syncthreads();  // x and residual may be aligned differently: other threads, other elements
    float sum = 0.f;
    each_element(residual, n, [&](int i, float v) {
        row[i] = float(T(row[i] + v));  // rounded to T before it is normalized
        sum += row[i] * row[i];
    });
    const float scale = rsqrtf(block_sum(sum, partial) / n + eps);
    fill_row(total, n, [&](int i) { return row[i]; });
    fill_row(y, n, [&](int i) { return row[i] * scale * float(weight[i]); });
}

// A row too long for shared memory: its total is written, and read again from there.
template <class T>
__device__ void long_row(const T* x, const T* residual, const T* weight, T* y, T* total,
                         int64 x_step, int64 residual_step, int n, float eps) {
    __shared__ float partial[32];
    x += blockIdx.x * x_step;
    residual += blockIdx.x * residual_step;
    y += int64(blockIdx.x) * n;
    total += int64(blockIdx.x) * n;
    float sum = 0.f;
    zip_row(total, x, residual, n, [&](int, float a, float b) {
        const float v = float(T(a + b));  // rounded to T before it is normalized
        sum += v * v;
        return v;
    });
    // its barrier also orders the total: another thread may read what this one wrote
    const float scale = rsqrtf(block_sum(sum, partial) / n + eps);
    zip_row(y, total, weight, n, [&](int, float v, float w) { return v * scale * w; });
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    add_rms_norm_##name(const T* x, const T* residual, const T* weight, T* y, T* total,          \
                        int64 x_step, int64 residual_step, int n, float eps) {                   \
        add_rms_norm(x, residual, weight, y, total, x_step, residual_step, n, eps);              \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    add_rms_norm_long_##name(const T* x, const T* residual, const T* weight, T* y, T* total,     \
                             int64 x_step, int64 residual_step, int n, float eps) {              \
        long_row(x, residual, weight, y, total, x_step, residual_step, n, eps);                  \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
