// Attention of a few tokens over cached keys and values, which stand in pages.  Split: a block of
// 128 threads per chunk of 256 keys, kv head and 8 of its queries; D / 8 threads side by side read
// a key, 16 bytes each, once for the 8 queries.  Merge: a block per token and head.
// `part` (B, Hkv, rows, chunks, D) and `state` (..., 2: maximum, sum) in fp32 carry one to the other.
#include "cuda_common.cuh"

constexpr int CHUNK = 256, ROWS = 8, EACH = 8;  // keys of a block, its queries, numbers of a thread

// EACH numbers from p on, zeros from `left` on.
template <class T>
__device__ inline void load_each(float (&to)[EACH], const T* p, int left, bool packs) {
    if (packs && left >= EACH) {
#pragma unroll
        for (int i = 0; i < EACH; i += Pack<T>::size) {
            const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p + i);
#pragma unroll
            for (int u = 0; u < Pack<T>::size; ++u) to[i + u] = float(pack.at[u]);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) to[i] = i < left ? float(p[i]) : 0.f;
}

struct Steps {  // elements from one (page or row, head, token) to the next
    int64 first, head, token;
};

// `most` is 0 without pages: the cache of row b is then `page` slots at b.
template <class T, int D>
__device__ void attend_split(const T* q, const T* k, const T* v, const int* table,
                             const int64* lengths, float* part, float* state, Steps qs, Steps ks,
                             Steps vs, int most, int blocks, int page, int kv_heads, int group,
                             int tokens, int dim, int packs, float scale) {
    constexpr int LANES = D / EACH, GROUPS = 128 / LANES;
    __shared__ float query[ROWS][D], score[ROWS][CHUNK];
    __shared__ float tops[ROWS], totals[ROWS], out[4][ROWS][D];
    __shared__ int64 places[CHUNK];  // page of each key; -1 for one that does not exist
    const int b = blockIdx.z, h = blockIdx.y % kv_heads, first_row = blockIdx.y / kv_heads * ROWS;
    const int chunk = blockIdx.x, first = chunk * CHUNK, rows = group * tokens;
    const int room = most ? most * page : page;
    const int length = int(lengths[b] < room ? lengths[b] : room);
    const int last = min(first + CHUNK, length), n = max(last - first, 0);
    const int lane = threadIdx.x % LANES, member = threadIdx.x / LANES, d0 = lane * EACH;

    for (int i = threadIdx.x; i < ROWS * D; i += 128) {
        const int r = first_row + i / D, d = i % D;
        query[i / D][d] = r < rows && d < dim ? float(q[b * qs.first + (h * group + r % group) * qs.head +
                                                        r / group * qs.token + d]) : 0.f;
    }
    for (int i = threadIdx.x; i < n; i += 128) {
        int64 at = b;
        if (most) {
            at = table[int64(b) * most + (first + i) / page];
            if (at < 0 || at >= blocks) at = -1;
        }
        places[i] = at;
    }
    __syncthreads();
    float mine[ROWS][EACH];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < EACH; ++i) mine[r][i] = query[r][d0 + i];
    // the same number of turns for every lane: shuffles need them all
    for (int turn = 0; turn < (n + GROUPS - 1) / GROUPS; ++turn) {
        const int i = turn * GROUPS + member;
        float key[EACH] = {};
        const bool there = i < n && places[i] >= 0;
        if (there) {
            const int slot = most ? (first + i) % page : first + i;
            load_each(key, k + places[i] * ks.first + h * ks.head + slot * ks.token + d0, dim - d0, packs);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0.f;
#pragma unroll
            for (int e = 0; e < EACH; ++e) sum += mine[r][e] * key[e];
            for (int o = LANES / 2; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            if (lane == 0 && i < n) {
                const int seen = length - tokens + (first_row + r) / group + 1;
                score[r][i] = first + i >= seen ? -INFINITY : there ? sum : NAN;
            }
        }
    }
    __syncthreads();
    for (int r = threadIdx.x / 32; r < ROWS; r += 4) {  // a warp per row
        float top = -INFINITY, total = 0.f;
        for (int i = threadIdx.x % 32; i < n; i += 32) top = fmaxf(top, score[r][i]);
        top = warp_max(top);
        const bool sees = first < length - tokens + (first_row + r) / group + 1;
        for (int i = threadIdx.x % 32; i < n; i += 32) {
            const float p = sees ? expf((score[r][i] - top) * scale) : 0.f;
            score[r][i] = p;
            total += p;
        }
        total = warp_sum(total);
        if (threadIdx.x % 32 == 0) {
            tops[r] = top;
            totals[r] = total;
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int e = 0; e < EACH; ++e) mine[r][e] = 0.f;
    for (int i = member; i < n; i += GROUPS) {
        if (places[i] < 0) continue;  // its weight is NaN, and so is the sum
        float value[EACH];
        const int slot = most ? (first + i) % page : first + i;
        load_each(value, v + places[i] * vs.first + h * vs.head + slot * vs.token + d0, dim - d0, packs);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int e = 0; e < EACH; ++e) mine[r][e] += score[r][i] * value[e];
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            float sum = mine[r][e];
            for (int o = LANES; o < 32; o *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            if (threadIdx.x % 32 < LANES) out[threadIdx.x / 32][r][d0 + e] = sum;
        }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * D; i += 128) {
        const int r = first_row + i / D, d = i % D;
        if (r >= rows || d >= dim) continue;
        const int64 at = ((int64(b) * kv_heads + h) * rows + r) * gridDim.x + chunk;
        part[at * dim + d] = out[0][i / D][d] + out[1][i / D][d] + out[2][i / D][d] + out[3][i / D][d];
        if (d == 0) {
            state[at * 2] = tops[i / D];
            state[at * 2 + 1] = totals[i / D];
        }
    }
}

