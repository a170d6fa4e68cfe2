// Vectors of float in the widest form that the compiler's -march gives: 16 lanes with AVX-512, 8
// with AVX2, 4 otherwise.  Only GCC's vector extension and a few conversions: one source for all.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float f32v __attribute__((vector_size(4 * LANES)));
typedef int32_t i32v __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32v __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16v __attribute__((vector_size(2 * LANES)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From> inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
template <class V> inline V load_as(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }

// ---- one number ------------------------------------------------------------------------------
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    const float value = bit_cast<float>(magnitude << 13) * 0x1p112f;  // denormals come out right
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
#endif
}
inline void from_float(float* to, float x) { *to = x; }
inline void from_float(bf16* to, float x) {
    const uint32_t u = bit_cast<uint32_t>(x);
    const bool nan = x != x;
    to->bits = uint16_t(nan ? (u >> 16) | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline void from_float(f16* to, float x) {
#if defined(__F16C__)
    to->bits = _cvtss_sh(x, 0);
#else
    const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) { to->bits = uint16_t(sign | 0x7e00); return; }
    if (magnitude >= 0x477ff000) { to->bits = uint16_t(sign | 0x7c00); return; }
    if (magnitude < 0x38800000) {  // below the smallest normal: let the adder round to its step
        const float rounded = bit_cast<float>(magnitude) + 0.5f;
        to->bits = uint16_t(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000));
        return;
    }
    to->bits = uint16_t(sign | (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13);
#endif
}

// ---- a vector --------------------------------------------------------------------------------
inline f32v splat(float x) {  // adding to zeros would be an addition, for the sake of -0
#if defined(__AVX512F__)
    return (f32v)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (f32v)_mm256_set1_ps(x);
#elif defined(__SSE2__)
    return (f32v)_mm_set1_ps(x);
#else
    return f32v{} + x;
#endif
}
inline f32v load(const float* p) { return load_as<f32v>(p); }
inline void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }

inline f32v load(const bf16* p) {
#if defined(__AVX512F__)
    return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
    return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
    return (f32v)(__builtin_convertvector(load_as<u16v>(p), u32v) << 16);
#endif
}
#if !defined(__AVX512F__)
// Rounded to bf16 in the upper half of each word; of a NaN, that of all bits.
// The processor's own NaN and those that were bf16 have no bits below: none carries into the sign.
template <bool OWN_NANS = false> inline u32v rounded_up(f32v v) {
    const u32v u = (u32v)v, rounded = u + 0x7fff + (u >> 16 & 1);
    return OWN_NANS ? rounded : rounded | (u32v)(v != v);
}
#endif
inline void store(bf16* p, f32v v) {
#if defined(__AVX512F__)
    const u32v u = (u32v)v;
    u32v rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const u32v nan = (u32v)(v != v);
    rounded = (nan & (u >> 16 | 0x40)) | (~nan & rounded);
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)rounded);
#elif defined(__AVX2__)
    const __m256i rounded = (__m256i)(rounded_up(v) >> 16);
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                            _mm256_extracti128_si256(rounded, 1));
#else
    const u16v narrow = __builtin_convertvector(rounded_up(v) >> 16, u16v);
#endif
    std::memcpy(p, &narrow, sizeof narrow);
}
inline f32v load(const f16* p) {
#if defined(__AVX512F__)
    return (f32v)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
    return (f32v)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    f32v v;
    for (int i = 0; i < LANES; ++i) v[i] = to_float(p[i]);
    return v;
#endif
}
inline void store(f16* p, f32v v) {
#if defined(__AVX512F__)
    const __m256i narrow = _mm512_cvtps_ph((__m512)v, 0);
    std::memcpy(p, &narrow, sizeof narrow);
#elif defined(__F16C__)
    const __m128i narrow = _mm256_cvtps_ph((__m256)v, 0);
    std::memcpy(p, &narrow, sizeof narrow);
#else
    for (int i = 0; i < LANES; ++i) from_float(p + i, v[i]);
#endif
}

// a * b + c, rounded once where the processor can.  The compiler is told to fuse nothing by itself.
inline f32v fma(f32v a, f32v b, f32v c) {
#if defined(__AVX512F__)
    return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
#if defined(__AVX__)
inline float sum_of_four(__m128 v) {
    const __m128 two = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float sum_of_eight(__m256 v) {
    return sum_of_four(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
#endif
inline float sum(f32v v) {  // pairwise, in a fixed order: halves are added until one lane is left
#if defined(__AVX512F__)
    return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)));
#elif defined(__AVX2__)
    return sum_of_eight((__m256)v);
#else
    float lane[LANES];
    std::memcpy(lane, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
#endif
}
inline float maximum(f32v v) {  // NaN if a lane is
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) ? NAN : _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
    if (_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q))) return NAN;
    const __m128 four =
        _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float m = v[0];
    for (int i = 1; i < LANES; ++i) m = v[i] > m || v[i] != v[i] ? v[i] : m;
    return m;
#endif
}
inline f32v choose(i32v mask, f32v yes, f32v no) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (f32v)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)mask);
#else
    return (f32v)((mask & (i32v)yes) | (~mask & (i32v)no));
