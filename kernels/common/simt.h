// Runs an unchanged CUDA kernel on the CPU.  Under a sanitizer a CUDA thread is a thread of the
// operating system, so that ThreadSanitizer sees a missing barrier and AddressSanitizer an index
// out of range; else it is a coroutine, and a block of 256 costs no thread and no lock.  Include
// this, then the .cu file, then SIMT_ENTRY(kernel).  Blocks run one after another, the last first.
// Not modelled: PTX, clusters, partial shuffle masks, races between blocks.  An asynchronous copy
// happens when it is waited for; mma.cuh and, compiled with SIMT_HOPPER, wgmma.cuh say in C++ what
// their instructions do.  Shuffles order memory here, on a GPU they do not.
#pragma once
#define SIMT_HOST
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>
#include <unistd.h>
#include <cuda_bf16.h>  // the real types: they compute on the host too
#include <cuda_fp16.h>

namespace simt {
[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "simt: %s\n", why);
    _exit(70);
}
}  // namespace simt

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#include "simt_threads.h"
#else
#include "simt_fibers.h"
#endif

namespace simt {
// Asynchronous copies of one thread in groups, each done when it is waited for, and no earlier; and
// what the thread has written without a fence.proxy.async since.
struct Copy {
    void* to;
    const void* from;  // or null: zeros
};
struct Copies {
    std::deque<std::vector<Copy>> groups{1};
    std::vector<size_t> written;
};
struct Block {
    int size;
    Barrier all;
    std::deque<Barrier> warps;
    std::vector<std::array<uint64_t, 4>> shown;  // by each lane to its warp
    size_t shared;
    std::unique_ptr<uint64_t[]> bytes;  // dynamic shared memory: starts as NaN, bounds are exact
    std::vector<Copies> copies;         // of each thread
    std::vector<char> unpublished;      // 16 bytes each of it that tensor cores may not see yet
    std::deque<std::shared_ptr<void>> warpgroups;  // simt_wgmma.h
    Block(int n, size_t shared)
        : size(n), all(n), shown(n), shared(shared), copies(n), unpublished(shared / 16 + 1),
          bytes(new uint64_t[shared / 8 + (shared % 8 != 0)]) {
        std::memset(bytes.get(), 0xff, shared);
        for (int i = 0; i < n; i += 32) warps.emplace_back(std::min(32, n - i));
    }
};
inline Block* block;  // of the launch that runs: one at a time in a process
inline dim3 block_index, block_size, grid_size;
inline thread_local int rank;
inline thread_local dim3 thread_index;

// Tensor cores see what is written `to` shared memory, 16 bytes, after `publish` in this thread.
inline void wrote(void* to) {
    const auto at = size_t(static_cast<char*>(to) - reinterpret_cast<char*>(block->bytes.get()));
    if (at >= block->shared) return;  // not of the dynamic one
    block->unpublished[at / 16] = 1;
    block->copies[rank].written.push_back(at / 16);
}
inline void publish() {
    for (size_t chunk : block->copies[rank].written) block->unpublished[chunk] = 0;
    block->copies[rank].written.clear();
}
inline void finish_copies(size_t left) {
    auto& groups = block->copies[rank].groups;  // the last one is open
#ifdef SIMT_HOPPER  // they take their time: who does not wait for them finds what was there before
    if (groups.size() > left + 1)
        for (int turn = 0; turn < 64; ++turn) give_way();
#endif
    for (; groups.size() > left + 1; groups.pop_front())
        for (const Copy& copy : groups.front()) {
            copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
            wrote(copy.to);
        }
}

// Every lane shows `value`; then use(of), where of(lane) is what that lane of the warp shows.
template <class T, class F> void together(const T& value, F use) {
    static_assert(sizeof value <= sizeof block->shown[0]);
    Barrier& warp = block->warps[rank / 32];
    std::memcpy(&block->shown[rank], &value, sizeof value);
    warp.wait();
    use([](int lane) {
        T other;
        std::memcpy(&other, &block->shown[rank / 32 * 32 + lane], sizeof other);
        return other;
    });
    warp.wait();
}

// Every lane shows `value` and sees that of `lane` (its own when there is no such lane).
template <class T> T exchange(unsigned mask, T value, int lane) {
    if (mask != 0xffffffffu) fail("partial shuffle masks are not modelled");
    const bool there = 0 <= lane && lane < 32 && rank / 32 * 32 + lane < block->size;
    together(value, [&](auto of) {
        if (there) value = of(lane);
    });
    return value;
}

template <class... A>  // arguments as cuLaunchKernel takes them: an array of their addresses
void launch(void (*kernel)(A...), dim3 grid, dim3 size, size_t shared, void** args) {
    for (unsigned at = grid.x * grid.y * grid.z; at--;) {
        Block here(int(size.x * size.y * size.z), shared);
        block = &here;
        block_size = size;
        grid_size = grid;
        block_index = dim3(at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y));
        run_threads(
            here.size,
            [&](int i) {
                rank = i;
                thread_index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
            },
            [&](int i) {
                [&]<size_t... I>(std::index_sequence<I...>) {
                    kernel(*static_cast<A*>(args[I])...);
                }(std::index_sequence_for<A...>());
                here.warps[i / 32].leave();
                here.all.leave();
            });
    }
}
}  // namespace simt

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(simt::block->bytes.get())
#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_size
#define gridDim simt::grid_size
#define SIMT_ENTRY(kernel)                                                                       \
    extern "C" void host_##kernel(const unsigned* d, size_t shared, void** args) {               \
        simt::launch(kernel, dim3(d[0], d[1], d[2]), dim3(d[3], d[4], d[5]), shared, args);      \
    }

#ifndef __syncthreads  // a test may plant a missing barrier
inline void __syncthreads() { simt::block->all.wait(); }
#endif
inline void __syncwarp(unsigned = 0xffffffffu) { simt::block->warps[simt::rank / 32].wait(); }
template <class T> T __shfl_sync(unsigned m, T v, int lane) { return simt::exchange(m, v, lane); }
template <class T> T __shfl_xor_sync(unsigned m, T v, int bits) {
    return simt::exchange(m, v, simt::rank % 32 ^ bits);
}
template <class T> T __shfl_down_sync(unsigned m, T v, int by) {
    return simt::exchange(m, v, simt::rank % 32 + by);
}
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
using std::max;
using std::min;