template <class T>
__device__ void attend_merge(const float* part, const float* state, T* y, Steps ys, int chunks,
                             int group, int tokens, int dim, float scale) {
    const int t = blockIdx.x, head = blockIdx.y, b = blockIdx.z;
    const int64 row = (int64(b) * (gridDim.y / group) + head / group) * group * tokens + t * group + head % group;
    state += row * chunks * 2;
    part += row * chunks * dim;
    y += b * ys.first + head * ys.head + t * ys.token;
    float top = -INFINITY, total = 0.f;
    for (int c = 0; c < chunks; ++c) top = fmaxf(top, state[2 * c]);
    for (int c = 0; c < chunks; ++c)  // an empty chunk has no part in it
        if (state[2 * c + 1] != 0.f) total += expf((state[2 * c] - top) * scale) * state[2 * c + 1];
    for (int d = threadIdx.x; d < dim; d += blockDim.x) {
        float sum = 0.f;
        for (int c = 0; c < chunks; ++c)
            if (state[2 * c + 1] != 0.f) sum += expf((state[2 * c] - top) * scale) * part[int64(c) * dim + d];
        y[d] = T(total != 0.f ? sum / total : 0.f);
    }
}

#define SPLIT_ARGUMENTS(T)                                                                       \
    const T *q, const T *k, const T *v, const int *table, const int64 *lengths, float *part,     \
        float *state, int64 q0, int64 q1, int64 q2, int64 k0, int64 k1, int64 k2, int64 v0,      \
        int64 v1, int64 v2, int most, int blocks, int page, int kv_heads, int group, int tokens, \
        int dim, int packs, float scale
#define SPLIT(T, D)                                                                              \
    attend_split<T, D>(q, k, v, table, lengths, part, state, {q0, q1, q2}, {k0, k1, k2},         \
                       {v0, v1, v2}, most, blocks, page, kv_heads, group, tokens, dim, packs, scale)
#define MERGE_ARGUMENTS(T)                                                                       \
    const float *part, const float *state, T *y, int64 y0, int64 y1, int64 y2, int chunks,       \
        int group, int tokens, int dim, float scale
#define MERGE(T) attend_merge<T>(part, state, y, {y0, y1, y2}, chunks, group, tokens, dim, scale)
