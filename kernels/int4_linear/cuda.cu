// y = x (scale * q)^T + bias; packed and scale as in common/int4.h.  Three ways, by the rows of x: dot
// products on CUDA cores, tensor cores by 16 rows where reading the weights is the time, and by tiles
// of 64 rows and 128 outputs.
#include "int4.cuh"

// ---- dot products ----
// A block per 16 outputs: each of its 4 warps reads 512 bytes of weights at a time, a lane 16 of them
// (8 inputs of 4 outputs), and holds sums for 4 rows of x; blockIdx.y counts groups of 4 rows.

// nibble j of `word` as a float: it becomes the last bits of 2^23, which is subtracted
template <int J> __device__ inline float level(unsigned word) {
    const unsigned bits = (word >> 4 * J & 15u) | 0x4b000000u;
    return *reinterpret_cast<const float*>(&bits) - 8388616.f;
}

template <class T>
__device__ void dot(const T* x, const unsigned* packed, const bf16* scale,
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

// ---- tensor cores ----
// x comes in 16 bits, its rows at multiples of 16 bytes, here called a.  For fp32 it is three numbers
// in bf16 whose sum it is, side by side in a row of 3 K: weights are exact in bf16, so are products.

template <class T> constexpr int PLANES = sizeof(T) == 4 ? 3 : 1;

// Row blockIdx.x of x as such: bf16 and fp16 as they are, for rows that start elsewhere.
template <class A, class T>
__device__ void arrange(const T* x, A* a, int64 step, int K) {
    x += blockIdx.x * step;
    a += blockIdx.x * int64(PLANES<T>) * K;
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
        if constexpr (sizeof(T) == 2) {
            a[k] = x[k];
        } else {
            float left = x[k];
            const bool finite = (*reinterpret_cast<const unsigned*>(&left) & 0x7fffffffu) < 0x7f800000u;
            for (int p = 0; p < 3; ++p) {
                const unsigned bits = *reinterpret_cast<const unsigned*>(&left) & 0xffff0000u;
                const float top = finite ? *reinterpret_cast<const float*>(&bits) : left;
                a[p * int64(K) + k] = A(top);  // exact: eight bits
                left = finite ? left - top : 0.f;
            }
        }
    }
}

// Inputs 2 J and + 1 of a word as two numbers in 16 bits: a nibble becomes the last bits of 128 (in
// bf16) or 1024 (in fp16), which is subtracted, and the 8 that q has been raised by.
template <int J> __device__ inline unsigned pair(unsigned word, bf16) {
    const unsigned bits = (word >> 4 * J & 0x000f000fu) | 0x43004300u, base = 0x43084308u;
    const __nv_bfloat162 q = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&bits),
                                     *reinterpret_cast<const __nv_bfloat162*>(&base));
    return *reinterpret_cast<const unsigned*>(&q);
}
template <int J> __device__ inline unsigned pair(unsigned word, f16) {
    const unsigned bits = (word >> 4 * J & 0x000f000fu) | 0x64006400u, base = 0x64086408u;
    const __half2 q = __hsub2(*reinterpret_cast<const __half2*>(&bits),
                              *reinterpret_cast<const __half2*>(&base));
    return *reinterpret_cast<const unsigned*>(&q);
}

using Eight = Pack<unsigned>;  // inputs of a row, 8 (lane % 4) to + 7 of a step

// sum (16 rows, 32 outputs) += those of a step of 32 inputs, which share a group.
template <class A>
__device__ inline void add_step(float (&sum)[4][4], const unsigned (&q)[4][4], const Eight& above,
                                const Eight& below, const Scales& scales) {
    const unsigned first[4] = {above.at[0], below.at[0], above.at[1], below.at[1]};
    const unsigned second[4] = {above.at[2], below.at[2], above.at[3], below.at[3]};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        float part[4] = {};
        mma(part, first, q[n][0], q[n][1], A());
        mma(part, second, q[n][2], q[n][3], A());
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n][i] += part[i] * float(scales.at[scale_at(n, i)]);
    }
}
template <class A> __device__ inline void widen(unsigned (&q)[4][4], const Words& words) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        q[n][0] = pair<0>(words.at[n], A());
        q[n][1] = pair<1>(words.at[n], A());
        q[n][2] = pair<2>(words.at[n], A());
        q[n][3] = pair<3>(words.at[n], A());
    }
}

// 32 outputs of 16 rows (blockIdx.y): 8 warps take every eighth stretch of 128 inputs.
template <class A, class T>
__device__ void few(const A* a, const unsigned* packed, const bf16* scale, const float* bias, T* y,
                    int64 step, int rows, int N, int K, int group) {
    constexpr int STEPS = 4, STRETCH = 32 * STEPS;
    __shared__ float partial[8][16][33];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y * 16 + lane / 4;
    a += row * step + lane % 4 * 8;
    packed = words_of(packed, blockIdx.x * 32 + lane / 4 * 4, lane % 4 * 8, K, N);
    scale = scales_of(scale, blockIdx.x * 32 + lane % 4 * 8, 0, K / group, N);
    float sum[4][4] = {};
    const int each = (K + STRETCH - 1) / STRETCH;
    for (int at = warp; at < PLANES<T> * each; at += 8) {
        const int first = at % each * STRETCH;
        const A* mine = a + at / each * int64(K);
        Words words[STEPS] = {};
        Scales scales[STEPS] = {};
        Eight of_rows[STEPS][2] = {};
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int k = first + s * 32;
            if (k >= K) continue;
            words[s] = *reinterpret_cast<const Words*>(packed + k * 2);
            if (row < rows) of_rows[s][0] = *reinterpret_cast<const Eight*>(mine + k);
            if (row + 8 < rows) of_rows[s][1] = *reinterpret_cast<const Eight*>(mine + k + 8 * step);
            if (s && group != 32) scales[s] = scales[s - 1];
            else scales[s] = *reinterpret_cast<const Scales*>(scale + k / group * 16);
        }
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            unsigned q[4][4];
            widen<A>(q, words[s]);
            add_step<A>(sum, q, of_rows[s][0], of_rows[s][1], scales[s]);
        }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[warp][lane / 4 + i / 2 * 8][output_of(n, i)] = sum[n][i];
    __syncthreads();
    const int out = blockIdx.x * 32 + lane;
    for (int r = warp; r < 16; r += 8) {
        const int m = blockIdx.y * 16 + r;
        if (m >= rows || out >= N) continue;
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total += partial[i][r][lane];
        y[int64(m) * N + out] = T(total + (bias ? bias[out] : 0.f));
    }
}

