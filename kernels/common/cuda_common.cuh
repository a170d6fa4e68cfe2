// What the CUDA kernels share.  CUDA's own headers only: the same file serves NVRTC, nvcc and the
// host shim (simt.h), which defines DYNAMIC_SHARED first.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif
#ifdef __CUDACC_RTC__  // no math.h
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif
using bf16 = __nv_bfloat16;
using f16 = __half;
using int64 = long long;

template <class T> struct alignas(16) Pack {  // moved by one 16-byte load or store
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

template <class T> __device__ inline bool aligned(const T* p) {
    return reinterpret_cast<size_t>(p) % 16 == 0;
}

// f(i, x) for every element x[i] of a row, the block's threads side by side; 16 bytes at a time
// where the row is aligned.
template <class T, class F> __device__ inline void each_element(const T* x, int n, F f) {
    int done = 0;
    if (aligned(x)) {
        done = n / Pack<T>::size * Pack<T>::size;
        for (int i = threadIdx.x * Pack<T>::size; i < done; i += blockDim.x * Pack<T>::size) {
            const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + i);
#pragma unroll
            for (int u = 0; u < Pack<T>::size; ++u) f(i + u, float(pack.at[u]));
        }
    }
    for (int i = done + threadIdx.x; i < n; i += blockDim.x) f(i, float(x[i]));
}

// y[i] = f(i) for every element of a row.
template <class T, class F> __device__ inline void fill_row(T* y, int n, F f) {
    int done = 0;
    if (aligned(y)) {
        done = n / Pack<T>::size * Pack<T>::size;
        for (int i = threadIdx.x * Pack<T>::size; i < done; i += blockDim.x * Pack<T>::size) {
            Pack<T> pack;
#pragma unroll
            for (int u = 0; u < Pack<T>::size; ++u) pack.at[u] = T(f(i + u));
            *reinterpret_cast<Pack<T>*>(y + i) = pack;
        }
    }
    for (int i = done + threadIdx.x; i < n; i += blockDim.x) y[i] = T(f(i));
}

// y[i] = f(i, a[i], b[i]) for every element of a row; 16 bytes at a time where all are aligned.
template <class T, class F> __device__ inline void zip_row(T* y, const T* a, const T* b, int n, F f) {
    int done = 0;
    if (aligned(y) && aligned(a) && aligned(b)) {
        done = n / Pack<T>::size * Pack<T>::size;
        for (int i = threadIdx.x * Pack<T>::size; i < done; i += blockDim.x * Pack<T>::size) {
            const Pack<T> left = *reinterpret_cast<const Pack<T>*>(a + i);
            const Pack<T> right = *reinterpret_cast<const Pack<T>*>(b + i);
            Pack<T> pack;
#pragma unroll
            for (int u = 0; u < Pack<T>::size; ++u)
                pack.at[u] = T(f(i + u, float(left.at[u]), float(right.at[u])));
            *reinterpret_cast<Pack<T>*>(y + i) = pack;
        }
    }
    for (int i = done + threadIdx.x; i < n; i += blockDim.x)
        y[i] = T(f(i, float(a[i]), float(b[i])));
}

__device__ inline float warp_sum(float v) {
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
__device__ inline float warp_max(float v) {
    for (int o = 16; o; o /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}

// The sum over the block (its size a multiple of 32), in every thread.  `partial` holds 32 floats
// in shared memory and must not be in use.
__device__ inline float block_sum(float v, float* partial) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0.f);
}

// The largest over the block, in every thread, as block_sum.
__device__ inline float block_max(float v, float* partial) {
    v = warp_max(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    return warp_max(partial[threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0]);
}
