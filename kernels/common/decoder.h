// The parts of a decoder's step that are no matrix product: its description, the team of threads,
// the embedding, the rotation of queries and keys, and the attention of one query.
#pragma once
#include <atomic>
#include <memory>
#include <sched.h>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif
#include "int4.h"
#include "softmax.h"

enum Kind : int32_t { FP32, BF16, INT8, INT8_DYNAMIC, INT4 };

struct Linear {     // w (n, k) row-major; scale (n,) fp32 for int8
    const void* w;  // INT4: w and scale as in int4.h
    const float *scale, *bias;
    const int32_t* sums;  // of the rows of int8 weights
    int64_t n, k;
    int64_t kind, group;
    int64_t unit() const { return kind == INT4 ? SIDE : TILE_ROWS; }  // outputs that stay together
};
struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;  // the last two: null without
    Linear q, k, v, o, gate, up, down;
    void *keys, *values;  // (B, kv_heads, slots, head_dim)
};
struct Model {
    int64_t layers, hidden, inner, heads, kv_heads, head_dim, vocab, window, cache_bf16, slots;
    int64_t narrow;  // prompts may round activations to bf16, as a model in bf16 does
    int64_t far;     // a step's weights are beyond the caches, on huge pages: nothing is fetched ahead
    double eps;
    const float *final_norm, *cos, *sin;  // tables (positions, head_dim), sine signed
    Linear embed, head;
    Layer* layer;
};

static inline void pause() {
#if defined(__SSE2__)
    _mm_pause();
#endif
}

class Team {  // the barrier of a step's threads: spins, and yields when others need the core
    std::atomic<int> waiting{0}, phase{0};

public:
    const int size;
    explicit Team(int n) : size(n) {}
    void meet() {
        if (size == 1) return;
        const int mine = phase.load(std::memory_order_relaxed);
        if (waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            waiting.store(0, std::memory_order_relaxed);
            phase.store(mine + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase.load(std::memory_order_acquire) == mine; ++spins)
            spins < 4000 ? pause() : (void)sched_yield();
    }
};

// run(thread, team) on every thread of a team of at most so many.
template <class Run> static void in_team(int threads, Run run) {
#if defined(__SANITIZE_THREAD__)  // it does not see how threads of OpenMP wait for one another
    Team team(threads);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back([&, i] { run(i, team); });
    run(0, team);
    for (auto& other : others) other.join();
#else
    if (threads <= 1) {
        Team team(1);
        return run(0, team);
    }
    std::unique_ptr<Team> team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        team.reset(new Team(omp_get_num_threads()));
        run(omp_get_thread_num(), *team);
    }
#endif
}

static void embed_row(const Linear& e, int64_t id, float* to) {
    const int64_t C = e.k;
    const auto fill = [&](auto* row, float scale) {
        fill_row(
            to, C, false, [&](int64_t i) { return load(row + i) * scale; },
            [&](int64_t i) { return to_float(row[i]) * scale; });
    };
    if (e.kind == FP32) fill((const float*)e.w + id * C, 1.f);
    if (e.kind == BF16) fill((const bf16*)e.w + id * C, 1.f);
    if (e.kind == INT8) fill((const int8_t*)e.w + id * C, e.scale[id]);
}

static void rotate(float* x, const float* cos, const float* sin, int64_t D) {
    for (int64_t i = 0; i < D / 2; ++i) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] + b * sin[i];  // sin is negated in the first half
        x[i + D / 2] = b * cos[i + D / 2] + a * sin[i + D / 2];
    }
}

// out (D) = out * shrink + sum over n keys of weight * value
template <class T>
static void weigh(const float* weight, const T* values, int64_t n, int64_t D, float shrink,
                  float* out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= D; d += 4 * LANES) {
        f32v acc[4];
        unrolled<4>([&](auto u) INLINED { acc[u] = load(out + d + u * LANES) * shrink; });
        for (int64_t i = 0; i < n; ++i) {
            const f32v w = splat(weight[i]);
            unrolled<4>([&](auto u) INLINED {
                acc[u] = fma(w, load(values + i * D + d + u * LANES), acc[u]);
            });
        }
        unrolled<4>([&](auto u) INLINED { store(out + d + u * LANES, acc[u]); });
    }
    for (; d < D; ++d) {
        float acc = out[d] * shrink;
        for (int64_t i = 0; i < n; ++i) acc += weight[i] * to_float(values[i * D + d]);
        out[d] = acc;
    }
}

// Scores of `count` <= LANES keys (D apart), side by side in the lanes of the result.
template <class T>
static f32v scores(const float* q, const T* keys, int64_t count, int64_t D) {
    f32v acc[LANES] = {};
    const T* key[LANES];  // those past the last repeat it
    for (int64_t i = 0; i < LANES; ++i) key[i] = keys + (i < count ? i : count - 1) * D;
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        const f32v one = load(q + d);
        unrolled<LANES>([&](auto i) INLINED { acc[i] = fma(one, load(key[i] + d), acc[i]); });
    }
    if (d < D) {
        const f32v one = widen_tail<Fma>(q + d, D - d);
        for (int i = 0; i < LANES; ++i)
            acc[i] = fma(one, widen_tail<Fma>(key[i] + d, D - d), acc[i]);
    }
    return sums(acc);
}

// out (D) = softmax(q . keys[first .. last]) values, keys in blocks so that the sums of a query
// depend on its own position only.
template <class T>
static void attend(const float* q, const T* keys, const T* values, int64_t first, int64_t last,
                   int64_t D, float* out) {
    constexpr int64_t BLOCK = 64;
    float score[BLOCK], top = -INFINITY, total = 0;
    for (int64_t d = 0; d < D; ++d) out[d] = 0;
    for (int64_t s = first; s <= last; s += BLOCK) {
        const int64_t n = last + 1 - s < BLOCK ? last + 1 - s : BLOCK;
        f32v most = splat(top);
        for (int64_t i = 0; i < n; i += LANES) {
            store(score + i, scores(q, keys + (s + i) * D, n - i < LANES ? n - i : LANES, D));
            for (int64_t past = n; past < i + LANES; ++past) score[past] = -INFINITY;
            most = larger(load(score + i), most);
        }
        const float now = largest(most), shrink = exponential(top - now);
        top = now;
        f32v part = {};
        for (int64_t i = 0; i < n; i += LANES) {
            const f32v p = exponential(load(score + i) - top);
            store(score + i, p);
            part += p;
        }
        total = total * shrink + sum(part);
        weigh(score, values + s * D, n, D, shrink, out);
    }
    for (int64_t d = 0; d < D; ++d) out[d] /= total;
}

static float greatest(const float* row, int64_t begin, int64_t end) {
    f32v most = splat(-INFINITY);
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) most = larger(load(row + i), most);
    float top = largest(most);
    for (; i < end; ++i) top = row[i] > top ? row[i] : top;
    return top;
}
