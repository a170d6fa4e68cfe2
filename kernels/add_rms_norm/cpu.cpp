// total = x + residual, y = total / sqrt(mean(total^2) + eps) * weight: both inputs are read once
// from memory, both outputs written once; the row of `total` stays in the cache in between.
#include <memory>
#include "rows.h"

template <class T>
static void add_rms_norm(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride,
                         const T* weight, T* y, T* total, int64_t rows, int64_t n, float eps,
                         int threads) {
    const bool streamed = streams<T>(rows, n);
    // a streamed total leaves the cache: keep the row in a buffer of the thread for the norm
    const auto run = [&](int64_t row, T* kept) {
        const T *a = x + row * x_stride, *b = residual + row * residual_stride;
        const auto add = [&](int64_t i) { return load(a + i) + load(b + i); };
        const auto add_one = [&](int64_t i) { return to_float(a[i]) + to_float(b[i]); };
        T* sum_row = streamed ? kept : total + row * n;
        fill_row(sum_row, n, false, add, add_one);
        const float inverse = inverse_rms(sum_row, n, eps);
        norm_row(sum_row, weight, y + row * n, n, inverse, streamed);
        if (streamed)
            fill_row(total + row * n, n, true, [&](int64_t i) { return load(kept + i); },
                     [&](int64_t i) { return to_float(kept[i]); });
    };
    if (threads <= 1 || rows == 1 || rows * n < SERIAL_ELEMENTS) {
        std::unique_ptr<T[]> kept(streamed ? new T[n] : nullptr);
        for (int64_t row = 0; row < rows; ++row) run(row, kept.get());
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<T[]> kept(streamed ? new T[n] : nullptr);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) run(row, kept.get());
    }
}

#define ENTRY(T, name)                                                                           \
    extern "C" void add_rms_norm_##name(const T* x, int64_t x_stride, const T* residual,         \
                                        int64_t residual_stride, const T* weight, T* y,          \
                                        T* total, int64_t rows, int64_t n, float eps,            \
                                        int threads) {                                           \
        add_rms_norm(x, x_stride, residual, residual_stride, weight, y, total, rows, n, eps,     \
                     threads);                                                                   \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
