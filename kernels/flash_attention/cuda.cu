// softmax(q k^T * scale) v by blocks, 128 threads each: 64 queries and 64 keys on tensor cores in
// bf16 and fp16 (a warp per 16 queries), 32 queries on CUDA cores in fp32, which tensor cores would
// round.  Keys of the next block are copied while this one's weights meet the values, and its
// values while the next scores are made.  On an sm_90a bf16 and fp16 go to flash_wgmma.cuh instead,
// 128 queries and 384 threads a block.  blockIdx: block of queries (the last first), head, batch.
#include "flash_wgmma.cuh"
#include "mma.cuh"

struct Places {  // elements from one batch, head, token to the next
    int64 batch, head, token;
};

// A tile of ROWS rows of D numbers in shared memory, 16 bytes between rows against bank conflicts.
template <class T, int ROWS, int D> struct Tile {
    static constexpr int STEP = D + 16 / sizeof(T);
    T at[ROWS * STEP];

    // Rows `first` on of `from`, zeros from row `rows` and column `dim` on.
    __device__ void fill(const T* from, int64 token, int first, int rows, int dim, bool packs) {
        constexpr int N = Pack<T>::size;
#ifdef __CUDA_ARCH__
        if (packs) {
            for (int i = threadIdx.x; i < ROWS * D / N; i += blockDim.x) {
                const int r = i / (D / N), d = i % (D / N) * N;
                const bool inside = first + r < rows && d < dim;
                copy_async(at + r * STEP + d, inside ? from + (first + r) * token + d : from, inside);
            }
            return commit_copies();
        }
#endif
        for (int i = threadIdx.x; i < ROWS * D; i += blockDim.x) {
            const int r = i / D, d = i % D;
            at[r * STEP + d] = first + r < rows && d < dim ? from[(first + r) * token + d] : T(0.f);
        }
#ifdef __CUDA_ARCH__
        commit_copies();  // an empty group: what waits may count on one per tile
#endif
    }
};

#ifdef __CUDA_ARCH__
template <class T, int D>
__device__ void with_tensor_cores(const T* q, const T* k, const T* v, T* y, Places qs, Places ks,
                                  Places vs, Places ys, int start, int T_, int S, int dim,
                                  int causal, int packs, float scale) {
    constexpr int N = 64;
    using Block = Tile<T, N, D>;
    __shared__ __align__(16) char memory[2 * sizeof(Block)];
    Block &keys = *reinterpret_cast<Block*>(memory), &values = (&keys)[1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = start + warp * 16 + lane / 4;
    const int last = causal ? min(S, S - T_ + start + N) : S;
    const float to_base_two = scale * 1.4426950408889634f;

    unsigned query[D / 16][4];
    values.fill(q, qs.token, start, T_, dim, packs);
    keys.fill(k, ks.token, 0, S, dim, packs);
    wait_copies<1>();
    __syncthreads();
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
        load_matrices(query[d], values.at + (warp * 16 + lane % 16) * Block::STEP + d * 16 + lane / 16 * 8);
    __syncthreads();
    values.fill(v, vs.token, 0, S, dim, packs);

    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int first = 0; first < last; first += N) {
        wait_copies<1>();  // the keys are here, the values may be on their way
        __syncthreads();
        float score[N / 8][4] = {};
#pragma unroll
        for (int d = 0; d < D / 16; ++d)
#pragma unroll
            for (int n = 0; n < N / 16; ++n) {
                unsigned b[4];  // keys n * 16 .. + 15: of the first 8 both halves of d, then the rest
                load_matrices(b, keys.at + (n * 16 + lane / 16 * 8 + lane % 8) * Block::STEP + d * 16 +
                                     lane / 8 % 2 * 8);
                mma(score[2 * n], query[d], b[0], b[1], T());
                mma(score[2 * n + 1], query[d], b[2], b[3], T());
            }
        __syncthreads();
        if (first + N < last) keys.fill(k, ks.token, first + N, S, dim, packs);
        else commit_copies();

        if (first + N > S || (causal && first + N > S - T_ + start + 1))
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = first + n * 8 + lane % 4 * 2 + i % 2;
                    if (key >= S || (causal && key > S - T_ + row + i / 2 * 8)) score[n][i] = -INFINITY;
                }
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // rows lane / 4 and lane / 4 + 8
            float most = top[half];
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
                most = fmaxf(most, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            const float keep = exp2f((top[half] - most) * to_base_two);
            top[half] = most;
            total[half] *= keep;
#pragma unroll
            for (int n = 0; n < N / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    score[n][i] = exp2f((score[n][i] - most) * to_base_two);
                    total[half] += score[n][i];
                }
#pragma unroll
            for (int d = 0; d < D / 8; ++d) {
                out[d][2 * half] *= keep;
                out[d][2 * half + 1] *= keep;
            }
        }
        wait_copies<1>();  // the values are here
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            const unsigned weights[4] = {
                pack(score[2 * n][0], score[2 * n][1], T()), pack(score[2 * n][2], score[2 * n][3], T()),
                pack(score[2 * n + 1][0], score[2 * n + 1][1], T()),
                pack(score[2 * n + 1][2], score[2 * n + 1][3], T())};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                unsigned b[4];
                load_transposed(b, values.at + (n * 16 + lane % 16) * Block::STEP + d * 16 + lane / 16 * 8);
                mma(out[2 * d], weights, b[0], b[1], T());
                mma(out[2 * d + 1], weights, b[2], b[3], T());
            }
        }
        __syncthreads();
        if (first + N < last) values.fill(v, vs.token, first + N, S, dim, packs);
        else commit_copies();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float all = total[half] + __shfl_xor_sync(0xffffffffu, total[half], 1);
        all += __shfl_xor_sync(0xffffffffu, all, 2);
        const int t = row + half * 8;
        if (t >= T_) continue;
