// Products of rows of bytes on Hopper's tensor cores, for many rows: y = (q w^T) * scale_x * scale
// + bias as `gemm` of bytes_linear.cuh, by wgmma.  A block of 384 threads: one warpgroup copies
// tiles of 128 rows, 128 or 256 outputs and 128 inputs into a ring of stages, two multiply them, 64
// rows each.  There are as many blocks as multiprocessors, or as tiles; a block takes every
// gridDim.x-th tile, and copies its next while the sums of the last one are written.  `F::Tag` says
// what the bytes are.  Where F::PROMOTES, tensor cores add up 128 products, and their sums are
// added in fp32: of e4m3 they keep some 13 bits.  One warpgroup multiplies while the other adds.
#pragma once
#include "bytes_linear.cuh"
#include "ring.cuh"

#ifdef HOPPER
struct GemmTile {
    int row, column;
};

// The index-th tile: down bands of 16 rows of tiles, so that blocks that run together read the same
// rows of x and of w, which then come from L2.
__device__ inline GemmTile tile_of(int index, int down, int across) {
    constexpr int BAND = 16;
    const int first = index / (BAND * across) * BAND, high = min(BAND, down - first);
    const int within = index % (BAND * across);
    return {first + within % high, within / high};
}

template <int OUTPUTS> struct GemmStage {
    SwizzledTile<128, ROW_BYTES> x;
    SwizzledTile<OUTPUTS, ROW_BYTES> w;
};
template <int OUTPUTS> struct GemmMemory {
    static constexpr int STAGES = OUTPUTS == 256 ? 4 : 6;
    GemmStage<OUTPUTS> stages[STAGES];
    Ring<STAGES> ring;
};

template <int OUTPUTS, class T>
__device__ void copy_tiles(GemmMemory<OUTPUTS>& memory, const signed char* q, const signed char* w,
                           const Ends<T>& ends, int K, int padded, bool packs, int down,
                           int across) {
    Filler<GemmMemory<OUTPUTS>::STAGES> filler{memory.ring};
    for (int index = blockIdx.x; index < down * across; index += gridDim.x) {
        const GemmTile tile = tile_of(index, down, across);
        const int rows = tile.row * 128, outputs = tile.column * OUTPUTS;
        for (int first = 0; first < padded; first += ROW_BYTES)
            filler.fill([&](int at) {
                GemmStage<OUTPUTS>& stage = memory.stages[at];
                stage.x.each_chunk([&](char* to, int row, int byte) {
                    const int m = rows + row, last = ends.rows - 1;
                    copy_async(to, q + int64(min(m, last)) * padded + first + byte, m <= last);
                });
                if (packs)
                    stage.w.each_chunk([&](char* to, int row, int byte) {
                        const int n = outputs + row, k = first + byte;
                        copy_async(to, w + int64(min(n, ends.N - 1)) * K + k, n < ends.N && k < K);
                    });
                else
                    stage.w.template each_chunk<1>([&](char* to, int row, int byte) {
                        const int n = outputs + row, k = first + byte;
                        put(to, n < ends.N ? weights(w + int64(n) * K, k, K, false) : Bytes{});
                    });
            });
    }
    filler.finish();
}

// Outputs of 64 rows by 128; two side by side in one store where rows of y start at such pairs.
template <class T, class Sum>
__device__ void write(const Ends<T>& ends, const Sum (&sum)[64], int row, int column) {
    struct alignas(2 * sizeof(T)) Pair {
        T at[2];
    };
    const int m[2] = {row + row_of(0), row + row_of(2)};
    const float scales[2] = {m[0] < ends.rows ? ends.scale_x[m[0]] : 0.f,
                             m[1] < ends.rows ? ends.scale_x[m[1]] : 0.f};
    const bool pairs = ends.N % 2 == 0;
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
        const int n = column + column_of(i);
        float scale[2] = {}, bias[2] = {};
#pragma unroll
        for (int u = 0; u < 2; ++u)
            if (n + u < ends.N) {
                scale[u] = ends.scale[n + u];
                if (ends.bias) bias[u] = ends.bias[n + u];
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pair pair;
#pragma unroll
            for (int u = 0; u < 2; ++u)
                pair.at[u] = T(float(sum[i + 2 * half + u]) * (scales[half] * scale[u]) + bias[u]);
            T* to = ends.y + int64(m[half]) * ends.N + n;
            if (m[half] >= ends.rows || n >= ends.N) continue;
            if (pairs) {
                *reinterpret_cast<Pair*>(to) = pair;
            } else {
                to[0] = pair.at[0];
                if (n + 1 < ends.N) to[1] = pair.at[1];
            }
        }
    }
}

