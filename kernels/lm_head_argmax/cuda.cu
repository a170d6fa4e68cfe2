// The best token of each block: token = argmax over its `each` tokens v of x . w[v], for up to 4
// rows of x at a time (blockIdx.y).  A warp per token, 128 threads; no logit is written.
#include "cuda_common.cuh"

constexpr int ROWS = 4;  // of x, in registers
constexpr int WARPS = 4;

// Whether (v, token) stands before (top, best): larger, or equal and earlier; a NaN before numbers.
__device__ inline bool before(float v, int token, float top, int best) {
    const bool nan = v != v, was = top != top;
    if (nan || was) return nan && (!was || token < best);
    return v > top || (v == top && token < best);
}

template <class T>
__device__ void lm_head_argmax(const T* x, const T* w, float* tops, int* tokens, int64 step,
                               int rows, int vocab, int k, int each) {
    __shared__ float best_top[WARPS][ROWS];
    __shared__ int best_token[WARPS][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.y * ROWS;
    const int count = rows - first < ROWS ? rows - first : ROWS;
    const int begin = blockIdx.x * each, end = begin + each < vocab ? begin + each : vocab;
    x += first * step;
    float top[ROWS];
    int token[ROWS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
        top[m] = -3.4e38f;
        token[m] = 0x7fffffff;
    }
    bool wide = k % Pack<T>::size == 0 && aligned(w) && aligned(x) && step % Pack<T>::size == 0;
    for (int v = begin + warp; v < end; v += WARPS) {
        const T* row = w + int64(v) * k;
        float sum[ROWS] = {};
        if (wide) {
            for (int i = lane * Pack<T>::size; i < k; i += 32 * Pack<T>::size) {
                const Pack<T> weights = *reinterpret_cast<const Pack<T>*>(row + i);
#pragma unroll
                for (int m = 0; m < ROWS; ++m) {
                    if (m >= count) break;
                    const Pack<T> in = *reinterpret_cast<const Pack<T>*>(x + m * step + i);
#pragma unroll
                    for (int u = 0; u < Pack<T>::size; ++u)
                        sum[m] += float(in.at[u]) * float(weights.at[u]);
                }
            }
        } else {
            for (int i = lane; i < k; i += 32)
#pragma unroll
                for (int m = 0; m < ROWS; ++m)
                    if (m < count) sum[m] += float(x[m * step + i]) * float(row[i]);
        }
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            const float logit = warp_sum(sum[m]);
            if (token[m] == 0x7fffffff || before(logit, v, top[m], token[m])) {
                top[m] = logit;
                token[m] = v;
            }
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
        if (lane == 0) {
            best_top[warp][m] = top[m];
            best_token[warp][m] = token[m];
        }
    __syncthreads();
    const int m = threadIdx.x;
    if (m >= count) return;
    float best = best_top[0][m];
    int at = best_token[0][m];
    for (int i = 1; i < WARPS; ++i)
        if (best_token[i][m] != 0x7fffffff && before(best_top[i][m], best_token[i][m], best, at)) {
            best = best_top[i][m];
            at = best_token[i][m];
        }
    tops[int64(blockIdx.x) * rows + first + m] = best;
    tokens[int64(blockIdx.x) * rows + first + m] = at;
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    lm_head_argmax_##name(const T* x, const T* w, float* tops, int* tokens, int64 step,          \
                          int rows, int vocab, int k, int each) {                                \
        lm_head_argmax(x, w, tops, tokens, step, rows, vocab, k, each);                          \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
