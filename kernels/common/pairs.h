// Rows without AVX-512, which has instructions that convert bf16: two of them are a word of 32 bits,
// of which a shift makes the one, a mask the other, and as cheaply the way back.
#pragma once
#include "simd.h"

// The u-th of vectors that follow one another, where the order of 2 LANES elements does not matter.
template <class T> inline f32v part_in_any_order(const T* p, int u) {
    if constexpr (std::is_same_v<T, bf16>) {
        const u32v words = load_as<u32v>(p + u / 2 * 2 * LANES);
        return (f32v)(u % 2 ? words & 0xffff0000 : words << 16);
    } else {
        return load(p + u * LANES);
    }
}

// The row after this one, to be asked for while this one is written; null where it is too long to
// stay in the caches until then.  (Behind the last row nothing is read: asking never faults.)
template <class T> inline const T* next_row(const T* row, int64_t stride, int64_t n) {
    return n * int64_t(sizeof(T)) <= (64 << 10) ? row + stride : nullptr;
}

// Asks memory for the vector at i of a row to be read soon, if there is one.
template <class T> inline void ask_for(const T* p, int64_t i) {
    if (p) __builtin_prefetch(p + i);
}

// The vector of an array at i: LANES elements from there on,
template <class T> inline f32v part_at(const T* p, int64_t i) { return load(p + i); }
// or the even (U = 0) or odd of 2 LANES bf16, which cost an instruction each.
template <int U> struct EveryOther { int64_t i; };
template <int U> inline f32v part_at(const bf16* p, EveryOther<U> at) {
    return part_in_any_order(p + at.i, U);
}
template <int U> inline f32v sorted_part(const float* p, EveryOther<U> at) {  // see sort_pairs
    return load(p + at.i + U * LANES);
}
inline f32v sorted_part(const float* p, int64_t i) { return load(p + i); }
template <class T, int U> inline void ask_for(const T* p, EveryOther<U> at) {
    if (p && U == 0) __builtin_prefetch(p + at.i);
}

// Floats in the order that EveryOther takes: of 2 LANES, the even ones before the odd; NaN is the
// processor's own.
inline void sort_pairs(const float* from, float* to, int64_t n) {
    for (int64_t i = 0; i + 2 * LANES <= n; i += 2 * LANES)
        for (int u = 0; u < LANES; ++u) {
            const float even = from[i + 2 * u], odd = from[i + 2 * u + 1];
            to[i + u] = even == even ? even : NAN;
            to[i + u + LANES] = odd == odd ? odd : NAN;
        }
}

// 2 LANES of f from i on, rounded.
template <class F> inline f32v two_vectors(F&& f, int64_t i) {
    if constexpr (std::is_invocable_v<F, EveryOther<0>>) {
        const u32v even = rounded_up<true>(f(EveryOther<0>{i})),
                   odd = rounded_up<true>(f(EveryOther<1>{i}));
#if defined(__AVX2__)
        return (f32v)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
        return (f32v)(even >> 16 | (odd & 0xffff0000));
#endif
    } else {
#if defined(__AVX2__)
        const __m256i a = (__m256i)(rounded_up(f(i)) >> 16);
        const __m256i b = (__m256i)(rounded_up(f(i + LANES)) >> 16);
        return (f32v)_mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
#endif
        bf16 pair[2 * LANES];
        store(pair, f(i));
        store(pair + LANES, f(i + LANES));
        return load_as<f32v>(pair);
    }
}
