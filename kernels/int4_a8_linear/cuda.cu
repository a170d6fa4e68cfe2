// y = sum over groups of (q . int8(x)) * scale_x * scale, + bias; packed and scale as in
// common/int4.h.  A first kernel quantizes x per row and group; then tensor cores sum in int32, by
// `few` for up to 16 rows at a time, where reading q is the time, or `gemm` for tiles of 64 by 128.
// A word of packed holds eight inputs of an output.  Its low nibbles are inputs 0, 4, 1, 5, its high
// ones 2, 6, 3, 7: shifted to the top of their bytes they are 16 q in int8, what one lane gives to a
// product of 32 inputs.  x is stored in that order, and no weight ever moves between lanes.
#include "int4.cuh"

constexpr int STRETCH = 128;        // inputs that are read at once
constexpr int STEPS = STRETCH / 32;  // products of 32 inputs
// An int32 sum that starts at these bits is, read as a float, 3 * 2^22 + the sum: no conversion.
// 128 products of 16 q and an int8 stay below 2^22.
constexpr int START = 0x4b400000;
constexpr float STARTED = 12582912.f;

struct alignas(8) Half {  // eight inputs that a lane gives to a product: 0, 4, 1, 5, then the rest
    unsigned at[2];
};

// Groups 4 blockIdx.y on of row blockIdx.x, a warp each: q (rows, K) in the order above within each
// eight, scale_x (groups, padded) fp32.
template <class T>
__device__ void quantize(const T* x, signed char* q, float* scale_x, int64 step, int K, int group,
                         int padded) {
    const int lane = threadIdx.x % 32, g = blockIdx.y * 4 + threadIdx.x / 32;
    if (g >= K / group) return;
    x += blockIdx.x * step + int64(g) * group;
    q += blockIdx.x * int64(K) + int64(g) * group;
    unsigned top = 0;  // bits of |x|, which order as the numbers do: infinity and NaN are the largest
    float mine[4] = {};
#pragma unroll
    for (int u = 0; u < 4; ++u)
        if (u * 32 < group) {
            mine[u] = float(x[u * 32 + lane]);
            top = max(top, *reinterpret_cast<const unsigned*>(&mine[u]) & 0x7fffffffu);
        }
    for (int o = 16; o; o /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, o));
    const bool finite = top < 0x7f800000u;
    const float each = fmaxf(*reinterpret_cast<const float*>(&top) / 127.f, 1.17549435e-38f);
    const float inverse = 1.f / each;
    const int i = lane % 8, place = lane / 8 * 8 + i % 4 / 2 * 4 + i % 2 * 2 + i / 4;
#pragma unroll
    for (int u = 0; u < 4; ++u)
        if (u * 32 < group) q[u * 32 + place] = finite ? int(rintf(mine[u] * inverse)) : 0;
    if (lane == 0) scale_x[int64(g) * padded + blockIdx.x] = finite ? each : NAN;
}

// sum (16 rows, 32 outputs) += those of group g, where a lane holds words(s) and rows(s) of step s.
template <int GROUP, class W, class R>
__device__ inline void add_group(float (&sum)[4][4], W words, R rows, int g, const Scales& scale,
                                 const float (&scale_x)[2]) {
    int whole[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) whole[n][i] = START;
#pragma unroll
    for (int s = g * GROUP / 32; s < (g + 1) * GROUP / 32; ++s) {
        const Words w = words(s);
        const Half above = rows(s, 0), below = rows(s, 1);
        const unsigned a[4] = {above.at[0], below.at[0], above.at[1], below.at[1]};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const unsigned word = w.at[n];
            mma(whole[n], a, (word << 4 & 0xf0f0f0f0u) ^ 0x80808080u,
                (word & 0xf0f0f0f0u) ^ 0x80808080u);
        }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sum[n][i] += (*reinterpret_cast<const float*>(&whole[n][i]) - STARTED) *
                         (scale_x[i / 2] * float(scale.at[scale_at(n, i)]));
}

struct Rows {  // of x in int8
    const signed char* q;
    const float* scale_x;  // (groups, padded)
    int rows, padded;
};

