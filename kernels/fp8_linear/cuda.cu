// y = (e4m3(x) w^T) * scale_x * scale + bias, w e4m3 (N, K).  A first kernel rounds the rows of x.
// From sm_89 on.  For sm_90a, ptxas makes of each mma.sync in e4m3 an unpacking to fp16 and two HMMA:
// right, and half the bytes of bf16, but not the rate of e4m3, which there only wgmma has.  So many
// rows go to wgmma, but for those in fp32, whose outputs show that it keeps some 13 bits of a sum.
#include "bytes_linear.cuh"
#include "bytes_wgmma.cuh"

// The bits of the nearest e4m3 to v, of two the even one; |v| is at most 448 and a little.
__device__ inline unsigned nearest_e4m3(float v) {
    // a number is added at which floats are as far apart as e4m3 are at v: an eighth of v's power of
    // two, and of 2^-6 below that
    unsigned bits = *reinterpret_cast<const unsigned*>(&v) & 0x7f800000u;
    const float power = fmaxf(*reinterpret_cast<const float*>(&bits), 0.015625f);
    const float shift = power * 1572864.f;  // 1.5 * 2^20
    const float rounded = (v + shift) - shift, magnitude = fabsf(rounded);
    bits = *reinterpret_cast<const unsigned*>(&magnitude);
    const unsigned code = magnitude < 0.015625f ? unsigned(magnitude * 512.f) : (bits >> 20) - 960;
    return code | (v < 0.f ? 128u : 0u);
}

// a b, rounded: fused with the sum that follows, it would be another e4m3 at ties.
__device__ inline float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// Row blockIdx.x of x in e4m3: q (rows, padded), zeros from K on; scale (rows).
template <class T>
__device__ void quantize(const T* x, signed char* q, float* scale, int64 step, int K, int padded) {
    __shared__ unsigned tops[32];
    x += blockIdx.x * step;
    unsigned top = 0;  // bits of |x|, which order as the numbers do: infinity and NaN are the largest
    each_element(x, K, [&](int, float v) {
        top = max(top, *reinterpret_cast<const unsigned*>(&v) & 0x7fffffffu);
    });
    for (int o = 16; o; o /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, o));
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
    __syncthreads();
    for (int i = 0; i < blockDim.x / 32; ++i) top = max(top, tops[i]);
    const bool finite = top < 0x7f800000u;
    const float each = fmaxf(*reinterpret_cast<const float*>(&top) / 448.f, 7.52316385e-37f);  // 2^-120
    if (threadIdx.x == 0) scale[blockIdx.x] = finite ? each : NAN;
    const float inverse = 1.f / each;
    unsigned* words = reinterpret_cast<unsigned*>(q + int64(blockIdx.x) * padded);
    for (int i = threadIdx.x; i < padded / 4; i += blockDim.x) {
        unsigned word = 0;
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int k = 4 * i + u;
            word |= (k < K && finite ? nearest_e4m3(product(float(x[k]), inverse)) : 0u) << 8 * u;
        }
        words[i] = word;
    }
}

// c (16, 8) += a (16, 64) b (64, 8): a's rows lane / 4 and that + 8, b's column lane / 4.  Tensor
// cores add up these 64 products; further ones are added in fp32.
struct E4m3 {
    using Sum = float;
    static __device__ void multiply(float (&c)[4], const Bytes& a, const Bytes& below,
                                    const Bytes& b) {
        const unsigned first[4] = {a.at[0], below.at[0], a.at[1], below.at[1]};
        const unsigned second[4] = {a.at[2], below.at[2], a.at[3], below.at[3]};
        float part[4] = {};
        mma(part, first, b.at[0], b.at[1], e4m3());
        mma(part, second, b.at[2], b.at[3], e4m3());
#pragma unroll
        for (int i = 0; i < 4; ++i) c[i] += part[i];
    }
};

#ifdef HOPPER
struct HopperE4m3 {
    using Sum = float;
    using Tag = e4m3;
    static constexpr bool PROMOTES = true;
};
#endif

template <class T> struct Many {
#ifdef HOPPER
    static constexpr bool WGMMA = sizeof(T) == 2;
#else
    static constexpr bool WGMMA = false;
#endif
    static constexpr int THREADS = WGMMA ? 384 : 256;
};

// `outputs` of a tile count for wgmma alone.
template <class T>
__device__ void many(const signed char* q, const signed char* w, Ends<T> ends, int K, int padded,
                     bool packs, int outputs) {
#ifdef HOPPER
    if constexpr (Many<T>::WGMMA)
        return hopper_gemm<HopperE4m3>(q, w, ends, K, padded, packs, outputs);
    else
#endif
        gemm<E4m3>(q, w, ends, K, padded, packs);
}

#define ARGUMENTS(T)                                                                             \
    const signed char *q, const float *scale_x, const signed char *w, const float *scale,        \
        const float *bias, T *y, int rows, int N, int K, int padded, int packs
#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                            \
    fp8_linear_quantize_##name(const T* x, signed char* q, float* scale, int64 step, int K,      \
                                int padded) {                                                    \
        quantize(x, q, scale, step, K, padded);                                                  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    fp8_linear_few_##name(ARGUMENTS(T)) {                                                        \
        few<E4m3, T>(q, w, {scale_x, scale, bias, y, rows, N}, K, padded, packs);                \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(Many<T>::THREADS, 1)                            \
    fp8_linear_gemm_##name(ARGUMENTS(T), int outputs) {                                          \
        many<T>(q, w, {scale_x, scale, bias, y, rows, N}, K, padded, packs, outputs);            \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
