// y_i = x_i cos_i - x_{i+half} sin_i, y_{i+half} = x_{i+half} cos_i + x_i sin_i.  A block per token,
// a thread per pair and a warp's pairs side by side.  `step`: elements from one head to the next.
#include "cuda_common.cuh"

template <class T>
__device__ void rope(const T* x, const float* cos, const float* sin, T* y, int64 step, int length,
                     int heads, int half) {
    x += int64(blockIdx.x) * heads * step;
    y += int64(blockIdx.x) * heads * 2 * half;
    cos += int64(blockIdx.x % length) * half;
    sin += int64(blockIdx.x % length) * half;
    for (int at = threadIdx.x; at < heads * half; at += blockDim.x) {
        const int head = at / half, i = at % half;
        const T* in = x + head * step + i;
        T* out = y + head * 2 * half + i;
        const float first = float(in[0]), second = float(in[half]);
        out[0] = T(first * cos[i] - second * sin[i]);
        out[half] = T(second * cos[i] + first * sin[i]);
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    rope_##name(const T* x, const float* cos, const float* sin, T* y, int64 step, int length,    \
                int heads, int half) {                                                           \
        rope(x, cos, sin, y, step, length, heads, half);                                         \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