// 32 outputs of 16 rows (blockIdx.y): 8 warps take every eighth stretch of the inputs.
template <int GROUP>
__device__ void sums(float (&sum)[4][4], Rows x, const unsigned* packed, const bf16* scale, int N,
                     int K) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = blockIdx.y * 16 + lane / 4;
    const signed char* mine = x.q + int64(row) * K + lane % 4 * 8;
    packed = words_of(packed, blockIdx.x * 32 + lane / 4 * 4, lane % 4 * 8, K, N);
    scale = scales_of(scale, blockIdx.x * 32 + lane % 4 * 8, 0, K / GROUP, N);
    for (int first = warp * STRETCH; first < K; first += 8 * STRETCH) {
        Words words[STEPS] = {};
        Half rows[STEPS][2] = {};
        float scale_x[STRETCH / GROUP][2] = {};
        Scales scales[STRETCH / GROUP] = {};
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int k = first + s * 32;
            if (k >= K) continue;
            words[s] = *reinterpret_cast<const Words*>(packed + k * 2);
            if (row < x.rows) rows[s][0] = *reinterpret_cast<const Half*>(mine + k);
            if (row + 8 < x.rows) rows[s][1] = *reinterpret_cast<const Half*>(mine + 8 * int64(K) + k);
        }
#pragma unroll
        for (int g = 0; g < STRETCH / GROUP; ++g) {
            if (first + g * GROUP >= K) continue;
            scales[g] = *reinterpret_cast<const Scales*>(scale + (first / GROUP + g) * 16);
            const float* of_group = x.scale_x + int64(first / GROUP + g) * x.padded + row;
            if (row < x.rows) scale_x[g][0] = of_group[0];
            if (row + 8 < x.rows) scale_x[g][1] = of_group[8];
        }
#pragma unroll
        for (int g = 0; g < STRETCH / GROUP; ++g)
            add_group<GROUP>(sum, [&](int s) { return words[s]; },
                             [&](int s, int half) { return rows[s][half]; }, g, scales[g], scale_x[g]);
    }
}

template <class T>
__device__ void few(Rows x, const unsigned* packed, const bf16* scale, const float* bias, T* y, int N,
                    int K, int group) {
    __shared__ float partial[8][16][33];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[4][4] = {};
    group == 32 ? sums<32>(sum, x, packed, scale, N, K) : sums<128>(sum, x, packed, scale, N, K);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[warp][lane / 4 + i / 2 * 8][output_of(n, i)] = sum[n][i];
    __syncthreads();
    const int out = blockIdx.x * 32 + lane;
    for (int r = warp; r < 16; r += 8) {
        const int m = blockIdx.y * 16 + r;
        if (m >= x.rows || out >= N) continue;
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total += partial[i][r][lane];
        y[int64(m) * N + out] = T(total / 16.f + (bias ? bias[out] : 0.f));
    }
}

// 64 rows (blockIdx.y) by 128 outputs, a warp per 32 of each; the next stretch on its way.
constexpr int TILE = 64, STAGES = 2;
struct alignas(16) Stage {
    Half rows[STEPS][TILE][4];
    Words words[8][STRETCH / 8][4];  // of 16 outputs, of eight inputs; see place()
    Scales scales[STRETCH / 32][16];
    float scale_x[STRETCH / 32][TILE];
};

