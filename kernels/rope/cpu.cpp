// y_i = x_i cos_i - x_{i+half} sin_i, y_{i+half} = x_{i+half} cos_i + x_i sin_i: token by token,
// all heads of it with the same angles.  Large outputs bypass the caches.
#include "rows.h"

#if !defined(__AVX512F__)
constexpr int64_t SORTED = 256;  // of halves up to this the angles are sorted, once for all heads

// The heads of one token in bf16, two of which a word holds.
static void rope_token(const bf16* x, int64_t stride, const float* c, const float* s, bf16* y,
                       int64_t heads, int64_t half, bool streamed) {
    float cos[SORTED], sin[SORTED];
    sort_pairs(c, cos, half);
    sort_pairs(s, sin, half);
    for (int64_t head = 0; head < heads; ++head) {
        const bf16 *first = x + head * stride, *second = first + half;
        bf16* out = y + head * 2 * half;
        fill_row(
            out, half, streamed,
            [&](auto at) {
                return fma(part_at(first, at), sorted_part(cos, at),
                           -(part_at(second, at) * sorted_part(sin, at)));
            },
            [&](int64_t i) { return to_float(first[i]) * c[i] - to_float(second[i]) * s[i]; },
            false);
        fill_row(
            out + half, half, streamed,
            [&](auto at) {
                return fma(part_at(second, at), sorted_part(cos, at),
                           part_at(first, at) * sorted_part(sin, at));
            },
            [&](int64_t i) { return to_float(second[i]) * c[i] + to_float(first[i]) * s[i]; },
            false);
    }
}
#endif

template <class T>
static void rope(const T* x, int64_t stride, const float* cos, const float* sin, T* y,
                 int64_t tokens, int64_t length, int64_t heads, int64_t half, int threads) {
    const int64_t width = heads * 2 * half;
    const bool streamed = streams<T>(tokens, width);
    each_row(tokens, width, threads, [&](int64_t token) {
        const float* c = cos + token % length * half;
        const float* s = sin + token % length * half;
#if !defined(__AVX512F__)
        if constexpr (std::is_same_v<T, bf16>) {
            bf16* out = y + token * width;
            if (half <= SORTED && half % (2 * LANES) == 0 &&
                !(streamed && (reinterpret_cast<uintptr_t>(out) % 64 || half % 32))) {
                rope_token(x + token * heads * stride, stride, c, s, out, heads, half, streamed);
                if (streamed) stream_fence();
                return;
            }
        }
#endif
        for (int64_t head = 0; head < heads; ++head) {
            const T* first = x + (token * heads + head) * stride;
            const T* second = first + half;
            T* out = y + token * width + head * 2 * half;
            fill_row(
                out, half, streamed,
                [&](int64_t i) {
                    return fma(load(first + i), load(c + i), -(load(second + i) * load(s + i)));
                },
                [&](int64_t i) { return to_float(first[i]) * c[i] - to_float(second[i]) * s[i]; },
                false);
            fill_row(
                out + half, half, streamed,
                [&](int64_t i) {
                    return fma(load(second + i), load(c + i), load(first + i) * load(s + i));
                },
                [&](int64_t i) { return to_float(second[i]) * c[i] + to_float(first[i]) * s[i]; },
                false);
        }
        if (streamed) stream_fence();
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void rope_##name(const T* x, int64_t stride, const float* cos, const float* sin,  \
                                T* y, int64_t tokens, int64_t length, int64_t heads,             \
                                int64_t half, int threads) {                                     \
        rope(x, stride, cos, sin, y, tokens, length, heads, half, threads);                      \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