#pragma unroll
        for (int d = 0; d < D / 8; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int at = d * 8 + lane % 4 * 2 + i;
                if (at < dim) y[t * ys.token + at] = T(out[d][2 * half + i] / all);
            }
    }
}
#endif

// ROWS queries, 128 / ROWS threads side by side for each: they share its keys, then its columns.
template <class T, int D, int ROWS>
__device__ void with_cuda_cores(const T* q, const T* k, const T* v, T* y, Places qs, Places ks,
                                Places vs, Places ys, int start, int T_, int S, int dim, int causal,
                                int packs, float scale) {
    constexpr int EACH = 128 / ROWS, N = D == 64 ? 32 : 16, MINE = D / EACH;
    __shared__ Tile<T, ROWS, D> query;
    __shared__ Tile<T, N, D> keys, values;
    __shared__ float weight[ROWS][N + 1];
    const int r = threadIdx.x / EACH, part = threadIdx.x % EACH, row = start + r;
    const int last = causal ? min(S, S - T_ + start + ROWS) : S;
    query.fill(q, qs.token, start, T_, dim, false);
    float out[MINE] = {}, top = -INFINITY, total = 0.f;
    for (int first = 0; first < last; first += N) {
        __syncthreads();  // before the tiles change
        keys.fill(k, ks.token, first, S, dim, false);
        values.fill(v, vs.token, first, S, dim, false);
        __syncthreads();
        float most = top;
        for (int n = part; n < N; n += EACH) {
            float sum = 0.f;
            for (int d = 0; d < D; ++d)
                sum += float(query.at[r * query.STEP + d]) * float(keys.at[n * keys.STEP + d]);
            const int key = first + n;
            if (key >= S || (causal && key > S - T_ + row)) sum = -INFINITY;
            weight[r][n] = sum;
            most = fmaxf(most, sum);
        }
        for (int o = EACH / 2; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, o));
        const float keep = expf((top - most) * scale);
        top = most;
        total *= keep;
        for (int n = part; n < N; n += EACH) {
            const float p = expf((weight[r][n] - most) * scale);
            weight[r][n] = p;
            total += p;
        }
        __syncthreads();  // a row's weights are the work of several threads
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            float sum = out[i] * keep;
            for (int n = 0; n < N; ++n)
                sum += weight[r][n] * float(values.at[n * values.STEP + i * EACH + part]);
            out[i] = sum;
        }
    }
    for (int o = EACH / 2; o; o /= 2) total += __shfl_xor_sync(0xffffffffu, total, o);
    if (row >= T_) return;
#pragma unroll
    for (int i = 0; i < MINE; ++i)
        if (i * EACH + part < dim) y[row * ys.token + i * EACH + part] = T(out[i] / total);
}

template <class T> struct Launch {  // queries and threads of a block; blocks of a multiprocessor
#ifdef HOPPER
    static constexpr bool WGMMA = sizeof(T) == 2;
#else
    static constexpr bool WGMMA = false;
#endif
    static constexpr int ROWS = sizeof(T) == 4 ? 32 : WGMMA ? 128 : 64, THREADS = WGMMA ? 384 : 128;
    static constexpr int BLOCKS_64 = WGMMA ? 1 : 3, BLOCKS_128 = WGMMA ? 1 : 2;
};

template <class T, int D>
__device__ void flash_attention(const T* q, const T* k, const T* v, T* y, Places qs, Places ks,
                                Places vs, Places ys, int group, int T_, int S, int dim, int causal,
                                int packs, float scale) {
    constexpr int ROWS = Launch<T>::ROWS;
    const int start = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y, b = blockIdx.z;
    q += b * qs.batch + head * qs.head;
    k += b * ks.batch + head / group * ks.head;
    v += b * vs.batch + head / group * vs.head;
    y += b * ys.batch + head * ys.head;
#if defined(HOPPER)
    if constexpr (sizeof(T) == 2)
        return hopper_attention<T, D>(q, k, v, y, qs.token, ks.token, vs.token, ys.token, start,
                                      {T_, S, dim, causal, scale * 1.4426950408889634f}, packs);
    else
#elif defined(__CUDA_ARCH__)
    if constexpr (sizeof(T) == 2)
        return with_tensor_cores<T, D>(q, k, v, y, qs, ks, vs, ys, start, T_, S, dim, causal, packs, scale);
    else
#endif
        with_cuda_cores<T, D, ROWS>(q, k, v, y, qs, ks, vs, ys, start, T_, S, dim, causal, packs, scale);
}

#define ARGUMENTS(T)                                                                             \
    const T *q, const T *k, const T *v, T *y, int64 q0, int64 q1, int64 q2, int64 k0, int64 k1,  \
        int64 k2, int64 v0, int64 v1, int64 v2, int64 y0, int64 y1, int64 y2, int group, int T_, \
        int S, int dim, int causal, int packs, float scale
#define BODY(T, D)                                                                               \
    flash_attention<T, D>(q, k, v, y, {q0, q1, q2}, {k0, k1, k2}, {v0, v1, v2}, {y0, y1, y2},    \
                          group, T_, S, dim, causal, packs, scale)
#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(Launch<T>::THREADS, Launch<T>::BLOCKS_64)       \
    flash_attention_64_##name(ARGUMENTS(T)) { BODY(T, 64); }                                     \
    extern "C" __global__ void __launch_bounds__(Launch<T>::THREADS, Launch<T>::BLOCKS_128)      \
    flash_attention_128_##name(ARGUMENTS(T)) { BODY(T, 128); }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
