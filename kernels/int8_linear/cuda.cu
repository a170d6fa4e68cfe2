// y = (x w^T) * scale + bias, w int8 (N, K): by dot products for small batches, where reading w is
// the time, by tensor cores in 16 bits for more rows.
#include "mma.cuh"

// ---- dot products ----
// A warp per output: its lanes read the weights of that output 16 bytes at a time, once, and hold 8
// sums, one per row of x.  4 warps a block; blockIdx.y counts groups of 8 rows.

template <class T>
__device__ void dot(const T* x, const signed char* w, const float* scale,
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

// ---- tensor cores ----
// x comes in 16 bits, here called a: (rows, padded) per plane, zeros from K on.  For fp32 it is three
// numbers in bf16 whose sum it is, plane after plane in a row: int8 is exact in bf16, so are products.
template <class T> constexpr int PLANES = sizeof(T) == 4 ? 3 : 1;

template <class A, class T>
__device__ void arrange(const T* x, A* a, int64 step, int K, int padded) {
    x += blockIdx.x * step;
    a += blockIdx.x * int64(PLANES<T>) * padded;
    for (int k = threadIdx.x; k < padded; k += blockDim.x) {
        if constexpr (sizeof(T) == 2) {
            a[k] = k < K ? x[k] : T(0.f);
        } else {
            float left = k < K ? x[k] : 0.f;
            const bool finite = (*reinterpret_cast<const unsigned*>(&left) & 0x7fffffffu) < 0x7f800000u;
            for (int p = 0; p < 3; ++p) {
                const unsigned bits = *reinterpret_cast<const unsigned*>(&left) & 0xffff0000u;
                const float top = finite ? *reinterpret_cast<const float*>(&bits) : left;
                a[p * int64(padded) + k] = A(top);  // exact: eight bits
                left = finite ? left - top : 0.f;
            }
        }
    }
}

// Bytes 2 J and + 1 of eight weights as two numbers in 16 bits.
template <int J, class A> __device__ inline unsigned pair(const unsigned (&w)[2], A kind) {
    const unsigned word = w[J / 2] >> J % 2 * 16;
    return pack(float((signed char)(word & 255)), float((signed char)(word >> 8 & 255)), kind);
}

// 64 rows (blockIdx.y) by 128 outputs, 8 warps of 32 by 32; the next two steps of 64 inputs on their
// way.  Of 32 inputs a lane takes eight side by side, of a row of x and of one of w.
constexpr int TILE = 64, SIDE = 128, STEP = 64, STAGES = 3;
struct alignas(8) Weights {
    unsigned at[2];
};
struct alignas(16) Stage {
    Pack<unsigned> rows[2][TILE][4];
    Weights weights[2][SIDE][4];
};

template <class A>
__device__ void fill(Stage& stage, const A* a, const signed char* w, int64 a_step, int first, int rows,
                     int N, int K, bool packs) {
    const int row0 = blockIdx.y * TILE, outputs = blockIdx.x * SIDE;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * TILE * 4; i += 256) {
        const int k = first + i / (TILE * 4) * 32 + i % 4 * 8, row = row0 + i / 4 % TILE;
        copy_async(&stage.rows[0][0][0] + i, row < rows ? a + row * a_step + k : a, row < rows);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * SIDE * 2; i += 256) {
        const int k = first + i / (SIDE * 2) * 32 + i % 2 * 16, n = outputs + i / 2 % SIDE;
        char* to = reinterpret_cast<char*>(stage.weights) + i * 16;
        if (packs) {
            const bool inside = n < N && k < K;
            copy_async(to, inside ? w + int64(n) * K + k : w, inside);
        } else {
            for (int u = 0; u < 16; ++u) to[u] = n < N && k + u < K ? w[int64(n) * K + k + u] : 0;
        }
    }
}

template <class A, class T>
__device__ void gemm(const A* a, const signed char* w, const float* scale, const float* bias, T* y,
                     int rows, int N, int K, int padded, bool packs) {
    __shared__ Stage stages[STAGES];
    const int lane = threadIdx.x % 32, side = threadIdx.x / 32 % 4 * 32, upper = threadIdx.x / 128 * 32;
    const int each = padded / STEP, steps = PLANES<T> * each;
    const auto fetch = [&](int at) {
        if (at < steps)
            fill(stages[at % STAGES], a + at / each * int64(padded), w, int64(PLANES<T>) * padded,
                 at % each * STEP, rows, N, K, packs);
        commit_copies();  // an empty group where nothing is left: what waits counts groups
    };
    float sum[2][4][4] = {};
    fetch(0);
    fetch(1);
    for (int at = 0; at < steps; ++at) {
        wait_copies<1>();
        __syncthreads();  // this step is here, and nobody reads the one before
        fetch(at + 2);
        const Stage& stage = stages[at % STAGES];
#pragma unroll 1  // registers for one half
        for (int half = 0; half < 2; ++half) {
            unsigned q[4][4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const Weights eight = stage.weights[half][side + n * 8 + lane / 4][lane % 4];
                q[n][0] = pair<0>(eight.at, A());
                q[n][1] = pair<1>(eight.at, A());
                q[n][2] = pair<2>(eight.at, A());
                q[n][3] = pair<3>(eight.at, A());
            }
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int row = upper + m * 16 + lane / 4;
                const auto above = stage.rows[half][row][lane % 4];
                const auto below = stage.rows[half][row + 8][lane % 4];
                const unsigned low[4] = {above.at[0], below.at[0], above.at[1], below.at[1]};
                const unsigned high[4] = {above.at[2], below.at[2], above.at[3], below.at[3]};
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    float part[4] = {};  // tensor cores truncate what they add to a sum
                    mma(part, low, q[n][0], q[n][1], A());
                    mma(part, high, q[n][2], q[n][3], A());
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[m][n][i] += part[i];
                }
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
                const int out = blockIdx.x * SIDE + side + n * 8 + lane % 4 * 2 + i % 2;
                if (row < rows && out < N)
                    y[int64(row) * N + out] = T(sum[m][n][i] * scale[out] + (bias ? bias[out] : 0.f));
            }
}

template <class T> struct In16 { using type = T; };
template <> struct In16<float> { using type = bf16; };
#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    int8_linear_dot_##name(const T* x, const signed char* w, const float* scale,                 \
                           const float* bias, T* y, int64 step, int rows, int N, int K) {        \
        dot(x, w, scale, bias, y, step, rows, N, K);                                             \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                            \
    int8_linear_arrange_##name(const T* x, In16<T>::type* a, int64 step, int K, int padded) {    \
        arrange(x, a, step, K, padded);                                                          \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2)                                         \
    int8_linear_gemm_##name(const In16<T>::type* a, const signed char* w, const float* scale,    \
                            const float* bias, T* y, int rows, int N, int K, int padded,         \
                            int packs) {                                                         \
        gemm(a, w, scale, bias, y, rows, N, K, padded, packs);                                   \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