#endif
}
inline f32v larger(f32v a, f32v b) {  // a > b ? a : b, in one instruction: maxima are chains of it
#if defined(__AVX512F__)
    return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#else
    return choose((i32v)(a > b), a, b);
#endif
}
inline f32v smaller(f32v a, f32v b) {  // a < b ? a : b
#if defined(__AVX512F__)
    return (f32v)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (f32v)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (f32v)_mm_min_ps((__m128)a, (__m128)b);
#else
    return choose((i32v)(a < b), a, b);
#endif
}

// Which e^x somebody needs, where instructions can be saved: all; those of x <= 0, times TINY_UP, as
// long as what becomes of them is multiplied by TINY; or 1 + e^x (not with AVX-512).
enum class Wanted { ALL, SMALL, PLUS_ONE };
#if defined(__AVX512F__)
constexpr float TINY_UP = 1, TINY = 1;
#else
constexpr float TINY_UP = 0x1p33f, TINY = 0x1p-33f;  // with it, no e^x is below the normal numbers
#endif

// e^x to 1 unit in the last place (1 + e^x to 1.5); 0 below -103.98, infinity above 88.73, NaN stays
// NaN.  ROUGH: within 6e-6 of it, 1/300 of the rounding of the bf16 it becomes, where that is faster.
template <Wanted WANTED = Wanted::ALL, bool ROUGH = false> inline f32v exponential(f32v x) {
#if defined(__AVX512F__)
    // e^x = 2^(n/16) e^r: a table of 2^(j/16), j = n mod 16, and an r so small that four terms do
    const __m512 power = _mm512_setr_ps(
        1.f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f,
        1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.75625217f,
        1.8340081f, 1.91520655f);
    // of two operands, one a NaN, these give the second
    const f32v bounded = (f32v)_mm512_min_ps(
        (__m512)splat(89.f), _mm512_max_ps((__m512)splat(-104.f), (__m512)x));
    const f32v shifted = fma(bounded, splat(23.0831206f), splat(12582912.f));
    const f32v n = shifted - 12582912.f;  // to nearest; its low bits are shifted's
    f32v r = fma(n, splat(-0.0433216989f), bounded);
    r = fma(n, splat(1.19040895e-10f), r);
    f32v p = fma(r, splat(1.66666672e-1f), splat(0.5f));
    p = fma(p * r, r, r);
    const f32v factor = (f32v)_mm512_permutexvar_ps((__m512i)shifted, power);
    // 2^floor(n/16): rounds once, below the smallest normal too
    return (f32v)_mm512_scalef_ps((__m512)fma(factor, p, factor), (__m512)(n * 0.0625f));
#else
    // e^x = 2^n e^r.  Of two operands, one a NaN, larger and smaller give the second.
    f32v bounded = larger(splat(WANTED == Wanted::PLUS_ONE ? -85.f : -104.f), x);
    if (WANTED != Wanted::SMALL) bounded = smaller(splat(89.f), bounded);
    // n to nearest; `shifted` holds n + BIAS in its low bits
    constexpr int BIAS = WANTED == Wanted::ALL ? 254 : WANTED == Wanted::SMALL ? 160 : 125;
    const f32v shifted = fma(bounded, splat(1.44269504f), splat(12582912.f + BIAS));
    const f32v n = shifted - (12582912.f + BIAS);
    f32v r, p;  // p: (e^r - 1 - r) / r^2
#if defined(__FMA__)
    constexpr bool FUSED = true;
#else
    constexpr bool FUSED = false;
#endif
    if constexpr (ROUGH && FUSED) {
        r = fma(n, splat(-0.693147181f), bounded);
        p = fma(fma(splat(4.12773639e-2f), r, splat(1.67536005e-1f)), r, splat(5.0005126e-1f));
    } else {
        r = fma(n, splat(-0.693359375f), bounded);
        r = fma(n, splat(2.12194440e-4f), r);
        p = fma(splat(1.38148153e-3f), r, splat(8.36874545e-3f));
        p = fma(p, r, splat(4.16683853e-2f));
        p = fma(p, r, splat(1.66665211e-1f));
        p = fma(p, r, splat(4.9999994e-1f));
    }
    p = FUSED ? fma(fma(p, r, splat(1.f)), r, splat(1.f)) : (p * r * r + r) + 1.f;
    // 2^n in two factors: results below the smallest normal are rounded once, by the second
    const u32v bits = (u32v)shifted;
    if constexpr (WANTED == Wanted::ALL) {  // 2^(n/2) and the rest
        const u32v half = bits << 22 & 0xff800000;
        return p * (f32v)half * (f32v)((bits << 23) - half);
    }
    p *= (f32v)(bits << 23);
    return WANTED == Wanted::SMALL ? p : fma(p, splat(4.f), splat(1.f));
#endif
}
inline float exponential(float x) { return exponential(splat(x))[0]; }
template <bool ROUGH = false> inline f32v silu(f32v x) {
#if defined(__AVX512F__)
    return x / (1.f + exponential(-x));
#else
    return x / exponential<Wanted::PLUS_ONE, ROUGH>(-x);
#endif
}

// Bypasses the caches: for outputs so large that nobody finds them there.  p is aligned to 64.
inline void stream(float* p, f32v v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
}
inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
constexpr size_t STREAM_BYTES = size_t(16) << 20;  // outputs from here on are streamed
