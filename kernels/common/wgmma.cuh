// Tensor cores of Hopper: wgmma, which 128 threads (a warpgroup: four warps, the first a multiple
// of four) issue together.  It multiplies tiles in shared memory while the threads go on, and only
// by it does an H100 or H200 reach its rate; mma.sync has some 60 % of it, and none of that of
// e4m3.
//
//     fence(d);                                  // registers are ready
//     wgmma(d, rows_of(a), rows_of(b), add, T()); ...   // d (64, N) += a (64, 32 bytes) b^T
//     commit();                                  // what was issued since the last one is a group
//     wait_for<LEFT>(d);                         // all groups but the last LEFT are done
//
// Until then nobody may touch d, registers of a, and the tiles.  Thread t of the 128 holds of d the
// rows t / 32 * 16 + t % 32 / 4 and that + 8, of each 8 columns 2 (t % 4) and the next: `row_of`
// and `column_of`.
//
// A tile lies in shared memory as rows of 128 bytes, its start at a multiple of 1024.  Row r keeps
// its 16-byte chunk c at place c ^ (r % 8) ("128-byte swizzle"), so that eight rows of one chunk
// are in 32 different banks.  Tensor cores undo that by a descriptor: where the tile starts and how
// far apart its blocks of eight rows are.  Tensor cores read through the "async proxy": what
// ordinary stores and cp.async have written needs `fence_async_proxy` in the thread that wrote it,
// before a barrier.
//
// For sm_90a alone; on the host shim, compiled with SIMT_HOPPER, simt_wgmma.h says in C++ what each
// instruction does.  Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once
#include "mma.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(SIMT_HOPPER)
#define HOPPER 1
#endif

#ifdef HOPPER
constexpr int WARPGROUP = 128, ROW_BYTES = 128, SWIZZLED = 1024;  // threads; bytes; of eight rows

#ifdef SIMT_HOPPER
#include "simt_wgmma.h"
#else
// ---- registers and order ------------------------------------------------------------------------