template <int GROUP>
__device__ void fill(Stage& stage, Rows x, const unsigned* packed, const bf16* scale, int N, int K,
                     int first) {
    constexpr int GROUPS = STRETCH / GROUP;
    const int rows = blockIdx.y * TILE, outputs = blockIdx.x * 128;
#pragma unroll 1
    for (int i = threadIdx.x; i < STEPS * TILE * 2; i += 256) {
        const int k = first + i / (TILE * 2) * 32 + i % 2 * 16, row = i / 2 % TILE;
        const bool inside = rows + row < x.rows && k < K;
        copy_async(reinterpret_cast<char*>(stage.rows) + i * 16,
                   inside ? x.q + int64(rows + row) * K + k : x.q, inside);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < 8 * (STRETCH / 8) * 4; i += 256) {
        const int quad = i % 4, octet = i / 4 % (STRETCH / 8), block = i / 4 / (STRETCH / 8);
        const bool inside = first + octet * 8 < K;
        const int output = outputs + block * 16 + quad * 4;
        copy_async(&stage.words[block][octet][place(octet, quad)],
                   inside ? words_of(packed, output, first + octet * 8, K, N) : packed, inside);
    }
    for (int i = threadIdx.x; i < GROUPS * 16; i += 256) {
        const int g = first / GROUP + i / 16;
        const bool inside = g < K / GROUP;
        copy_async(&stage.scales[0][0] + i,
                   inside ? scales_of(scale, outputs + i % 16 * 8, g, K / GROUP, N) : scale, inside);
    }
    for (int i = threadIdx.x; i < GROUPS * TILE / 4; i += 256) {
        const int g = first / GROUP + i / (TILE / 4);
        const bool inside = g < K / GROUP;
        copy_async(&stage.scale_x[0][0] + i * 4,
                   inside ? x.scale_x + int64(g) * x.padded + rows + i % (TILE / 4) * 4 : x.scale_x,
                   inside);
    }
    commit_copies();
}

template <int GROUP>
__device__ void tile(float (&sum)[2][4][4], Stage* stages, Rows x, const unsigned* packed,
                     const bf16* scale, int N, int K) {
    const int lane = threadIdx.x % 32, side = threadIdx.x / 32 % 4;
    fill<GROUP>(stages[0], x, packed, scale, N, K, 0);
    for (int first = 0; first < K; first += STRETCH) {
        const Stage& stage = stages[first / STRETCH % STAGES];
        wait_copies<0>();
        __syncthreads();  // this stretch is here, and nobody reads the one before
        if (first + STRETCH < K)
            fill<GROUP>(stages[(first / STRETCH + 1) % STAGES], x, packed, scale, N, K, first + STRETCH);
#pragma unroll
        for (int g = 0; g < STRETCH / GROUP; ++g) {
            const Scales scales = stage.scales[g][side * 4 + lane % 4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const int row = threadIdx.x / 128 * 32 + m * 16 + lane / 4;
                add_group<GROUP>(
                    sum[m],
                    [&](int s) {
                        const int octet = s * 4 + lane % 4;
                        return stage.words[side * 2 + lane / 16][octet][place(octet, lane / 4 % 4)];
                    },
                    [&](int s, int half) { return stage.rows[s][row + 8 * half][lane % 4]; }, g, scales,
                    {stage.scale_x[g][row], stage.scale_x[g][row + 8]});
            }
        }
    }
}

template <class T>
__device__ void gemm(Rows x, const unsigned* packed, const bf16* scale, const float* bias, T* y, int N,
                     int K, int group) {
    __shared__ Stage stages[STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum[2][4][4] = {};
    group == 32 ? tile<32>(sum, stages, x, packed, scale, N, K)
                : tile<128>(sum, stages, x, packed, scale, N, K);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = blockIdx.y * TILE + warp / 4 * 32 + m * 16 + lane / 4 + i / 2 * 8;
                const int out = blockIdx.x * 128 + warp % 4 * 32 + output_of(n, i);
                if (row < x.rows && out < N)
                    y[int64(row) * N + out] = T(sum[m][n][i] / 16.f + (bias ? bias[out] : 0.f));
            }
}

#define ARGUMENTS(T)                                                                             \
    const signed char *q, const float *scale_x, const unsigned *packed, const bf16 *scale,       \
        const float *bias, T *y, int rows, int padded, int N, int K, int group
#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    int4_a8_linear_quantize_##name(const T* x, signed char* q, float* scale_x, int64 step, int K, \
                                   int group, int padded) {                                      \
        quantize(x, q, scale_x, step, K, group, padded);                                         \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2)                                         \
    int4_a8_linear_few_##name(ARGUMENTS(T)) {                                                    \
        few<T>({q, scale_x, rows, padded}, packed, scale, bias, y, N, K, group);                 \
    }                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 2)                                         \
    int4_a8_linear_gemm_##name(ARGUMENTS(T)) {                                                   \
        gemm<T>({q, scale_x, rows, padded}, packed, scale, bias, y, N, K, group);                \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
