// y = x / sqrt(mean(x^2) + eps) * weight, row by row: one read of x from memory (the second pass
// finds the row in the cache), one write of y.  Large outputs bypass the caches.
#include "rows.h"

template <class T>
static void rms_norm(const T* x, int64_t stride, const T* weight, T* y, int64_t rows, int64_t n,
                     float eps, int threads) {
    each_row(rows, n, threads, [&](int64_t row) {
        const T* in = x + row * stride;
        norm_row(in, weight, y + row * n, n, inverse_rms(in, n, eps),
                 streams<T>(rows, n) AND_NEXT_ROW(in, stride, n));
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void rms_norm_##name(const T* x, int64_t stride, const T* weight, T* y,           \
                                    int64_t rows, int64_t n, float eps, int threads) {           \
        rms_norm(x, stride, weight, y, rows, n, eps, threads);                                   \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
