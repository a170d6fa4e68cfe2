// y = (x - mean x) / sqrt(var x + eps) * weight + bias, row by row: one read of x from memory (the
// later passes find the row in the cache), one write of y.  Large outputs bypass the caches.
#include "rows.h"

// The mean over a row of f(x[i]).  Blocks are added up in double: long rows lose nothing.
template <class T, class F> static double mean_of(const T* x, int64_t n, F f) {
    double total = 0;
    int64_t i = 0;
    while (i + LANES <= n) {
        f32v part[4] = {};
        const int64_t end = i + 2048 < n ? i + 2048 : n;
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (int u = 0; u < 4; ++u) part[u] += f(PART_IN_ANY_ORDER(x + i, u));
        for (; i + LANES <= end; i += LANES) part[0] += f(load(x + i));
        total += sum((part[0] + part[1]) + (part[2] + part[3]));
    }
    for (; i < n; ++i) total += f(splat(to_float(x[i])))[0];
    return total / double(n);
}

template <class T>
static void layer_norm(const T* x, int64_t stride, const T* weight, const T* bias, T* y,
                       int64_t rows, int64_t n, float eps, int threads) {
    each_row(rows, n, threads, [&](int64_t row) {
        const T* in = x + row * stride;
        const float mean = float(mean_of(in, n, [](f32v v) { return v; }));
        const double variance = mean_of(in, n, [=](f32v v) { return (v - mean) * (v - mean); });
        const float scale = float(1. / std::sqrt(variance + eps));
        fill_row(
            y + row * n, n, streams<T>(rows, n),
            [&](AT i) {
                ASK_FOR(next_row(in, stride, n), i);
                return fma((PART(in, i) - mean) * scale, PART(weight, i), PART(bias, i));
            },
            [&](int64_t i) {
                return (to_float(in[i]) - mean) * scale * to_float(weight[i]) + to_float(bias[i]);
            });
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void layer_norm_##name(const T* x, int64_t stride, const T* weight,               \
                                      const T* bias, T* y, int64_t rows, int64_t n, float eps,   \
                                      int threads) {                                             \
        layer_norm(x, stride, weight, bias, y, rows, n, eps, threads);                           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