// 64 rows (blockIdx.y) by 128 outputs, 8 warps of 32 by 32; the next two stretches on their way.
constexpr int TILE = 64, STEPS = 2, STRETCH = 32 * STEPS, STAGES = 3;
struct alignas(16) Stage {
    Eight rows[STEPS][TILE][4];
    Words words[8][STRETCH / 8][4];  // of 16 outputs, of eight inputs; see place()
    Scales scales[STEPS][16];
};

template <class A>
__device__ void fill(Stage& stage, const A* a, const unsigned* packed, const bf16* scale, int64 step,
                     int rows, int N, int K, int group, int first) {
    const int row0 = blockIdx.y * TILE, outputs = blockIdx.x * 128;
#pragma unroll 1
    for (int i = threadIdx.x; i < STEPS * TILE * 4; i += 256) {
        const int k = first + i / (TILE * 4) * 32 + i % 4 * 8, row = row0 + i / 4 % TILE;
        const bool inside = row < rows && k < K;
        copy_async(&stage.rows[0][0][0] + i, inside ? a + row * step + k : a, inside);
    }
    const int quad = threadIdx.x % 4, octet = threadIdx.x / 4 % 8, block = threadIdx.x / 32;
    const bool inside = first + octet * 8 < K;
    const int output = outputs + block * 16 + quad * 4;
    copy_async(&stage.words[block][octet][place(octet, quad)],
               inside ? words_of(packed, output, first + octet * 8, K, N) : packed, inside);
    if (threadIdx.x < STEPS * 16) {
        const int k = first + threadIdx.x / 16 * 32, output = outputs + threadIdx.x % 16 * 8;
        copy_async(&stage.scales[0][0] + threadIdx.x,
                   k < K ? scales_of(scale, output, k / group, K / group, N) : scale, k < K);
    }
}

template <class A, class T>
__device__ void gemm(const A* a, const unsigned* packed, const bf16* scale, const float* bias, T* y,
                     int64 step, int rows, int N, int K, int group) {
    __shared__ Stage stages[STAGES];
    const int lane = threadIdx.x % 32, side = threadIdx.x / 32 % 4, upper = threadIdx.x / 128 * 32;
    const int each = (K + STRETCH - 1) / STRETCH, stretches = PLANES<T> * each;
    const auto fetch = [&](int at) {
        if (at < stretches)
            fill(stages[at % STAGES], a + at / each * int64(K), packed, scale, step, rows, N, K, group,
                 at % each * STRETCH);
        commit_copies();  // an empty group where nothing is left: what waits counts groups
    };
    float sum[2][4][4] = {};
    fetch(0);
    fetch(1);
    for (int at = 0; at < stretches; ++at) {
        wait_copies<1>();
        __syncthreads();  // this stretch is here, and nobody reads the one before
        fetch(at + 2);
        const Stage& stage = stages[at % STAGES];
#pragma unroll 1  // registers for one step
        for (int s = 0; s < STEPS; ++s) {
            const int octet = s * 4 + lane % 4;
            unsigned q[4][4];
            widen<A>(q, stage.words[side * 2 + lane / 16][octet][place(octet, lane / 4 % 4)]);
            const Scales scales = stage.scales[s][side * 4 + lane % 4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int row = upper + m * 16 + lane / 4;
                add_step<A>(sum[m], q, stage.rows[s][row][lane % 4], stage.rows[s][row + 8][lane % 4],
                            scales);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = blockIdx.y * TILE + upper + m * 16 + lane / 4 + i / 2 * 8;
                const int out = blockIdx.x * 128 + side * 32 + output_of(n, i);
                if (row < rows && out < N)
                    y[int64(row) * N + out] = T(sum[m][n][i] + (bias ? bias[out] : 0.f));
            }
}

template <class T> struct In16 { using type = T; };
template <> struct In16<float> { using type = bf16; };
#define ARGUMENTS(T)                                                                             \
    const In16<T>::type *a, const unsigned *packed, const bf16 *scale, const float *bias, T *y,  \
        int64 step, int rows, int N, int K, int group
#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    int4_linear_dot_##name(const T* x, const unsigned* packed, const bf16* scale,                \
                           const float* bias, T* y, int64 step, int rows, int N, int K,          \
                           int group) {                                                          \
        dot(x, packed, scale, bias, y, step, rows, N, K, group);                         \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                            \
    int4_linear_arrange_##name(const T* x, In16<T>::type* a, int64 step, int K) {                \
        arrange(x, a, step, K);                                                                  \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2)                                         \
    int4_linear_few_##name(ARGUMENTS(T)) {                                                       \
        few(a, packed, scale, bias, y, step, rows, N, K, group);                                 \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2)                                         \
    int4_linear_gemm_##name(ARGUMENTS(T)) {                                                      \
        gemm(a, packed, scale, bias, y, step, rows, N, K, group);                                \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
