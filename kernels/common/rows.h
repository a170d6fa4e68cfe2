// Work on rows of a matrix: threads share the rows; sums run in a fixed order, so that results do
// not depend on the number of threads.
#pragma once
#include "simd.h"

constexpr int64_t SERIAL_ELEMENTS = 1 << 15;  // below, waking threads costs more than it saves

template <class Body> inline void each_row(int64_t rows, int64_t n, int threads, Body body) {
    if (threads <= 1 || rows == 1 || rows * n < SERIAL_ELEMENTS) {
        for (int64_t row = 0; row < rows; ++row) body(row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) body(row);
}

template <class T> inline bool streams(int64_t rows, int64_t n) {
    return rows * n * int64_t(sizeof(T)) >= int64_t(STREAM_BYTES);
}

// How the functions of `fill_row` read: `[&](AT i) { return PART(x, i); }` is LANES elements of x.
// AVX-512 has instructions that convert bf16, and keeps the code that was measured with it.
#if defined(__AVX512F__)
#define AT int64_t
#define PART(p, at) load((p) + (at))
#define PART_IN_ANY_ORDER(p, u) load((p) + (u) * LANES)
#define ASK_FOR(p, at)
#define AND_NEXT(T, name)
#define AND_NEXT_ROW(row, stride, n)
#else
#define AT auto
#define PART(p, at) part_at(p, at)
#define PART_IN_ANY_ORDER(p, u) part_in_any_order(p, u)
#define ASK_FOR(p, at) ask_for(p, at)  // so that memory does not rest while a row is worked on
#define AND_NEXT(T, name) , const T* name = nullptr
#define AND_NEXT_ROW(row, stride, n) , next_row(row, stride, n)
#include "pairs.h"
#endif

// 1 / sqrt(mean(x^2) + eps).  Blocks of the row are added up in double: long rows lose nothing.
template <class T> inline float inverse_rms(const T* x, int64_t n, float eps) {
    double total = 0;
    int64_t i = 0;
    while (i + LANES <= n) {
        f32v part[4] = {};
        const int64_t end = i + 2048 < n ? i + 2048 : n;
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (int u = 0; u < 4; ++u) {
                const f32v v = PART_IN_ANY_ORDER(x + i, u);
                part[u] = fma(v, v, part[u]);
            }
        for (; i + LANES <= end; i += LANES) {
            const f32v v = load(x + i);
            part[0] = fma(v, v, part[0]);
        }
        total += sum((part[0] + part[1]) + (part[2] + part[3]));
    }
    for (; i < n; ++i) total += to_float(x[i]) * to_float(x[i]);
    return float(1. / std::sqrt(total / double(n) + eps));
}

// y[i] = f(i) over a row: `f` gives the LANES elements from i on, in bf16 also those at an EveryOther,
// if it takes one; `g` gives one.  Who fills many short rows fences once, after the last.
template <class T, class F, class G>
inline void fill_row(T* y, int64_t n, bool streamed, F f, G g, bool fence = true) {
    int64_t i = 0;
    if (streamed && sizeof(T) == 4) {
        for (; i < n && reinterpret_cast<uintptr_t>(y + i) % 64; ++i) from_float(y + i, g(i));
        for (; i + LANES <= n; i += LANES) stream(reinterpret_cast<float*>(y + i), f(i));
    } else if (streamed) {  // two vectors of halves make one of floats
        for (; i < n && reinterpret_cast<uintptr_t>(y + i) % 64; ++i) from_float(y + i, g(i));
        for (; i + 2 * LANES <= n; i += 2 * LANES) {
#if !defined(__AVX512F__)
            if constexpr (std::is_same_v<T, bf16>) {
                stream(reinterpret_cast<float*>(y + i), two_vectors(f, i));
                continue;
            }
#endif
            T pair[2 * LANES];
            store(pair, f(i));
            store(pair + LANES, f(i + LANES));
            stream(reinterpret_cast<float*>(y + i), load_as<f32v>(pair));
        }
    }
#if !defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>)
        for (; i + 2 * LANES <= n; i += 2 * LANES)
            store(reinterpret_cast<float*>(y + i), two_vectors(f, i));
#endif
    for (; i + LANES <= n; i += LANES) store(y + i, f(i));
    for (; i < n; ++i) from_float(y + i, g(i));
    if (streamed && fence) stream_fence();
}

template <class T>
inline void norm_row(const T* x, const T* weight, T* y, int64_t n, float inverse,
                     bool streamed AND_NEXT(T, next)) {
    fill_row(
        y, n, streamed,
        [&](AT i) {
            ASK_FOR(next, i);
            return PART(x, i) * inverse * PART(weight, i);
        },
        [&](int64_t i) { return to_float(x[i]) * inverse * to_float(weight[i]); });
}
