// What the vector units multiply at best: whole numbers in registers, nothing read or kept.  A probe,
// no operation: libraries have no product of int16, and int4 weights need no sums of 32 bits.
#include "dot.h"

#if defined(__SSSE3__)
#if defined(__AVX512VNNI__)
using Whole = __m512i;
struct Int16 {
    static constexpr int BYTES = 2;
    static Whole mac(Whole sum, Whole a, Whole b) { return _mm512_dpwssd_epi32(sum, a, b); }
};
struct Int4 {
    static constexpr int BYTES = 1;
    static Whole mac(Whole sum, Whole a, Whole b) { return _mm512_dpbusd_epi32(sum, a, b); }
};
#elif defined(__AVX2__)
using Whole = __m256i;
struct Int16 {
    static constexpr int BYTES = 2;
    static Whole mac(Whole sum, Whole a, Whole b) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }
};
struct Int4 {  // times bytes: sums of some fit 16 bits
    static constexpr int BYTES = 1;
    static Whole mac(Whole sum, Whole a, Whole b) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
    }
};
#else
using Whole = __m128i;
struct Int16 {
    static constexpr int BYTES = 2;
    static Whole mac(Whole sum, Whole a, Whole b) {
        return _mm_add_epi32(sum, _mm_madd_epi16(a, b));
    }
};
struct Int4 {
    static constexpr int BYTES = 1;
    static Whole mac(Whole sum, Whole a, Whole b) {
        return _mm_add_epi16(sum, _mm_maddubs_epi16(a, b));
    }
};
#endif

template <class Product> static int64_t run(int64_t steps, int threads) {
    constexpr int SUMS = 10;  // enough to wait for none, few enough for 16 registers
#pragma omp parallel num_threads(threads)
    {
        Whole sum[SUMS] = {}, a = {}, b = {};
        for (int64_t i = 0; i < steps; ++i)
            unrolled<SUMS>([&](auto j) INLINED {
                sum[j] = Product::mac(sum[j], a, b);
                // perhaps other numbers now: multiply again, after this sum
                asm volatile("" : "+x"(a), "+x"(b), "+x"(sum[j]));
            });
    }
    return 2 * int64_t(sizeof(Whole)) / Product::BYTES * SUMS * steps * threads;
}
#else  // a processor of another kind: no probe
struct Int16 {};
struct Int4 {};
template <class Product> static int64_t run(int64_t, int) { return 0; }
#endif

// Multiply as often as `steps` says in each thread; the operations of that, two to a product.
extern "C" int64_t products_int16(int64_t steps, int threads) { return run<Int16>(steps, threads); }
extern "C" int64_t products_int4(int64_t steps, int threads) { return run<Int4>(steps, threads); }
