// softmax(q k^T * scale) v on Hopper: a block of 384 threads has 128 queries.  One warpgroup copies
// tiles of 128 keys or values into a ring of stages; two multiply, 64 queries each.  Of a step a
// warpgroup issues the scores of the next keys and the sum over the last values, and makes weights
// of the scores while tensor cores are still at the values (heads of 64; of 128, after them).  The
// two take turns to issue: one has the tensor cores while the other computes exponentials, of which
// a multiprocessor makes 16 a cycle.
//
//     filled:      keys 0, keys 1, values 0, keys 2, values 1, ... values n - 1
//     multiplied:  scores 0 | scores 1, sum 0 | scores 2, sum 1 | ... | sum n - 1
//
// Scores are of q and keys as they lie; weights go from registers, rounded to T, and meet values
// that tensor cores turn.  Sources: Shah et al. 2024 (FlashAttention-3),
// https://arxiv.org/abs/2407.08608
#pragma once
#include "ring.cuh"

#ifdef HOPPER
constexpr int TILE_ROWS = 128;  // queries of a block, and keys of a step

template <class T, int D> struct AttentionMemory {
    static constexpr int STAGES = 5;
    using Tile = SwizzledTile<TILE_ROWS, D * sizeof(T)>;
    Tile query, stages[STAGES];
    Ring<STAGES> ring;
    Mbarrier turn[2];
};

struct AttentionSizes {
    int queries, keys, dim, causal;
    float to_base_two;  // of the scores: the scale times log2(e)
};

__device__ inline float power_of_two(float exponent) {
#ifdef __CUDA_ARCH__
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
#else
    return exp2f(exponent);
#endif
}

// Rows `first` on of `from`, zeros from row `rows` and column `dim` on.
template <class T, class Tile>
__device__ void copy_rows(Tile& tile, const T* from, int64 token, int first, int rows, int dim,
                          bool packs) {
    if (packs)
        tile.each_chunk([&](char* to, int row, int byte) {
            const int r = first + row, d = byte / sizeof(T);
            copy_async(to, from + min(r, rows - 1) * token + d, r < rows && d < dim);
        });
    else
        tile.template each_chunk<1>([&](char* to, int row, int byte) {
            const int r = first + row, d = byte / sizeof(T);
            Pack<T> pack;
#pragma unroll
            for (int u = 0; u < Pack<T>::size; ++u)
                pack.at[u] = r < rows && d + u < dim ? from[r * token + d + u] : T(0.f);
            put(to, *reinterpret_cast<const Pack<unsigned>*>(&pack));
        });
}

// Maxima, sums and weights of a row of softmax as keys come; a thread has two rows.
struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {}, keep[2];

    // With the maxima of these scores; `keep` is what weights made so far must be multiplied by.
    __device__ void rise(const float (&score)[64], float to_base_two) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = top[half];
#pragma unroll
            for (int i = 2 * half; i < 64; i += 4)
                most = fmaxf(most, fmaxf(score[i], score[i + 1]));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
            most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
            keep[half] = power_of_two((top[half] - most) * to_base_two);
            top[half] = most;
            total[half] *= keep[half];
        }
    }
    // Scores become weights.  Not fused: that is inexact where a score is large and the maximum.
    __device__ void weigh(float (&score)[64], float to_base_two) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            score[i] = power_of_two((score[i] - top[i / 2 % 2]) * to_base_two);
            total[i / 2 % 2] += score[i];
        }
    }
    // The sum over all keys, from the four threads of a row.
    __device__ float whole(int half) const {
        const float two = total[half] + __shfl_xor_sync(0xffffffffu, total[half], 1);
        return two + __shfl_xor_sync(0xffffffffu, two, 2);
    }
};

// No query looks at keys past the end, nor at later ones than its own; `first` is that of the
// scores.
__device__ inline void mask(float (&score)[64], int first, int row, const AttentionSizes& n) {
    const int after = n.keys - n.queries;
    if (first + TILE_ROWS <= n.keys && !(n.causal && first + TILE_ROWS > after + row + 1)) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int all = n.causal ? min(n.keys, after + row + row_of(2 * half) + 1) : n.keys;
        const int seen = all - first - column_of(0);
#pragma unroll
        for (int i = 2 * half; i < 64; i += 4)
#pragma unroll
            for (int u = 0; u < 2; ++u)
                if (i / 4 * 8 + u >= seen) score[i + u] = -INFINITY;
    }
}

template <class T, int D>
__device__ void copy_tiles(AttentionMemory<T, D>& memory, const T* q, const T* k, const T* v,
                           int64 q_token, int64 k_token, int64 v_token, int start, int steps,
                           const AttentionSizes& n, bool packs) {
    Filler<AttentionMemory<T, D>::STAGES> filler{memory.ring};
    for (int i = 0; i < 2 * steps; ++i) {  // keys 0, keys 1, values 0, ... values n - 1
        const bool keys = i == 0 || (i % 2 == 1 && i < 2 * steps - 1);
        const int step = keys ? (i + 1) / 2 : (i - 1) / 2;
        filler.fill([&](int stage) {
            if (i == 0) copy_rows(memory.query, q, q_token, start, n.queries, n.dim, packs);
            copy_rows(memory.stages[stage], keys ? k : v, keys ? k_token : v_token,
                      step * TILE_ROWS, n.keys, n.dim, packs);
        });
    }
    filler.finish();
}

