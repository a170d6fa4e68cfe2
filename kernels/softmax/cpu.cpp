// y = exp(x - max x) / sum exp(x - max x), row by row: x is read from memory once, its
// exponentials stay in a thread's own row of floats until their sum is known.
#include <vector>
#include "rows.h"

template <class T> static float largest(const T* x, int64_t n) {
    float top = -INFINITY;
    int64_t i = 0;
    if (n >= 4 * LANES) {
        f32v part[4] = {splat(top), splat(top), splat(top), splat(top)};
        for (; i + 4 * LANES <= n; i += 4 * LANES)
            for (int u = 0; u < 4; ++u) part[u] = larger(PART_IN_ANY_ORDER(x + i, u), part[u]);
        top = maximum(larger(larger(part[0], part[1]), larger(part[2], part[3])));
    }
    for (; i < n; ++i) top = std::max(top, to_float(x[i]));  // a NaN is found by the sum
    return top;
}

template <class T> static inline f32v decayed(f32v x) {
    return exponential<Wanted::SMALL, sizeof(T) == 2>(x);
}

// e[i] = exp(x[i] - top) TINY_UP; their sum.  Short blocks are added up in double: every result of
// the row is scaled by the sum's error.
template <class T> 
static double exponentials(const T* x, float* e, int64_t n, float top AND_NEXT(T, next)) {
    double total = 0;
    int64_t i = 0;
    while (i + LANES <= n) {
        f32v part[4] = {};
        const int64_t end = i + 256 < n ? i + 256 : n;
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
#if !defined(__AVX512F__)
            for (int line = 0; line < 4 * LANES; line += 64 / sizeof(T)) ask_for(next, i + line);
#endif
            for (int u = 0; u < 4; ++u) {
                const f32v v = decayed<T>(load(x + i + u * LANES) - top);
                store(e + i + u * LANES, v);
                part[u] += v;
            }
        }
        for (; i + LANES <= end; i += LANES) {
            const f32v v = decayed<T>(load(x + i) - top);
            store(e + i, v);
            part[0] += v;
        }
        total += sum((part[0] + part[1]) + (part[2] + part[3]));
    }
    for (; i < n; ++i) total += e[i] = decayed<T>(splat(to_float(x[i]) - top))[0];
    return total;
}

template <class T>
static void softmax(const T* x, int64_t stride, T* y, int64_t rows, int64_t n, int threads) {
    each_row(rows, n, threads, [&](int64_t row) {
        static thread_local std::vector<float> scratch;
        if (int64_t(scratch.size()) < n) scratch.resize(n);
        float* e = scratch.data();
        const T* in = x + row * stride;
        const float top = largest(in, n);
        const float scale = float(1. / exponentials(in, e, n, top AND_NEXT_ROW(in, stride, n)));
        fill_row(
            y + row * n, n, streams<T>(rows, n), [&](int64_t i) { return load(e + i) * scale; },
            [&](int64_t i) { return e[i] * scale; });
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void softmax_##name(const T* x, int64_t stride, T* y, int64_t rows, int64_t n,    \
                                   int threads) {                                                \
        softmax(x, stride, y, rows, n, threads);                                                 \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