// The compiler takes every element as read and written here: it moves no use of d across.
template <int N> __device__ inline void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ inline void pin(int (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

template <int N> __device__ inline void pin(unsigned (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <class T, int M, int N> __device__ inline void pin(T (&d)[M][N]) {
#pragma unroll
    for (int i = 0; i < M; ++i) pin(d[i]);
}

template <class... D> __device__ inline void fence(D&... d) {
    (pin(d), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT, class... D> __device__ inline void wait_for(D&... d) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
    (pin(d), ...);
}
// Arithmetic that leads to `positive` comes before what follows: ptxas would move it behind a wait,
// where nothing hides its time.  A branch is what holds it.
__device__ inline void settle(float positive) {
    asm volatile("{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p trap;}" ::"f"(positive)
                 : "memory");
}
__device__ inline void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers of a thread, from now on: warpgroups that only copy give theirs to those that add up.
template <int N> __device__ inline void shrink_to() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ inline void grow_to() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// 16 bytes by an ordinary store.
__device__ inline void put(void* to, const Pack<unsigned>& bytes) {
    *static_cast<Pack<unsigned>*>(to) = bytes;
}

// ---- the instruction ----------------------------------------------------------------------------

#define WGMMA_NAMES_32                                                                           \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"      \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_NAMES_64                                                                           \
    WGMMA_NAMES_32                                                                               \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,"   \
    "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define WGMMA_16(c, i) WGMMA_4(c, i), WGMMA_4(c, i + 4), WGMMA_4(c, i + 8), WGMMA_4(c, i + 12)
#define WGMMA_32(c) WGMMA_16(c, 0), WGMMA_16(c, 16)
#define WGMMA_64(c) WGMMA_32(c), WGMMA_16(c, 32), WGMMA_16(c, 48)
#define WGMMA_FLOAT(x) "+f"(x)
#define WGMMA_NEW_FLOAT(x) "=f"(x)
#define WGMMA_INT(x) "+r"(x)
#define WGMMA_NEW_INT(x) "=r"(x)

// d (64, 128) = a b^T, + d if `add`; both tiles in shared memory, their rows along the sum.  What d
// held is no input without `add`: registers would keep it from wherever it was last written.
#define WGMMA_SHARED(Sum, constraint, new_constraint, Type, shape, tail)                         \
    __device__ inline void wgmma(Sum(&d)[64], unsigned long long a, unsigned long long b,        \
                                 bool add, Type) {                                               \
        if (add)                                                                                 \
            asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned."     \
                         shape " {" WGMMA_NAMES_64 "}, %64, %65, p" tail ";}"                    \
                         : WGMMA_64(constraint) : "l"(a), "l"(b));                               \
        else                                                                                     \
            asm volatile("{.reg .pred p; setp.ne.u32 p, 0, 0; wgmma.mma_async.sync.aligned."     \
                         shape " {" WGMMA_NAMES_64 "}, %64, %65, p" tail ";}"                    \
                         : WGMMA_64(new_constraint) : "l"(a), "l"(b));                           \
    }
#define WGMMA_OF_FLOATS(Type, shape, tail)                                                       \
    WGMMA_SHARED(float, WGMMA_FLOAT, WGMMA_NEW_FLOAT, Type, shape, tail)
WGMMA_OF_FLOATS(bf16, "m64n128k16.f32.bf16.bf16", ", 1, 1, 0, 0")
WGMMA_OF_FLOATS(f16, "m64n128k16.f32.f16.f16", ", 1, 1, 0, 0")
WGMMA_OF_FLOATS(e4m3, "m64n128k32.f32.e4m3.e4m3", ", 1, 1")
struct s8 {};
WGMMA_SHARED(int, WGMMA_INT, WGMMA_NEW_INT, s8, "m64n128k32.s32.s8.s8", "")

// d (64, N) += a b: a (64, 16) from registers, as `mma` of 16 rows a warp takes it; b (16, N) lies
// with N along its rows, which tensor cores turn for numbers of 16 bits.
#define WGMMA_REGISTERS(count, Type, shape, names, outputs, a0, a1, a2, a3, b0)                  \
    __device__ inline void wgmma(float(&d)[count], const unsigned(&a)[4], unsigned long long b,  \
                                 Type) {                                                         \
        asm volatile("wgmma.mma_async.sync.aligned." shape " {" names                            \
                     "}, {" a0 "," a1 "," a2 "," a3 "}, " b0 ", 1, 1, 1, 1;"                     \
                     : outputs(WGMMA_FLOAT)                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
    }
#define WGMMA_BOTH(Type, name)                                                                   \
    WGMMA_REGISTERS(32, Type, "m64n64k16.f32." name "." name, WGMMA_NAMES_32, WGMMA_32, "%32",   \
                    "%33", "%34", "%35", "%36")                                                  \
    WGMMA_REGISTERS(64, Type, "m64n128k16.f32." name "." name, WGMMA_NAMES_64, WGMMA_64, "%64",  \
                    "%65", "%66", "%67", "%68")
WGMMA_BOTH(bf16, "bf16")
WGMMA_BOTH(f16, "f16")
#endif

// ---- where things are ---------------------------------------------------------------------------

// Row and column of d that element i of this thread's is.
__device__ inline int row_of(int i) {
    return threadIdx.x % WARPGROUP / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
}
__device__ inline int column_of(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

// The descriptor of a tile of swizzled rows of 128 bytes, of which blocks of eight follow one
// another; `leading` bytes lie between its columns of 128 bytes where the instruction takes
// several.
__device__ inline unsigned long long descriptor(const void* start, int leading) {
    const unsigned long long swizzle_128 = 1;
    return (shared_address(start) >> 4 & 0x3fff) | (unsigned long long)(leading >> 4) << 16 |
           (unsigned long long)(SWIZZLED >> 4) << 32 | swizzle_128 << 62;
}

// ROWS rows of BYTES bytes in panels of 128 bytes, which lie one behind the other.
template <int ROWS, int BYTES> struct SwizzledTile {
    static constexpr int PANELS = BYTES / ROW_BYTES, CHUNKS = BYTES / 16;
    char at[PANELS][ROWS * ROW_BYTES];

    // The 32 bytes at `byte` of the rows from `row` (a multiple of 8) on, for sums along the rows.
    __device__ unsigned long long rows(int row, int byte) const {
        return descriptor(at[byte / ROW_BYTES] + row * ROW_BYTES + byte % ROW_BYTES, 16);
    }
    // 16 rows from `row` on with all their columns, for sums from row to row.
    __device__ unsigned long long columns(int row) const {
        return descriptor(at[0] + row * ROW_BYTES, sizeof at[0]);
    }
    // f(to, row, byte) for every chunk of 16 bytes, those of a warpgroup side by side.
    template <int UNROLL = 4, class F> __device__ void each_chunk(F f) {
#pragma unroll UNROLL
        for (int i = threadIdx.x % WARPGROUP; i < ROWS * CHUNKS; i += WARPGROUP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            f(at[chunk / 8] + row * ROW_BYTES + (chunk % 8 ^ row % 8) * 16, row, chunk * 16);
        }
    }
};

// The first place of a block's dynamic shared memory at which tiles may start.
__device__ inline char* swizzled_memory(char* memory) {
    return memory + (-shared_address(memory) & (SWIZZLED - 1));
}
#endif
