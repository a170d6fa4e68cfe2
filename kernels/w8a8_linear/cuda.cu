// y = (int8(x) w^T) * scale_x * scale + bias, w int8 (N, K).  A first kernel quantizes the rows of x;
// their sums are whole, so both products give the same bits.
#include "bytes_linear.cuh"
#include "bytes_wgmma.cuh"

// Row blockIdx.x of x in int8: q (rows, padded), zeros from K on; scale (rows).
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
    const float each = fmaxf(*reinterpret_cast<const float*>(&top) / 127.f, 1.17549435e-38f);
    if (threadIdx.x == 0) scale[blockIdx.x] = finite ? each : NAN;
    const float inverse = 1.f / each;
    unsigned* words = reinterpret_cast<unsigned*>(q + int64(blockIdx.x) * padded);
    for (int i = threadIdx.x; i < padded / 4; i += blockDim.x) {
        unsigned word = 0;
#pragma unroll
        for (int u = 0; u < 4; ++u) {
            const int k = 4 * i + u;
            const int v = k < K && finite ? int(rintf(float(x[k]) * inverse)) : 0;
            word |= unsigned(v & 255) << 8 * u;
        }
        words[i] = word;
    }
}

// c (16, 8) += a (16, 64) b (64, 8): a's rows lane / 4 and that + 8, b's column lane / 4.
struct Int8 {
    using Sum = int;
    static __device__ void multiply(int (&c)[4], const Bytes& a, const Bytes& below, const Bytes& b) {
        const unsigned first[4] = {a.at[0], below.at[0], a.at[1], below.at[1]};
        const unsigned second[4] = {a.at[2], below.at[2], a.at[3], below.at[3]};
        mma(c, first, b.at[0], b.at[1]);
        mma(c, second, b.at[2], b.at[3]);
    }
};

#ifdef HOPPER
struct HopperInt8 {
    using Sum = int;
    using Tag = s8;
    static constexpr bool PROMOTES = false;
};
#define MANY __launch_bounds__(384, 1)
#else
#define MANY __launch_bounds__(256, 2)
#endif

// `outputs` of a tile count for wgmma alone.
template <class T>
__device__ void many(const signed char* q, const signed char* w, Ends<T> ends, int K, int padded,
                     bool packs, int outputs) {
#ifdef HOPPER
    hopper_gemm<HopperInt8>(q, w, ends, K, padded, packs, outputs);
#else
    gemm<Int8>(q, w, ends, K, padded, packs);
#endif
}

#define ARGUMENTS(T)                                                                             \
    const signed char *q, const float *scale_x, const signed char *w, const float *scale,        \
        const float *bias, T *y, int rows, int N, int K, int padded, int packs
#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                            \
    w8a8_linear_quantize_##name(const T* x, signed char* q, float* scale, int64 step, int K,     \
                                int padded) {                                                    \
        quantize(x, q, scale, step, K, padded);                                                  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    w8a8_linear_few_##name(ARGUMENTS(T)) {                                                       \
        few<Int8, T>(q, w, {scale_x, scale, bias, y, rows, N}, K, padded, packs);                \
    }                                                                                            \
    extern "C" __global__ void MANY                                                              \
    w8a8_linear_gemm_##name(ARGUMENTS(T), int outputs) {                                         \
        many<T>(q, w, {scale_x, scale, bias, y, rows, N}, K, padded, packs, outputs);            \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
