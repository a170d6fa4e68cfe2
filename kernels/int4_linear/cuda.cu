// y = x (scale * q)^T + bias; packed and scale as in common/int4.h.  A block per 16 outputs: each
// of its 4 warps reads 512 bytes of weights at a time, a lane 16 of them (8 inputs of 4 outputs),
// and holds sums for 4 rows of x; blockIdx.y counts groups of 4 rows.  For small batches, where
// reading the weights is the time.
#include "cuda_common.cuh"

// nibble j of `word` as a float: it becomes the last bits of 2^23, which is subtracted
template <int J> __device__ inline float level(unsigned word) {
    const unsigned bits = (word >> 4 * J & 15u) | 0x4b000000u;
    return *reinterpret_cast<const float*>(&bits) - 8388616.f;
}

template <class T>
__device__ void int4_linear(const T* x, const unsigned* packed, const bf16* scale,
                            const float* bias, T* y, int64 step, int rows, int N, int K,
                            int group) {
    constexpr int ROWS = 4, WARPS = 4;
    __shared__ float partial[WARPS][ROWS][16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4 * 4;
    const int first = blockIdx.y * ROWS, held = min(ROWS, rows - first);
    const int64 block = blockIdx.x;
    packed += block * (K / 8) * 16 + quad;
    scale += block * (K / group) * 16 + quad;
    x += first * step;
    float sum[ROWS][4] = {};
    for (int octet = warp * 8 + lane / 4; octet < K / 8; octet += WARPS * 8) {
        const Pack<unsigned> word = *reinterpret_cast<const Pack<unsigned>*>(packed + int64(octet) * 16);
        const bf16* scales = scale + octet * 8 / group * 16;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const unsigned v = word.at[n];
            const float s = float(scales[n]);
            const float w[8] = {level<0>(v), level<4>(v), level<1>(v), level<5>(v),
                                level<2>(v), level<6>(v), level<3>(v), level<7>(v)};
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (r < held) {
                    const T* row = x + r * step + octet * 8;
                    float part = 0;
#pragma unroll
                    for (int i = 0; i < 8; ++i) part += w[i] * float(row[i]);
                    sum[r][n] += part * s;
                }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            float v = sum[r][n];
            for (int o = 4; o < 32; o *= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
            if (lane < 4) partial[warp][r][quad + n] = v;
        }
    __syncthreads();
    const int r = threadIdx.x / 16, n = threadIdx.x % 16, out = int(block) * 16 + n;
    if (r >= held || out >= N) return;
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += partial[w][r][n];
    y[int64(first + r) * N + out] = T(total + (bias ? bias[out] : 0.f));
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    int4_linear_##name(const T* x, const unsigned* packed, const bf16* scale, const float* bias, \
                       T* y, int64 step, int rows, int N, int K, int group) {                    \
        int4_linear(x, packed, scale, bias, y, step, rows, N, K, group);                         \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
