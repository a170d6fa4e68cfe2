// token = argmax over v of x . w[v]: the weights are read once, in order, each thread a run of
// tokens, of which it remembers the best; no logit is written.
#include <memory>
#include <vector>
#include "dot.h"

struct Best {
    float top = -INFINITY;
    int64_t token = -1;
    // The first of equals; a NaN before any number.
    void see(float v, int64_t at) {
        if (token < 0 || v > top || (v != v && top == top)) {
            top = v;
            token = at;
        }
    }
};

template <class D, class T>
static void lm_head_argmax(const T* x, int64_t x_stride, const T* w, float* top, int64_t* token,
                           int64_t M, int64_t V, int64_t K, int threads) {
    using X = typename D::X;
    const X* rows;
    std::unique_ptr<X[]> converted;
    if constexpr (std::is_same_v<X, T>) {
        rows = x;
    } else {  // activations of another type are widened once: M * K numbers
        converted.reset(new X[M * apart(K)]);
        for (int64_t m = 0; m < M; ++m)
            fill_row(converted.get() + m * apart(K), K, false,
                     [&](int64_t k) { return load(x + m * x_stride + k); },
                     [&](int64_t k) { return to_float(x[m * x_stride + k]); });
        rows = converted.get();
        x_stride = apart(K);
    }
    if (V * K < SERIAL_ELEMENTS) threads = 1;
    std::vector<std::vector<Best>> found(threads);
    const auto run = [&](int thread, int of) {
        std::vector<Best> best(M);  // of this thread alone until it is done: no shared lines
        const Share share(V, thread, of, TILE_ROWS);
        std::unique_ptr<X[]> scratch(M >= D::WIDEN_ONCE ? new X[BLOCK_ROWS * apart(K)] : nullptr);
        matmul_rows<D>(rows, x_stride, M, w, K, share.begin, share.end, K, scratch.get(),
                       [&](int64_t v, int64_t m, float logit) { best[m].see(logit, v); });
        found[thread] = std::move(best);
    };
    if (threads <= 1) {
        run(0, 1);
    } else {
#pragma omp parallel num_threads(threads)
        run(omp_get_thread_num(), omp_get_num_threads());
    }
    for (int64_t m = 0; m < M; ++m) {
        Best best;
        for (const auto& part : found)  // tokens in order
            if (!part.empty() && part[m].token >= 0) best.see(part[m].top, part[m].token);
        top[m] = best.top;
        token[m] = best.token;
    }
}

#if defined(__AVX512BF16__)
using Bf16Path = DotBf16;
#else
using Bf16Path = Fma;
#endif
#define ENTRY(T, D, name)                                                                        \
    extern "C" void lm_head_argmax_##name(const T* x, int64_t x_stride, const T* w, float* top,  \
                                          int64_t* token, int64_t M, int64_t V, int64_t K,       \
                                          int threads) {                                         \
        lm_head_argmax<D>(x, x_stride, w, top, token, M, V, K, threads);                         \
    }
ENTRY(float, Fma, f32)
ENTRY(bf16, Bf16Path, bf16)
ENTRY(f16, Fma, f16)
