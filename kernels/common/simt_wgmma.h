// wgmma, mbarriers and the async proxy of Hopper in C++, for the host shim.  What a GPU does at
// some time between issue and wait is done as late as allowed, and what it would do wrong is an
// error:
// - the descriptor is decoded and shared memory read through it, at issue and again at the wait:
//   what has changed in between, was written too early or lacks fence.proxy.async ends the process;
// - accumulators are NaN (or a large integer) from issue to wait; touching them, or registers of a,
//   ends the process;
// - sums of e4m3 keep 13 bits after the first of the largest term, as DeepSeek-V3's report
//   (https://arxiv.org/abs/2412.19437, 3.5.2) says of the H800.
#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <mutex>

inline unsigned shared_address(const void* p) {  // no multiple of 1024 where the memory starts
    return unsigned(static_cast<const char*>(p) -
                    reinterpret_cast<const char*>(simt::block->bytes.get())) + 1040;
}

namespace simt {
using Words = std::vector<unsigned>;
using Operand = std::vector<unsigned char>;  // row by row, its numbers of the sum side by side

inline const unsigned char* shared_bytes(unsigned address) {
    if (address < 1040 || address + 16 > 1040 + block->shared)
        fail("wgmma reads outside of the block's shared memory");
    const auto chunk = (address - 1040) / 16;
    if (block->unpublished[chunk])
        fail("wgmma reads what no fence.proxy.async has shown to it");
    return reinterpret_cast<const unsigned char*>(block->bytes.get()) + (address - 1040);
}

// `rows` rows of 32 bytes of the sum through a descriptor; `turned`: numbers of two bytes lie with
// the rows side by side ("MN-major").
inline Operand through(uint64_t descriptor, int rows, bool turned) {
    const unsigned start = (descriptor & 0x3fff) << 4;
    const unsigned leading = (descriptor >> 16 & 0x3fff) << 4;
    const unsigned stride = (descriptor >> 32 & 0x3fff) << 4;
    const int mode = descriptor >> 62 & 3;              // none, 128, 64, 32 bytes
    const int bits = mode ? 4 - mode : 0, width = 16 << bits;  // of the swizzle; bytes of its rows
    if (descriptor >> 49 & 7) fail("a base offset of a descriptor is not modelled");
    if (mode && start >> 7 & ((1 << bits) - 1)) fail("a swizzled tile starts between its patterns");
    if (!turned && mode && start % width + 32 > unsigned(width)) fail("wgmma reads past a row");
    Operand found(rows * 32);
    for (int row = 0; row < rows; ++row)
        for (int k = 0; k < 32; k += 2) {
            const int n = row * 2, line = k / 2;  // turned: byte among the rows, row of the tile
            unsigned at = start;
            if (!turned)
                at += row / 8 * stride + row % 8 * width + (mode ? k : k / 16 * leading + k % 16);
            else if (mode)
                at += n / width * leading + line / 8 * stride + line % 8 * width + n % width;
            else
                at += n / 16 * stride + line / 8 * leading + line % 8 * 16 + n % 16;
            at ^= (at >> 7 & ((1 << bits) - 1)) << 4;
            std::memcpy(&found[row * 32 + k], shared_bytes(at & ~15u) + at % 16, 2);
        }
    return found;
}

struct Issued {  // by one thread
    void* sums;
    const unsigned* from;
    std::array<unsigned, 4> registers;
    uint64_t left, right;
    int group;
};
struct Held {  // accumulators on their way: their true values
    Words values;
    int uses;
};
struct Lane {
    std::deque<Issued> issued;
    std::map<void*, Held> held;
    int group = 0, count = 0;  // of groups and products begun
    bool fenced = false;
};
struct Operation {  // what the first thread to issue it saw
    Operand left, right;
    std::function<Operand(uint64_t)> read_left;
    std::function<Operand(uint64_t)> read_right;
    std::function<void(const Operand&, const Operand&, int)> add_up;
};
struct Warpgroup {
    Barrier meet;
    std::array<Lane, 128> lanes;
    std::deque<Operation> operations;
    int begun = 0;
    explicit Warpgroup(int n) : meet(n) {}
};
constexpr unsigned POISON = 0xffc0dead;  // a NaN

inline std::mutex first_come;  // of threads of a warpgroup
inline Warpgroup& warpgroup() {
    std::lock_guard lock(first_come);
    while (int(block->warpgroups.size()) <= block->size / 128)
        block->warpgroups.emplace_back(std::make_shared<Warpgroup>(128));
    return *static_cast<Warpgroup*>(block->warpgroups[rank / 128].get());
}
inline void expect_poison(void* sums, size_t n) {
    for (size_t i = 0; i < n; ++i)
        if (static_cast<unsigned*>(sums)[i] != POISON)
            fail("accumulators were written before wgmma was waited for");
}

// Sums of the numbers of one row and one column, added to what is there.
inline void add(float& sum, const unsigned char* a, const unsigned char* b, e4m3) {
    float terms[33] = {sum}, most = std::fabs(sum);
    for (int k = 0; k < 32; ++k) {
        terms[k + 1] = from_e4m3(a[k]) * from_e4m3(b[k]);
        most = std::fmax(most, std::fabs(terms[k + 1]));
        if (terms[k + 1] != terms[k + 1]) sum = NAN;
    }
    if (sum != sum || most == 0) return;
    const double unit = std::ldexp(1.0, std::ilogb(most) - 13);
    double total = 0;
    for (float term : terms) total += std::trunc(term / unit) * unit;
    sum = float(total);
}
struct Bytes8 {};
inline void add(int& sum, const unsigned char* a, const unsigned char* b, Bytes8) {
    for (int k = 0; k < 32; ++k) sum += int((signed char)a[k]) * (signed char)b[k];
}
template <class T> void add(float& sum, const unsigned char* a, const unsigned char* b, T) {
    for (int k = 0; k < 32; k += 2) {
        T x, y;
        std::memcpy(&x, a + k, 2);
        std::memcpy(&y, b + k, 2);
        sum += float(x) * float(y);
    }
}

// Row `row` of a from registers: lane l of its warp has row l / 4 (and + 8), numbers 2 (l % 4) on.
inline Operand from_registers(Warpgroup& group) {
    Operand found(64 * 32);
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < 4; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
            std::memcpy(&found[row * 32 + i / 2 * 16 + thread % 4 * 4],
                        &group.lanes[thread].issued.front().registers[i], 4);
        }
    return found;
}

