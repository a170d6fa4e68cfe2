// y = silu(gate) * up, a block per row.  `step`: elements from one row to the next.
#include "cuda_common.cuh"

template <class T>
__device__ void swiglu(const T* gate, const T* up, T* y, int64 gate_step, int64 up_step, int n) {
    gate += blockIdx.x * gate_step;
    up += blockIdx.x * up_step;
    y += int64(blockIdx.x) * n;
    zip_row(y, gate, up, n, [](int, float g, float u) { return g / (1.f + expf(-g)) * u; });
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    swiglu_##name(const T* gate, const T* up, T* y, int64 gate_step, int64 up_step, int n) {     \
        swiglu(gate, up, y, gate_step, up_step, n);                                              \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
