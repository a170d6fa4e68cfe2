// y = gelu(x + bias), element by element, by the erf or in the tanh form.  Large outputs bypass the
// caches.
#include "rows.h"

// z Phi(z).  Below 0, Phi(z) = erfc(|z| / sqrt 2) / 2 = e^(-z^2 / 2) t P(t), t = 1 / (1 + 0.27 |z|),
// which cancels nothing; P is the minimax polynomial for 0 <= |z| <= 14.5 (2.4e-8, relative).
#if defined(__AVX512F__)
template <bool ROUGH> static inline f32v gelu_erf(f32v z) {
    const f32v t = 1.f / fma(larger(z, -z), splat(0.27f), splat(1.f));
    f32v p = splat(0.0289610941f);
    for (const float c : {-0.126485810f, 0.169786021f, -0.0692106187f, 0.107825533f, 0.0720496476f,
                          0.101810604f, 0.107542880f, 0.107720658f})
        p = fma(p, t, splat(c));
    const f32v below = exponential(z * z * -0.5f) * (p * t);
    return z * choose((i32v)(z < 0.f), below, 1.f - below);
}
#else
// P by pairs of terms, which wait less for one another; ROUGH: t = 1 / (1 + 0.3 |z|), P to 9e-6.
template <bool ROUGH> static inline f32v gelu_erf(f32v z) {
    const f32v t = 1.f / fma(larger(z, -z), splat(ROUGH ? 0.3f : 0.27f), splat(1.f)), t2 = t * t;
    const auto two = [&](float a, float b) { return fma(splat(a * TINY), t, splat(b * TINY)); };
    f32v p;
    if constexpr (ROUGH) {
        p = fma(fma(two(-0.0767000169f, 0.214847401f), t2, two(-0.015595967f, 0.143472627f)), t2,
                two(0.113922983f, 0.120057404f));
    } else {
        const f32v t4 = t2 * t2;
        const f32v high = fma(two(-0.126485810f, 0.169786021f), t2,
                              two(-0.0692106187f, 0.107825533f));
        const f32v low = fma(two(0.0720496476f, 0.101810604f), t2, two(0.107542880f, 0.107720658f));
        p = fma(fma(splat(0.0289610941f * TINY), t4, high), t4, low);
    }
    const f32v below = exponential<Wanted::SMALL, ROUGH>(z * z * -0.5f) * (p * t);
    return z * choose((i32v)z >> 31, below, 1.f - below);
}
#endif

// 0.5 z (1 + tanh u) = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)
template <bool ROUGH> static inline f32v gelu_tanh(f32v z) {
    const f32v minus_2u = z * fma(z * z, splat(-0.0713548162726f), splat(-1.59576912161f));
#if defined(__AVX512F__)
    return z / (1.f + exponential(minus_2u));
#else
    return z / exponential<Wanted::PLUS_ONE, ROUGH>(minus_2u);
#endif
}

template <class T, class Gelu>
static inline void gelu_bias(const T* x, int64_t stride, const T* bias, T* y, int64_t rows,
                             int64_t n, int threads, Gelu gelu) {
    each_row(rows, n, threads, [&](int64_t row) {
        const T* in = x + row * stride;
        fill_row(
            y + row * n, n, streams<T>(rows, n),
            [&](AT i) { return gelu(PART(in, i) + PART(bias, i)); },
            [&](int64_t i) { return gelu(splat(to_float(in[i]) + to_float(bias[i])))[0]; });
    });
}

#define ENTRY(T, name)                                                                           \
    extern "C" void gelu_bias_##name(const T* x, int64_t stride, const T* bias, T* y,            \
                                      int64_t rows, int64_t n, int threads) {                    \
        gelu_bias(x, stride, bias, y, rows, n, threads,                                          \
                  [](f32v z) { return gelu_erf<sizeof(T) == 2>(z); });                           \
    }                                                                                            \
    extern "C" void gelu_bias_tanh_##name(const T* x, int64_t stride, const T* bias, T* y,       \
                                           int64_t rows, int64_t n, int threads) {               \
        gelu_bias(x, stride, bias, y, rows, n, threads,                                          \
                  [](f32v z) { return gelu_tanh<sizeof(T) == 2>(z); });                          \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