template <class Sum, int N, class T>
void issue(Sum (&d)[N], const unsigned* a, uint64_t left, uint64_t right, bool add_to, T tag) {
    Warpgroup& group = warpgroup();
    Lane& lane = group.lanes[rank % 128];
    if (!lane.fenced) fail("wgmma without a fence of its registers");
    auto [held, first] = lane.held.try_emplace(d);
    unsigned* bits = reinterpret_cast<unsigned*>(d);
    if (first) held->second.values.assign(bits, bits + N);
    else expect_poison(d, N);
    std::fill_n(bits, N, POISON);
    ++held->second.uses;
    Issued issued{d, a, {}, left, right, lane.group};
    if (a) std::copy_n(a, 4, issued.registers.begin());
    lane.issued.push_back(issued);
    std::lock_guard lock(first_come);
    if (lane.count++ < group.begun) return;
    ++group.begun;
    const bool turned = a != nullptr;
    Operation operation;
    operation.read_right = [turned](uint64_t at) { return through(at, 2 * N, turned); };
    operation.right = operation.read_right(right);
    if (!a) {
        operation.read_left = [](uint64_t at) { return through(at, 64, false); };
        operation.left = operation.read_left(left);
    }
    operation.add_up = [&group, add_to, tag](const Operand& x, const Operand& y, int thread) {
        Lane& to = group.lanes[thread];
        Sum* sums = reinterpret_cast<Sum*>(to.held.at(to.issued.front().sums).values.data());
        for (int i = 0; i < N; ++i) {
            const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
            const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            if (!add_to) sums[i] = 0;
            add(sums[i], &x[row * 32], &y[column * 32], tag);
        }
    };
    group.operations.push_back(std::move(operation));
}

