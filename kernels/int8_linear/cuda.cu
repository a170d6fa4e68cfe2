// y = (x w^T) * scale + bias, w int8 (N, K).  A warp per output: its lanes read the weights of that
// output 16 bytes at a time, once, and hold 8 sums, one per row of x.  4 warps a block; blockIdx.y
// counts groups of 8 rows.  For small batches, where reading w is the time.
#include "cuda_common.cuh"

template <class T>
__device__ void int8_linear(const T* x, const signed char* w, const float* scale,
                            const float* bias, T* y, int64 step, int rows, int N, int K) {
    constexpr int ROWS = 8;
    const int n = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.y * ROWS, held = min(ROWS, rows - first);
    if (n >= N) return;  // the whole warp
    w += int64(n) * K;
    x += first * step;
    float sum[ROWS] = {};
    int done = 0;
    if (aligned(w)) {
        done = K / 16 * 16;
        for (int k = lane * 16; k < done; k += 512) {
            const Pack<signed char> q = *reinterpret_cast<const Pack<signed char>*>(w + k);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (r < held) {
                    const T* row = x + r * step + k;
#pragma unroll
                    for (int u = 0; u < 16; ++u) sum[r] += float(q.at[u]) * float(row[u]);
                }
        }
    }
    for (int k = done + lane; k < K; k += 32)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r < held) sum[r] += float(w[k]) * float(x[r * step + k]);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float total = warp_sum(sum[r]);
        if (lane == 0 && r < held)
            y[int64(first + r) * N + n] = T(total * scale[n] + (bias ? bias[n] : 0.f));
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    int8_linear_##name(const T* x, const signed char* w, const float* scale, const float* bias,  \
                       T* y, int64 step, int rows, int N, int K) {                               \
        int8_linear(x, w, scale, bias, y, step, rows, N, K);                                     \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
