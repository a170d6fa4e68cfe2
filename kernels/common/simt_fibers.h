// CUDA threads of a block as coroutines of one thread, which take turns at barriers.
#pragma once
#include <functional>
#include <ucontext.h>

namespace simt {
class Team {
    static constexpr size_t STACK = 256 << 10;  // of it, what is never touched costs nothing
    struct Fiber {
        std::unique_ptr<char[]> stack{new char[STACK]};
        ucontext_t at;
        bool left;
    };
    std::deque<Fiber> fibers;  // kept from block to block
    std::function<void(int)> enter, body;
    ucontext_t home;
    int size, running, alive, idle;  // idle: turns since anyone came further

    static void begin();
    int next() const {
        int i = running;
        do i = (i + 1) % size;
        while (fibers[i].left);
        return i;
    }
    void take_turn(int i) {
        running = i;
        enter(i);
    }

public:
    void run(int n, std::function<void(int)> enter_one, std::function<void(int)> run_one) {
        while (int(fibers.size()) < n) fibers.emplace_back();
        enter = std::move(enter_one), body = std::move(run_one);
        size = alive = n, idle = 0;
        for (int i = 0; i < n; ++i) {
            Fiber& fiber = fibers[i];
            fiber.left = false;
            getcontext(&fiber.at);
            fiber.at.uc_stack.ss_sp = fiber.stack.get();
            fiber.at.uc_stack.ss_size = STACK;
            makecontext(&fiber.at, begin, 0);
        }
        take_turn(0);
        swapcontext(&home, &fibers[0].at);
    }
    void moved() { idle = 0; }
    void pass_on() {  // returns when the turn is back
        if (++idle > 4 * size) fail("a barrier that some threads never reach");
        const int me = running;
        take_turn(next());
        if (running != me) swapcontext(&fibers[me].at, &fibers[running].at);
    }
    void work() {
        moved();
        body(running);
        moved();
        fibers[running].left = true;
        if (!--alive) setcontext(&home);
        take_turn(next());
        setcontext(&fibers[running].at);
    }
};
inline Team team;
inline void Team::begin() { team.work(); }

// Opens when every member waits.  A thread that returns from the kernel leaves, as on the device.
class Barrier {
    int members, waiting = 0;
    unsigned phase = 0;
    void open() {
        waiting = 0;
        ++phase;
        team.moved();
    }

public:
    explicit Barrier(int n) : members(n) {}
    void wait() {
        const unsigned mine = phase;
        if (++waiting == members) return open();
        while (phase == mine) team.pass_on();
    }
    void leave() {
        if (--members == waiting && waiting) open();
    }
};

// Returns when ready(), which the doings of others make true: they say so by give_way().
template <class F> void until(F ready) {
    while (!ready()) team.pass_on();
}
// After a step on which others may wait: they go on first, and find what was not yet done.
inline void give_way() {
    team.moved();
    team.pass_on();
}

// body(i) for every i < size, after enter(i) at each of its turns.
template <class E, class F> void run_threads(int size, E enter, F body) {
    team.run(size, enter, body);
}
}  // namespace simt
