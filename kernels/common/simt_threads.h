// CUDA threads of a block as threads of the operating system.
#pragma once
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace simt {
inline std::chrono::seconds patience() {
    const char* text = std::getenv("SIMT_TIMEOUT");
    return std::chrono::seconds(text ? std::atoi(text) : 20);
}

// Opens when every member waits.  A thread that returns from the kernel leaves, as on the device.
class Barrier {
    std::mutex mutex;
    std::condition_variable opened;
    int members, waiting = 0;
    unsigned phase = 0;
    void open() {
        waiting = 0;
        ++phase;
        opened.notify_all();
    }

public:
    explicit Barrier(int n) : members(n) {}
    void wait() {
        std::unique_lock lock(mutex);
        const unsigned mine = phase;
        if (++waiting == members) return open();
        // wait_until on the system clock: g++ 12's TSan does not know the wait for steady clocks
        const auto limit = std::chrono::system_clock::now() + patience();
        if (!opened.wait_until(lock, limit, [&] { return phase != mine; }))
            fail("a barrier that some threads never reach");
    }
    void leave() {
        std::lock_guard lock(mutex);
        if (--members == waiting && waiting) open();
    }
};

// Returns when ready(), which the doings of others make true.
template <class F> void until(F ready) {
    const auto limit = std::chrono::system_clock::now() + patience();
    while (!ready()) {
        if (std::chrono::system_clock::now() > limit)
            fail("a barrier that some threads never reach");
        std::this_thread::yield();
    }
}
inline void give_way() { std::this_thread::yield(); }

// body(i) for every i < size, each on a thread of its own after enter(i).
template <class E, class F> void run_threads(int size, E enter, F body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < size; ++i)
        threads.emplace_back([&, i] {
            enter(i);
            body(i);
        });
    for (auto& thread : threads) thread.join();
}
}  // namespace simt