template <class T, int D>
__device__ void attend(AttentionMemory<T, D>& memory, T* y, int64 y_token, int start, int steps,
                       const AttentionSizes& n) {
    using Memory = AttentionMemory<T, D>;
    const int mine = threadIdx.x / WARPGROUP - 1;        // which of the two
    const int row = start + mine * 64;                   // the first of this warpgroup's queries
    Place<Memory::STAGES> at;
    Softmax softmax;
    float out[D / 2] = {};
    unsigned weights[TILE_ROWS / 16][4];  // rounded, as 16 keys a time meet their values

    const auto issue_scores = [&](float (&score)[64], const typename Memory::Tile& keys) {
#pragma unroll
        for (int byte = 0; byte < D * int(sizeof(T)); byte += 32)
            wgmma(score, memory.query.rows(mine * 64, byte), keys.rows(0, byte), byte > 0, T());
        commit();
    };
    const auto issue_sum = [&](const typename Memory::Tile& values) {
#pragma unroll
        for (int step = 0; step < TILE_ROWS / 16; ++step)
            wgmma(out, weights[step], values.columns(step * 16), T());
        commit();
    };
    const auto round_weights = [&](const float (&score)[64]) {
#pragma unroll
        for (int step = 0; step < TILE_ROWS / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                weights[step][i] = pack(score[step * 8 + 2 * i], score[step * 8 + 2 * i + 1], T());
    };

    {
        float score[64];  // of one step: registers that kept them for the next would be too many
        memory.ring.await(at);
        fence();
        issue_scores(score, memory.stages[at.stage]);
        wait_for<0>(score);
        memory.ring.hand_back(at);
        at.next();
        mask(score, 0, row, n);
        softmax.rise(score, n.to_base_two);
        softmax.weigh(score, n.to_base_two);
        round_weights(score);
    }
    for (int step = 1; step < steps; ++step) {
        float score[64];
        const auto keys = at;
        at.next();
        memory.ring.await(keys);
        wait_until(memory.turn[mine], (step - 1 & 1) ^ (mine == 0));  // the first one need not wait
        fence();
        issue_scores(score, memory.stages[keys.stage]);
        memory.ring.await(at);
        fence(out, weights);
        issue_sum(memory.stages[at.stage]);
        if (threadIdx.x % 32 == 0) arrive(memory.turn[1 - mine]);
        wait_for<1>(score);
        memory.ring.hand_back(keys);
        mask(score, step * TILE_ROWS, row, n);
        softmax.rise(score, n.to_base_two);
        softmax.weigh(score, n.to_base_two);
        // of heads of 128 ptxas makes the weights after the wait, since with them it runs out of
        // registers before: what hides them is the other warpgroup alone
        if constexpr (D == 64) settle(softmax.total[0] + softmax.total[1]);
        wait_for<0>(out, weights);
        memory.ring.hand_back(at);
        at.next();
#pragma unroll
        for (int i = 0; i < D / 2; ++i) out[i] *= softmax.keep[i / 2 % 2];
        round_weights(score);
    }
    memory.ring.await(at);
    fence(out, weights);
    issue_sum(memory.stages[at.stage]);
    wait_for<0>(out, weights);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float all = softmax.whole(half);
        const int t = row + row_of(2 * half);
        if (t >= n.queries) continue;
#pragma unroll
        for (int i = 2 * half; i < D / 2; i += 4)
#pragma unroll
            for (int u = i; u < i + 2; ++u)
                if (column_of(u) < n.dim) y[t * y_token + column_of(u)] = T(out[u] / all);
    }
}

// Queries `start` on of one head; q, k, v and y are its own, *_token elements from one to the next.
template <class T, int D>
__device__ void hopper_attention(const T* q, const T* k, const T* v, T* y, int64 q_token,
                                 int64 k_token, int64 v_token, int64 y_token, int start,
                                 AttentionSizes n, bool packs) {
    DYNAMIC_SHARED(char, dynamic);
    auto& memory = *reinterpret_cast<AttentionMemory<T, D>*>(swizzled_memory(dynamic));
    const int last = n.causal ? min(n.keys, n.keys - n.queries + start + TILE_ROWS) : n.keys;
    const int steps = (last + TILE_ROWS - 1) / TILE_ROWS;
    if (threadIdx.x == 0) {
        memory.ring.set_up_for(2 * 4);
        set_up(memory.turn[0], 4);
        set_up(memory.turn[1], 4);
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        shrink_to<40>();
        copy_tiles(memory, q, k, v, q_token, k_token, v_token, start, steps, n, packs);
    } else {
        grow_to<232>();
        attend(memory, y, y_token, start, steps, n);
    }
}
#endif
