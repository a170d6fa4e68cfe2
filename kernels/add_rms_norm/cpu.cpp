// total = x + residual, y = total / sqrt(mean(total^2) + eps) * weight: both inputs are read once
// from memory, both outputs written once; the row of `total` stays in the cache in between.
#include <memory>
#include "rows.h"

// As `store`, in three instructions for eight.  The processor's own rounding takes denormals for 0.
template <class T> static inline void put(T* p, f32v v) { store(p, v); }
#if defined(__AVX512BF16__)
template <> inline void put(bf16* p, f32v v) {
    constexpr int DENORMAL = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, DENORMAL), 0)) return store(p, v);
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &narrow, sizeof narrow);
}
#endif

// total = a + b, and 1 / sqrt(mean(total^2) + eps) with the sums of `inverse_rms`, in one pass.
template <class T>
static inline float add_row(const T* a, const T* b, T* total, int64_t n, float eps) {
    double squares = 0;
    int64_t i = 0;
    const auto add = [&](int64_t at, f32v part) {
        put(total + at, load(a + at) + load(b + at));
        const f32v v = load(total + at);  // as rounded
        return fma(v, v, part);
    };
#if !defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>) {  // half the instructions, in another order of lanes
        while (i + 2 * LANES <= n) {
            f32v part[4] = {};
            const int64_t end = i + 2048 < n ? i + 2048 : n;
            const auto add_two = [&](int64_t at, f32v* to) {
                const f32v words =
                    two_vectors([&](auto i) { return part_at(a, i) + part_at(b, i); }, at);
                store(reinterpret_cast<float*>(total + at), words);
                const f32v even = (f32v)((u32v)words << 16), odd = (f32v)((u32v)words & 0xffff0000);
                to[0] = fma(even, even, to[0]);
                to[1] = fma(odd, odd, to[1]);
            };
            for (; i + 4 * LANES <= end; i += 4 * LANES) {
                add_two(i, part);
                add_two(i + 2 * LANES, part + 2);
            }
            for (; i + 2 * LANES <= end; i += 2 * LANES) add_two(i, part);
            squares += sum((part[0] + part[1]) + (part[2] + part[3]));
        }
    }
#endif
    while (i + LANES <= n) {
        f32v part[4] = {};
        const int64_t end = i + 2048 < n ? i + 2048 : n;
        for (; i + 4 * LANES <= end; i += 4 * LANES)
            for (int u = 0; u < 4; ++u) part[u] = add(i + u * LANES, part[u]);
        for (; i + LANES <= end; i += LANES) part[0] = add(i, part[0]);
        squares += sum((part[0] + part[1]) + (part[2] + part[3]));
    }
    for (; i < n; ++i) {
        from_float(total + i, to_float(a[i]) + to_float(b[i]));
        squares += to_float(total[i]) * to_float(total[i]);
    }
    return float(1. / std::sqrt(squares / double(n) + eps));
}

// Writes a row past the caches: f(i) gives what `stream` takes, 64 bytes of T; g(i) one element.
template <class T, class F, class G>
static inline void stream_row(T* y, int64_t n, F f, G g) {
    constexpr int WIDE = sizeof(f32v) / sizeof(T);
    int64_t i = 0;
    for (; i < n && reinterpret_cast<uintptr_t>(y + i) % sizeof(f32v); ++i) y[i] = g(i);
    for (; i + WIDE <= n; i += WIDE) stream(reinterpret_cast<float*>(y + i), f(i));
    for (; i < n; ++i) y[i] = g(i);
}

// y = total * inverse * weight, and total itself from where it was kept, both past the caches.
template <class T>
static inline void stream_both(const T* kept, const T* weight, T* y, T* total, int64_t n,
                               float inverse AND_NEXT(T, next) AND_NEXT(T, next_too)) {
    constexpr int WIDE = sizeof(f32v) / sizeof(T);
    stream_row(
        y, n,
        [&](int64_t i) {
            ASK_FOR(next, i);
            ASK_FOR(next_too, i);
#if !defined(__AVX512F__)
            if constexpr (std::is_same_v<T, bf16>)
                return two_vectors(
                    [&](auto at) { return part_at(kept, at) * inverse * part_at(weight, at); }, i);
#endif
            T wide[WIDE];
            for (int u = 0; u < WIDE; u += LANES)
                put(wide + u, load(kept + i + u) * inverse * load(weight + i + u));
            return load_as<f32v>(wide);
        },
        [&](int64_t i) {
            T one;
            from_float(&one, to_float(kept[i]) * inverse * to_float(weight[i]));
            return one;
        });
    stream_row(
        total, n, [&](int64_t i) { return load_as<f32v>(kept + i); },
        [&](int64_t i) { return kept[i]; });
    stream_fence();
}

template <class T>
static void add_rms_norm(const T* x, int64_t x_stride, const T* residual, int64_t residual_stride,
                         const T* weight, T* y, T* total, int64_t rows, int64_t n, float eps,
                         int threads) {
    const bool streamed = streams<T>(rows, n);
    // a streamed total leaves the cache: keep the row in a buffer of the thread for the norm
    const auto run = [&](int64_t row, T* kept) {
        T *row_total = total + row * n, *row_y = y + row * n;
        T* sums = streamed ? kept : row_total;
        const float inverse =
            add_row(x + row * x_stride, residual + row * residual_stride, sums, n, eps);
        if (streamed)
            stream_both(kept, weight, row_y, row_total, n,
                        inverse AND_NEXT_ROW(x + row * x_stride, x_stride, n)
                            AND_NEXT_ROW(residual + row * residual_stride, residual_stride, n));
        else
            norm_row(sums, weight, row_y, n, inverse, false);
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
