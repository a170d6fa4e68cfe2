// y = x (scale * q)^T + bias; q of four bits, a scale per group of inputs.  At small batch the time
// is that of reading q: once, in order, each thread a run of outputs.  With VNNI activations become
// whole numbers, of 24 bits for fp32 and fp16 and of 16 for bf16, a scale per row and group: 10 or 8
// vector instructions a cache line of weights, where widening eight nibbles to floats takes 23.
#include "arranged.h"
#include "int4_digits.h"
#include "panels.h"

#if defined(__AVX512VNNI__) || defined(HAS_INT4_DIGITS)
// The largest number of a group has 23 or 15 bits and a sign, so that what a group adds up to is
// rounded less than sums in fp32 are (23), or than bf16 results (15).
template <class T> constexpr int DIGITS_OF = std::is_same_v<T, bf16> ? 2 : 3;
#else
template <class T> constexpr int DIGITS_OF = 0;
#endif

#if defined(HAS_INT4_DIGITS)
constexpr int64_t MANY = 16;  // rows of fp32 from which panels of floats are faster than three digits
#endif

template <class T>
static void int4_linear(const T* x, int64_t x_stride, const uint32_t* packed, const bf16* scale,
                        const float* bias, T* y, int64_t M, int64_t N, int64_t K, int64_t group,
                        int threads) {
    const Int4 w{packed, scale, K, group};
#if defined(HAS_INT4_DIGITS)
    const bool turned = M >= MANY && DIGITS_OF<T> == 3;
#else
    const bool turned = false;
#endif
    const int64_t stride = DIGITS_OF<T> && !turned ? digits_bytes(K) : 0;
    const Arranged rows =
        arrange(x, x_stride, M, K, apart(K), stride, [&](const float* row, uint8_t* to) {
#if defined(__AVX512VNNI__) || defined(HAS_INT4_DIGITS)
            if (!fits_digits(row, K)) return false;
            split_digits<DIGITS_OF<T>>(row, K, group, to);
#endif
            return true;
        });
    const auto put = [&](int64_t n, int64_t m, float v) {
        from_float(y + m * N + n, v + (bias ? bias[n] : 0.f));
    };
    const auto run = [&](int thread, int of) {
        const Share share(N, thread, of, SIDE);
#if defined(__AVX512VNNI__)
        int4_digits_rows<DIGITS_OF<T>>(
            rows.digits, stride, rows.by_digits.size(), w, share.begin, share.end,
            [&](int64_t n, int64_t i, float v) { put(n, rows.by_digits[i], v); });
#elif defined(HAS_INT4_DIGITS)
        if (turned) {
            const std::unique_ptr<Word[]> scratch(new Word[panel_scratch(M, K)]);
            return panel_rows<Singles>(
                (const Word*)rows.wide, apart(K), M, K, share.begin, share.end, scratch.get(),
                [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
                    turn(w, n0, n1, w0, w1, panel);
                },
                [&](int64_t m, int64_t n, int64_t count, const float* sums) {
                    for (int64_t i = 0; i < count; ++i) put(n + i, m, sums[i]);
                });
        }
        const DigitRows<DIGITS_OF<T>> digits{rows.digits, stride, K};
        int4_digits_rows<DIGITS_OF<T>>(
            digits, rows.by_digits.size(), w, share.begin, share.end,
            [&](int64_t n, int64_t i, float v) { put(n, rows.by_digits[i], v); });
#endif
        int4_rows(
            rows.wide, apart(K), rows.by_floats.size(), w, share.begin, share.end,
            [&](int64_t n, int64_t i, float v) { put(n, rows.by_floats[i], v); });
    };
    if (threads <= 1 || N * K < SERIAL_ELEMENTS) return run(0, 1);
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}

#define ENTRY(T, name)                                                                           \
    extern "C" void int4_linear_##name(const T* x, int64_t x_stride, const uint32_t* packed,     \
                                       const bf16* scale, const float* bias, T* y, int64_t M,    \
                                       int64_t N, int64_t K, int64_t group, int threads) {       \
        int4_linear(x, x_stride, packed, scale, bias, y, M, N, K, group, threads);               \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