template <class F, int OUTPUTS, class T>
__device__ void multiply_tiles(GemmMemory<OUTPUTS>& memory, const Ends<T>& ends, int padded,
                               int down, int across) {
    constexpr int HALVES = OUTPUTS / 128;
    const int above = (threadIdx.x / WARPGROUP - 1) * 64;  // of this warpgroup's rows of a tile
    Place<GemmMemory<OUTPUTS>::STAGES> at, before;
    for (int index = blockIdx.x; index < down * across; index += gridDim.x) {
        typename F::Sum sum[HALVES][64] = {};
#pragma unroll
        for (int half = 0; half < HALVES; ++half) fence(sum[half]);
        for (int first = 0; first < padded; first += ROW_BYTES, at.next()) {
            memory.ring.await(at);
            const GemmStage<OUTPUTS>& stage = memory.stages[at.stage];
            if constexpr (F::PROMOTES) {
#pragma unroll
                for (int half = 0; half < HALVES; ++half) {
                    typename F::Sum part[64];
                    fence();
#pragma unroll
                    for (int byte = 0; byte < ROW_BYTES; byte += 32)
                        wgmma(part, stage.x.rows(above, byte), stage.w.rows(half * 128, byte),
                              byte > 0, typename F::Tag());
                    commit();
                    wait_for<0>(part);
                    if (half == HALVES - 1) memory.ring.hand_back(at);
#pragma unroll
                    for (int i = 0; i < 64; ++i) sum[half][i] += part[i];
                }
            } else {
                fence();
#pragma unroll
                for (int byte = 0; byte < ROW_BYTES; byte += 32)
#pragma unroll
                    for (int half = 0; half < HALVES; ++half)
                        wgmma(sum[half], stage.x.rows(above, byte), stage.w.rows(half * 128, byte),
                              true, typename F::Tag());
                commit();
                if (first) {  // tensor cores do not run dry: the last step ends during this
                    wait_for<1>();
                    memory.ring.hand_back(before);
                }
                before = at;
            }
        }
        if constexpr (!F::PROMOTES) {
            wait_for<0>(sum[0], sum[HALVES - 1]);
            if (padded) memory.ring.hand_back(before);
        }
        const GemmTile tile = tile_of(index, down, across);
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
            write(ends, sum[half], tile.row * 128 + above, tile.column * OUTPUTS + half * 128);
    }
}

template <int OUTPUTS> __device__ GemmMemory<OUTPUTS>& gemm_memory() {
    DYNAMIC_SHARED(char, memory);
    return *reinterpret_cast<GemmMemory<OUTPUTS>*>(swizzled_memory(memory));
}

// q's rows are filled up to multiples of 128 inputs; `outputs` of a tile: 128 or 256.
template <class F, class T>
__device__ void hopper_gemm(const signed char* q, const signed char* w, Ends<T> ends, int K,
                            int padded, bool packs, int outputs) {
    const bool wide = outputs == 256;
    const int down = (ends.rows + 127) / 128, across = (ends.N + outputs - 1) / outputs;
    if (threadIdx.x == 0)
        wide ? gemm_memory<256>().ring.set_up_for(2 * 4)
             : gemm_memory<128>().ring.set_up_for(2 * 4);
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        shrink_to<56>();
        wide ? copy_tiles(gemm_memory<256>(), q, w, ends, K, padded, packs, down, across)
             : copy_tiles(gemm_memory<128>(), q, w, ends, K, padded, packs, down, across);
    } else {
        grow_to<224>();
        wide ? multiply_tiles<F>(gemm_memory<256>(), ends, padded, down, across)
             : multiply_tiles<F>(gemm_memory<128>(), ends, padded, down, across);
    }
}
#endif