inline void complete_one(Warpgroup& group) {
    Operation& operation = group.operations.front();
    const Issued first = group.lanes[0].issued.front();
    for (Lane& lane : group.lanes) {
        if (lane.issued.empty()) fail("a wgmma that not all 128 threads issue");
        const Issued& issued = lane.issued.front();
        if (issued.left != first.left || issued.right != first.right)
            fail("threads of a warpgroup give wgmma different tiles");
        if (issued.from && std::memcmp(issued.from, issued.registers.data(), 16))
            fail("registers of a were written before wgmma was waited for");
    }
    if (operation.read_right(first.right) != operation.right ||
        (!first.from && operation.read_left(first.left) != operation.left))
        fail("shared memory was written before wgmma was waited for");
    if (first.from) operation.left = from_registers(group);
    for (int thread = 0; thread < 128; ++thread)
        operation.add_up(operation.left, operation.right, thread);
    for (Lane& lane : group.lanes) {
        --lane.held.at(lane.issued.front().sums).uses;
        lane.issued.pop_front();
    }
    group.operations.pop_front();
}
}  // namespace simt

using s8 = simt::Bytes8;
inline void settle(float) {}
template <class... D> void fence(D&...) { simt::warpgroup().lanes[simt::rank % 128].fenced = true; }
inline void commit() { ++simt::warpgroup().lanes[simt::rank % 128].group; }
template <int LEFT, class... D> void wait_for(D&...) {
    simt::Warpgroup& group = simt::warpgroup();
    simt::Lane& lane = group.lanes[simt::rank % 128];
    group.meet.wait();
    if (simt::rank % 128 == 0)
        while (!lane.issued.empty() && lane.issued.front().group < lane.group - LEFT)
            simt::complete_one(group);
    group.meet.wait();
    for (auto held = lane.held.begin(); held != lane.held.end();) {
        const simt::Words& values = held->second.values;
        if (held->second.uses) { ++held; continue; }
        simt::expect_poison(held->first, values.size());
        std::memcpy(held->first, values.data(), 4 * values.size());
        held = lane.held.erase(held);
    }
    lane.fenced = false;
}
template <int N, class T>
void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool add, T tag) {
    simt::issue(d, nullptr, a, b, add, tag);
}
template <int N> void wgmma(int (&d)[N], uint64_t a, uint64_t b, bool add, s8 tag) {
    simt::issue(d, nullptr, a, b, add, tag);
}
template <int N, class T> void wgmma(float (&d)[N], const unsigned (&a)[4], uint64_t b, T tag) {
    simt::issue(d, a, 0, b, true, tag);
}
inline void fence_async_proxy() { simt::publish(); }
inline void put(void* to, const Pack<unsigned>& bytes) {
    std::memcpy(to, &bytes, 16);
    simt::wrote(to);
}
template <int N> void shrink_to() {}
template <int N> void grow_to() {}

// ---- mbarriers: arrivals due, arrivals left, phases over ----------------------------------------

inline void set_up(unsigned long long& barrier, int arrivals) {
    const auto count = (unsigned long long)arrivals;
    std::atomic_ref(barrier).store(count << 48 | count << 32);
}
inline void arrive(unsigned long long& barrier) {
    std::atomic_ref shared(barrier);
    auto now = shared.load(), then = now;
    do {
        if (now >> 48 == 0xffff) simt::fail("an mbarrier that nobody has set up");
        then = now - (1ull << 32);
        if ((then >> 32 & 0xffff) == 0)  // the last one: as many are due again
            then = (now >> 48 << 48 | now >> 48 << 32) + (now + 1) % (1ull << 32);
    } while (!shared.compare_exchange_weak(now, then));
    simt::give_way();
}
inline void wait_until(unsigned long long& barrier, unsigned parity) {
    simt::until([&] {
        const auto now = std::atomic_ref(barrier).load();
        if (now >> 48 == 0xffff) simt::fail("an mbarrier that nobody has set up");
        return (now & 1) != parity;
    });
}
