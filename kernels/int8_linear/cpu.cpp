// y = (x w^T) * scale + bias; w int8 (N, K) row-major, one scale per output.  At small batch the
// time is that of reading w: it is read once, in order, each thread a run of rows.  With VNNI bf16
// activations become whole numbers of 16 bits: 2 instructions for 64 weights.  fp32 and fp16 ones
// meet weights in fp32: of 24 bits, 3 instructions for 64, one row took 1.05 times as long (8 rows
// 0.93, 64 rows 0.83).
#include "arranged.h"
#include "narrow_weights.h"

// How many signed bytes an activation becomes.  A row's largest may be PEAK times the root of its
// mean square, for the error of a result to stay below a quarter of what rounding to bf16 costs.
#if defined(__AVX512VNNI__)
template <class T> constexpr int DIGITS_OF = std::is_same_v<T, bf16> ? 2 : 0;
constexpr float PEAK = 32.f;
#else
template <class T> constexpr int DIGITS_OF = 0;
#endif

template <class T>
static void int8_linear(const T* x, int64_t x_stride, const int8_t* w, const float* scale,
                        const float* bias, T* y, int64_t M, int64_t N, int64_t K, int threads) {
    const int64_t stride = DIGITS_OF<T> * apart(K);
    const Arranged rows =
        arrange(x, x_stride, M, K, apart(K), stride, [&](const float* row, uint8_t* to) {
#if defined(__AVX512VNNI__)
            if constexpr (DIGITS_OF<T> > 0) return split_row<DIGITS_OF<T>>(row, K, PEAK, to);
#endif
            return false;
        });
    const auto put = [&](int64_t n, int64_t m, float v) {
        from_float(y + m * N + n, v * scale[n] + (bias ? bias[n] : 0.f));
    };
    const auto run = [&](int thread, int of) {
        const Share share(N, thread, of, TILE_ROWS);
#if defined(__AVX512VNNI__)
        if constexpr (DIGITS_OF<T> > 0)
            matmul_rows<DotDigits<DIGITS_OF<T>>>(
                rows.digits, stride, rows.by_digits.size(), w, K, share.begin, share.end, K,
                nullptr, [&](int64_t n, int64_t i, int64_t v) {
                    const auto end = load_as<Ending>(rows.digits + i * stride +
                                                     ending_at(K, DIGITS_OF<T>));
                    put(n, rows.by_digits[i], float(v - end.too_large) * end.scale);
                });
#endif
        const int64_t others = rows.by_floats.size();
        const std::unique_ptr<float[]> scratch(
            others >= Fma::WIDEN_ONCE ? new float[BLOCK_ROWS * apart(K)] : nullptr);
        matmul_rows<Fma>(rows.wide, apart(K), others, w, K, share.begin, share.end, K,
                         scratch.get(),
                         [&](int64_t n, int64_t i, float v) { put(n, rows.by_floats[i], v); });
    };
    if (threads <= 1 || N * K < SERIAL_ELEMENTS) return run(0, 1);
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}

#define ENTRY(T, name)                                                                           \
    extern "C" void int8_linear_##name(const T* x, int64_t x_stride, const int8_t* w,            \
                                       const float* scale, const float* bias, T* y, int64_t M,   \
                                       int64_t N, int64_t K, int threads) {                      \
        int8_linear(x, x_stride, w, scale, bias, y, M, N, K, threads);                           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
