// A token of the nucleus of softmax(x / temperature), a block per row, its size a multiple of 32.
// The logit at which the nucleus ends is searched among all bit patterns, WAYS at a time: 8 readings
// of a row that the second level of cache holds, whatever the numbers.  Sums have a fixed order.
// `step`: elements from one row to the next; `inverse`: 1 / temperature.
#include "cuda_common.cuh"

constexpr int WAYS = 16;

// The bits of v, turned so that they order as the numbers do; -0 is 0.
__device__ inline unsigned ordered(float v) {
    v += 0.f;
    const unsigned bits = *reinterpret_cast<const unsigned*>(&v);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline float number(unsigned key) {
    const unsigned bits = key ^ (key >> 31 ? 0x80000000u : 0xffffffffu);
    return *reinterpret_cast<const float*>(&bits);
}

// The sum of `v` over the lanes up to this one.
template <class V> __device__ inline V running_sum(V v, int lane) {
    for (int o = 1; o < 32; o *= 2) {
        const V before = __shfl_sync(0xffffffffu, v, lane >= o ? lane - o : 0);
        if (lane >= o) v += before;
    }
    return v;
}
__device__ inline int warp_count(int v) {
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

template <class T> struct Row {
    const T* x;
    int vocab, lane, warp, warps, each;  // each: tokens of a warp's run, in the vocabulary's order
    float top, inverse;

    __device__ Row(const T* x, int vocab, float inverse)
        : x(x), vocab(vocab), lane(threadIdx.x % 32), warp(threadIdx.x / 32), warps(blockDim.x / 32),
          each((vocab + 32 * warps - 1) / (32 * warps) * 32), top(0.f), inverse(inverse) {}
    __device__ float weight(float v) const { return expf((v - top) * inverse); }

    // Finds the largest logit; whether the row has a distribution.
    __device__ bool find_top(float* partial, float* flags) {
        float most = -INFINITY, bad = 0.f;
        each_element(x, vocab, [&](int, float v) {
            most = fmaxf(most, v);
            if (!(v < INFINITY)) bad = 1.f;
        });
        top = block_max(most, partial);
        return block_max(bad, flags) == 0.f && top > -INFINITY;
    }

    // The largest key from which on the mass reaches top_p of all; `target` is that mass.
    __device__ unsigned find_cut(float (&part)[WAYS][32], float* partial, float top_p, float& target) {
        float sum = 0.f;
        each_element(x, vocab, [&](int, float v) { sum += weight(v); });
        target = fmaxf(block_sum(sum, partial) * top_p, 1.2e-38f);  // the most probable weighs 1
        if (top_p >= 1.f) return 0;
        unsigned low = 0;
        for (int shift = 28; shift >= 0; shift -= 4) {  // the cut is in [low, low + 16 << shift)
            float mass[WAYS] = {};
            each_element(x, vocab, [&](int, float v) {
                const unsigned key = ordered(v);
                const float e = weight(v);
                const unsigned way = key < low ? 0 : (key - low) >> shift;  // beyond 15: above all
#pragma unroll
                for (unsigned w = 1; w < WAYS; ++w) mass[w] += key >= low && way >= w ? e : 0.f;
            });
            __syncthreads();  // the turn before has been read
#pragma unroll
            for (int w = 1; w < WAYS; ++w) {
                const float total = warp_sum(mass[w]);
                if (lane == 0) part[w][warp] = total;
            }
            __syncthreads();
            int chosen = 0;
            for (int w = 1; w < WAYS; ++w) {
                float total = 0.f;
                for (int i = 0; i < warps; ++i) total += part[w][i];
                if (total >= target) chosen = w;
            }
            low += unsigned(chosen) << shift;
        }
        return low;
    }

    // f(i, key, weight), every lane at once, for the warp's own run, 32 tokens a turn; past its end
    // i is -1 and the weight 0.
    template <class F> __device__ void run(F f) const {
        const int begin = warp * each;
        for (int i = begin + lane; i - lane < begin + each; i += 32) {
            const bool in = i < vocab;
            const float v = in ? float(x[i]) : -INFINITY;
            f(in ? i : -1, ordered(v), in ? weight(v) : 0.f);
        }
    }
};

template <class T>
__device__ void top_p_sampling(const T* x, const float* uniform, int64* token, int64 step, int vocab,
                               float inverse, float top_p) {
    __shared__ float part[WAYS][32], tops[32], flags[32], sums[32], above[32];
    __shared__ int equal[32], first[32], last[32];
    Row<T> row(x + blockIdx.x * step, vocab, inverse);
    const float u = uniform[blockIdx.x];
    token += blockIdx.x;
    if (!row.find_top(tops, flags) || u != u) {  // the whole block
        if (threadIdx.x == 0) *token = -1;
        return;
    }
    float target;
    const unsigned cut = row.find_cut(part, sums, top_p, target);

    float more = 0.f;
    int ties = 0;
    row.run([&](int i, unsigned key, float e) {
        more += key > cut ? e : 0.f;
        ties += i >= 0 && key == cut;
    });
    more = warp_sum(more);
    ties = warp_count(ties);
    if (row.lane == 0) {
        above[row.warp] = more;
        equal[row.warp] = ties;
    }
    __syncthreads();
    // every thread adds the same numbers in the same order
    float total = 0.f;
    ties = 0;
    for (int i = 0; i < row.warps; ++i) {
        total += above[i];
        ties += equal[i];
    }
    const float each = ties ? row.weight(number(cut)) : 0.f;
    // of equal logits as many as reach the target, the first ones
    const float wanted = each > 0.f ? ceilf(fminf((target - total) / each, 2.1e9f)) : 0.f;
    const int taken = min(ties, max(int(wanted), 1));
    const float goal = u * (total + float(taken) * each);

    float running = 0.f;  // before this warp's run
    int seen = 0;
    for (int i = 0; i < row.warp; ++i) {
        running += above[i] + float(min(equal[i], max(taken - seen, 0))) * each;
        seen += equal[i];
    }
    int found = 0x7fffffff, latest = -1;
    row.run([&](int i, unsigned key, float e) {
        const int tie = i >= 0 && key == cut;
        const int rank = seen + running_sum(tie, row.lane);
        const bool in = key > cut || (tie && rank <= taken);
        const float mass = in ? e : 0.f, here = running + running_sum(mass, row.lane);
        if (mass > 0.f) {
            latest = i;
            if (here > goal) found = min(found, i);
        }
        running = __shfl_sync(0xffffffffu, here, 31);
        seen = __shfl_sync(0xffffffffu, rank, 31);
    });
    for (int o = 16; o; o /= 2) {
        found = min(found, __shfl_xor_sync(0xffffffffu, found, o));
        latest = max(latest, __shfl_xor_sync(0xffffffffu, latest, o));
    }
    if (row.lane == 0) {
        first[row.warp] = found;
        last[row.warp] = latest;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < row.warps; ++i) {
            found = min(found, first[i]);
            latest = max(latest, last[i]);
        }
        *token = found < 0x7fffffff ? found : latest;
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                           \
    top_p_sampling_##name(const T* x, const float* uniform, int64* token, int64 step, int vocab, \
                          float inverse, float top_p) {                                          \
        top_p_sampling(x, uniform, token, step, vocab, inverse, top_p);                          \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
