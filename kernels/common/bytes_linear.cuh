// Products of rows of bytes on tensor cores: y = (q w^T) * scale_x * scale + bias, q (rows, padded)
// the quantized rows of x, w (N, K).  `few` is for up to 16 rows at a time, where reading w is the
// time, `gemm` for tiles of 128 rows by 128 outputs.  `F::multiply` adds up a product of bytes.
// Of 64 inputs, a lane takes 16 side by side, of a row of x and of one of w: which of them meet in
// one of the two instructions is free as long as both sides agree, and nothing needs shuffling.
#pragma once
#include "mma.cuh"

constexpr int STEP = 64;  // inputs

using Bytes = Pack<unsigned>;  // 16 numbers

// 16 weights of a row of K from k on, zeros past its end.
__device__ inline Bytes weights(const signed char* row, int k, int K, bool packs) {
    if (packs && k < K) return *reinterpret_cast<const Bytes*>(row + k);
    Bytes bytes = {};
#pragma unroll
    for (int u = 0; u < 16; ++u)
        if (k + u < K) bytes.at[u / 4] |= unsigned(row[k + u] & 255) << 8 * (u % 4);
    return bytes;
}

template <class T> struct Ends {  // what turns sums into outputs
    const float *scale_x, *scale, *bias;
    T* y;
    int rows, N;
    template <class Sum> __device__ void operator()(int m, int n, Sum sum) const {
        if (m < rows && n < N)
            y[int64(m) * N + n] = T(float(sum) * (scale_x[m] * scale[n]) + (bias ? bias[n] : 0.f));
    }
};

// 8 outputs of 16 rows (blockIdx.y): 4 warps take every fourth step of the inputs, 4 steps at once
// where rows of w start at 16 bytes.
template <class F, bool PACKS, class T>
__device__ void sums(typename F::Sum (&sum)[4], const signed char* q, const signed char* w,
                     const Ends<T>& ends, int K, int padded) {
    constexpr int WARPS = 4, AT_ONCE = PACKS ? 4 : 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = blockIdx.y * 16 + lane / 4, n = blockIdx.x * 8 + lane / 4;
    w += int64(min(n, ends.N - 1)) * K;
    q += int64(row) * padded;
    for (int first = warp * STEP; first < padded; first += AT_ONCE * WARPS * STEP) {
        Bytes a[AT_ONCE] = {}, below[AT_ONCE] = {}, b[AT_ONCE] = {};
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const int k = first + u * WARPS * STEP + lane % 4 * 16;
            if (k >= padded) continue;
            b[u] = weights(w, k, K, PACKS);
            if (row < ends.rows) a[u] = *reinterpret_cast<const Bytes*>(q + k);
            if (row + 8 < ends.rows)
                below[u] = *reinterpret_cast<const Bytes*>(q + 8 * int64(padded) + k);
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) F::multiply(sum, a[u], below[u], b[u]);
    }
}

template <class F, class T>
__device__ void few(const signed char* q, const signed char* w, Ends<T> ends, int K, int padded,
                    bool packs) {
    __shared__ typename F::Sum partial[4][16][8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    typename F::Sum sum[4] = {};
    packs ? sums<F, true>(sum, q, w, ends, K, padded) : sums<F, false>(sum, q, w, ends, K, padded);
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[warp][lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = sum[i];
    __syncthreads();
    const int m = threadIdx.x / 8, column = threadIdx.x % 8;
    ends(blockIdx.y * 16 + m, blockIdx.x * 8 + column,
         partial[0][m][column] + partial[1][m][column] + partial[2][m][column] +
             partial[3][m][column]);
}

// 128 rows (blockIdx.y) by 128 outputs, 8 warps of 64 by 32, the next two steps on their way.
template <class F, class T>
__device__ void gemm(const signed char* q, const signed char* w, Ends<T> ends, int K, int padded,
                     bool packs) {
    constexpr int SIDE = 128, STAGES = 3;
    __shared__ __align__(16) signed char tiles[STAGES][2 * SIDE * STEP];  // rows of x, then of w
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rows = blockIdx.y * SIDE, outputs = blockIdx.x * SIDE, steps = padded / STEP;
    const auto fill = [&](int at) {
        if (at < steps)
            for (int i = threadIdx.x; i < 2 * SIDE * 4; i += 256) {
                const int side = i / 4, k = at * STEP + i % 4 * 16;
                signed char* to = tiles[at % STAGES] + i * 16;
                if (side < SIDE) {
                    const bool inside = rows + side < ends.rows;
                    copy_async(to, inside ? q + int64(rows + side) * padded + k : q, inside);
                    continue;
                }
                const int n = outputs + side - SIDE;
                if (packs) {
                    const bool inside = n < ends.N && k < K;
                    copy_async(to, inside ? w + int64(n) * K + k : w, inside);
                } else {
                    *reinterpret_cast<Bytes*>(to) =
                        n < ends.N ? weights(w + int64(n) * K, k, K, false) : Bytes{};
                }
            }
        commit_copies();  // an empty group where nothing is left: what waits counts groups
    };
    typename F::Sum sum[4][4][4] = {};
    fill(0);
    fill(1);
    for (int step = 0; step < steps; ++step) {
        wait_copies<1>();
        __syncthreads();  // this step's tiles are here, and nobody reads those of the step before
        fill(step + 2);
        // a lane's 16 bytes: eight lanes side by side read 128 that follow one another
        const Bytes* a = reinterpret_cast<const Bytes*>(tiles[step % STAGES]) +
                         (warp / 4 * 64 + lane / 4) * 4 + lane % 4;
        const Bytes* b = reinterpret_cast<const Bytes*>(tiles[step % STAGES]) +
                         (SIDE + warp % 4 * 32 + lane / 4) * 4 + lane % 4;
        Bytes columns[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) columns[n] = b[n * 8 * 4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const Bytes above = a[m * 16 * 4], below = a[(m * 16 + 8) * 4];
#pragma unroll
            for (int n = 0; n < 4; ++n) F::multiply(sum[m][n], above, below, columns[n]);
        }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                ends(rows + warp / 4 * 64 + m * 16 + lane / 4 + i / 2 * 8,
                     outputs + warp % 4 * 32 + n * 8 + lane % 4 * 2 + i % 2, sum[m][n][i]);
}

