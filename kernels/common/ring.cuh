// A ring of stages in shared memory: one warpgroup fills them in turn, others take what is there
// and hand it back.  An mbarrier per stage and direction counts arrivals; at the last one its phase
// turns, and who waits for that phase goes on.  Phases are told apart by their parity alone, which
// is enough because nobody is more than one round ahead.
#pragma once
#include "wgmma.cuh"

#ifdef HOPPER
using Mbarrier = unsigned long long;

#ifndef SIMT_HOPPER
__device__ inline void set_up(Mbarrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(arrivals) : "memory");
}
__device__ inline void arrive(Mbarrier& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
                 : "memory");
}
// Until the phase of this parity is over; before the first one, parity 1 is.
__device__ inline void wait_until(Mbarrier& barrier, unsigned parity) {
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;"
                 " @!p bra again;}" ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}
#endif

// A stage and how often the ring went round, as a parity.
template <int STAGES> struct Place {
    int stage = 0;
    unsigned round = 0;
    __device__ void next() {
        if (++stage == STAGES) stage = 0, round ^= 1;
    }
};

template <int STAGES> struct Ring {
    using At = Place<STAGES>;
    Mbarrier full[STAGES], empty[STAGES];

    // By one thread, before a barrier of the block; `takers` warps hand every stage back.
    __device__ void set_up_for(int takers) {
        for (int i = 0; i < STAGES; ++i) set_up(full[i], WARPGROUP), set_up(empty[i], takers);
    }
    __device__ void await(At at) { wait_until(full[at.stage], at.round); }
    __device__ void hand_back(At at) {  // by every lane of a warp that is done with it
        if (threadIdx.x % 32 == 0) arrive(empty[at.stage]);
    }
};

// The side of the ring that fills, 128 threads.  A stage is announced when the copies of LAG more
// are on their way: each thread waits for its own copies and shows them to the tensor cores.
template <int STAGES> struct Filler {
    static constexpr int LAG = 2;
    static_assert(LAG < STAGES);
    Ring<STAGES>& ring;
    Place<STAGES> begun = {}, announced = {};
    int ahead = 0;

    template <class F> __device__ void fill(F copy_into) {
        wait_until(ring.empty[begun.stage], begun.round ^ 1);
        copy_into(begun.stage);
        commit_copies();
        begun.next();
        if (++ahead > LAG) {
            wait_copies<LAG>();
            announce();
        }
    }
    __device__ void finish() {
        wait_copies<0>();
        while (ahead) announce();
    }
    __device__ void announce() {
        fence_async_proxy();
        arrive(ring.full[announced.stage]);
        announced.next();
        --ahead;
    }
};
#endif
