// y = (x w^T) * scale + bias; w int8 (N, K) row-major, one scale per output.  At small batch the
// time is that of reading w: it is read once, in order, each thread a run of rows.  With VNNI bf16
// activations become whole numbers of 16 bits: 2 instructions for 64 weights.  fp32 and fp16 ones
// meet weights in fp32: of 24 bits, 3 instructions for 64, one row took 1.05 times as long (8 rows
// 0.93, 64 rows 0.83).  With AVX2 alone bf16 becomes whole numbers of 16 bits and the others, while
// rows are few, of 30: widening weights to floats takes longer than to 16 bits.
#include "arranged.h"
#include "narrow_weights.h"
#include "shorts.h"

// How many signed bytes an activation becomes.  A row's largest may be PEAK times the root of its
// mean square, for the error of a result to stay below a quarter of what rounding to bf16 costs.
#if defined(__AVX512VNNI__)
template <class T> constexpr int DIGITS_OF = std::is_same_v<T, bf16> ? 2 : 0;
constexpr float PEAK = 32.f;
#else
template <class T> constexpr int DIGITS_OF = 0;
#endif

#if defined(HAS_SHORTS)
constexpr float PEAK = 32.f;
constexpr float PEAK_OF_HALVES = 4096.f;  // what is cut off is then 2^-17 of an average number
constexpr int64_t MANY = 32;  // rows from which fp32 is: one of these may differ in bits from one alone

template <class T>
static void int8_linear(const T* x, int64_t x_stride, const int8_t* w, const float* scale,
                        const float* bias, T* y, int64_t M, int64_t N, int64_t K, int threads) {
    constexpr bool halves = !std::is_same_v<T, bf16>;
    constexpr int parts = halves ? 2 : 1;  // rows of shorts for one of x
    const int64_t stride = halves && M >= MANY ? 0 : parts * apart(K) * int64_t(sizeof(int16_t));
    std::vector<float> row_scale;
    const Arranged rows =
        arrange(x, x_stride, M, K, apart(K), stride, [&](const float* row, uint8_t* to) {
            float unit;
            if (!split_shorts<halves>(row, K, halves ? PEAK_OF_HALVES : PEAK, (int16_t*)to, &unit))
                return false;
            row_scale.push_back(unit);
            return true;
        });
    const auto put = [&](int64_t n, int64_t m, float v) {
        from_float(y + m * N + n, v * scale[n] + (bias ? bias[n] : 0.f));
    };
    const auto put_row = [&](int64_t m, int64_t n, int64_t count, const float* v) {
        fill_row(
            y + m * N + n, count, false,
            [&](int64_t i) {
                const f32v scaled = load(v + i) * load(scale + n + i);
                return bias ? scaled + load(bias + n + i) : scaled + 0.f;
            },
            [&](int64_t i) { return v[i] * scale[n + i] + (bias ? bias[n + i] : 0.f); });
    };
    const int64_t shorts = rows.by_digits.size(), floats = rows.by_floats.size();
    const auto* narrow = (const int16_t*)rows.digits;
    const auto whole = [&](int64_t n, int64_t i, double v) {
        put(n, rows.by_digits[i], float(v) * row_scale[i]);
    };
    const auto run = [&](int thread, int of) {
        const Share share(N, thread, of, parts * M < TURNED ? int64_t(TILE_ROWS) : PANEL);
        const std::unique_ptr<Word[]> scratch(new Word[panel_scratch(parts * M, 0)]);
        if (parts * shorts >= TURNED) {
            panel_rows<Shorts>(
                (const Word*)narrow, apart(K) / 2, parts * shorts, (K + 31) / 32 * 16, share.begin,
                share.end, scratch.get(),
                [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
                    turn_shorts(w, K, n0, n1, w0, w1, panel);
                },
                [&](int64_t r, int64_t n, int64_t count, const double* sums) {
                    if (r % parts) return;
                    const int64_t m = rows.by_digits[r / parts];
                    float value[PANEL];
                    for (int i = 0; i < PANEL; ++i)
                        value[i] = float(halves ? sums[i] * 32768. + sums[i + PANEL] : sums[i]) *
                                   row_scale[r / parts];
                    put_row(m, n, count, value);
                });
        } else {
            double upper = 0;
            shorts_rows(narrow, parts * shorts, w, share.begin, share.end, K, false,
                        [&](int64_t n, int64_t r, double v) {
                            if (!halves) whole(n, r, v);
                            else if (r % 2) whole(n, r / 2, upper * 32768. + v);
                            else upper = v;
                        });
        }
        if (floats && M >= MANY) {
            panel_rows<Singles>(
                (const Word*)rows.wide, apart(K), floats, K, share.begin, share.end, scratch.get(),
                [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
                    turn_wide(w, K, n0, n1, w0, w1, panel);
                },
                [&](int64_t m, int64_t n, int64_t count, const float* sums) {
                    put_row(rows.by_floats[m], n, count, sums);
                });
        } else {
            const std::unique_ptr<float[]> wide(
                floats >= Fma::WIDEN_ONCE ? new float[BLOCK_ROWS * apart(K)] : nullptr);
            matmul_rows<Fma>(rows.wide, apart(K), floats, w, K, share.begin, share.end, K, wide.get(),
                             [&](int64_t n, int64_t i, float v) { put(n, rows.by_floats[i], v); });
        }
    };
    if (threads <= 1 || N * K < SERIAL_ELEMENTS) return run(0, 1);
#pragma omp parallel num_threads(threads)
    run(omp_get_thread_num(), omp_get_num_threads());
}
#else
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
#endif

#define ENTRY(T, name)                                                                           \
    extern "C" void int8_linear_##name(const T* x, int64_t x_stride, const int8_t* w,            \
                                       const float* scale, const float* bias, T* y, int64_t M,   \
                                       int64_t N, int64_t K, int threads) {                      \
        int8_linear(x, x_stride, w, scale, bias, y, M, N, K, threads);                           \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
