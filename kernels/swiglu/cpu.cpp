// y = silu(gate) * up, element by element.  Large outputs bypass the caches.
#include "rows.h"

template <class T>
static void swiglu(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, T* y,
                   int64_t rows, int64_t n, int threads) {
    each_row(rows, n, threads, [&](int64_t row) {
        const T* g = gate + row * gate_stride;
        const T* u = up + row * up_stride;
        fill_row(
            y + row * n, n, streams<T>(rows, n),
            [&](AT i) { return silu<sizeof(T) == 2>(PART(g, i)) * PART(u, i); },
            [&](int64_t i) {
                return silu<sizeof(T) == 2>(splat(to_float(g[i])))[0] * to_float(u[i]);
            });
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void swiglu_##name(const T* gate, int64_t gate_stride, const T* up,               \
                                  int64_t up_stride, T* y, int64_t rows, int64_t n,              \
                                  int threads) {                                                 \
        swiglu(gate, gate_stride, up, up_stride, y, rows, n, threads);                           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
