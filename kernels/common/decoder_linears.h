// The linear layers of a decoder's step, for every kind of weights and a few or many rows: in which
// form the activations meet the weights, and the products themselves.
#pragma once
#include "decoder.h"
#include "int4_digits.h"
#include "narrow_weights.h"
#include "panels.h"

// How activations stand for a kind of weights.
enum Form { PLAIN, HALVES, BYTES, PLANES, NIBBLES, QUANTIZED, PAIRED };
static Form form_of(const Linear& l, bool prompt, bool narrow) {
    if (l.kind == INT8_DYNAMIC) return QUANTIZED;
#if defined(__AVX512BF16__)
    if (prompt && (narrow || l.kind == BF16) && l.kind != FP32 && l.kind != INT4) return PAIRED;
#endif
    (void)narrow;
#if defined(__AVX512VNNI__)
    if (l.kind == INT8) return prompt ? PLANES : BYTES;
#endif
    if (prompt) return PLAIN;
#if defined(__AVX512VNNI__)
    if (l.kind == INT4) return NIBBLES;
#endif
    return l.kind == BF16 ? HALVES : PLAIN;
}

struct Buffers {  // rows of `stride` floats and bytes of 3 * stride
    float* wide;
    uint8_t* bytes;
    float* scale;
};
struct Rows {  // activations (M, K) in one of the forms, `stride` numbers from row to row
    Form form;
    const float* wide;
    const uint8_t* bytes;
    const float* scale;
    int64_t M, K, stride;
    Read read;  // how a step reads the weights that they meet
};

// The part of linear `l` that makes outputs n0 <= n < n1 of `x`, given as put(n, m, value).
template <class Put>
static void step_linear(const Linear& l, const Rows& x, int64_t n0, int64_t n1, float* scratch,
                        Put put) {
    const auto run = [&](auto d, const auto* rows, const auto* w, auto done) {
        matmul_rows<decltype(d)>(
            rows, x.stride, x.M, w, l.k, n0, n1, l.k,
            (std::remove_const_t<std::remove_pointer_t<decltype(rows)>>*)scratch, done, x.read);
    };
    const auto scaled = [&](int64_t n, int64_t m, float v) { put(n, m, v * l.scale[n]); };
    const Int4 int4{(const uint32_t*)l.w, (const bf16*)l.scale, l.k, l.group};
    (void)scaled;
    switch (l.kind) {
    case FP32: return run(Fma(), x.wide, (const float*)l.w, put);
    case BF16: return run(DotHalves(), x.wide, (const bf16*)l.w, put);
#if defined(__AVX512VNNI__)
    case INT4:
        return int4_digits_rows<3>(x.bytes, x.stride, x.M, int4, n0, n1, put);
    case INT8:
        return run(DotBytes(), x.bytes, (const int8_t*)l.w, [&](int64_t n, int64_t m, double v) {
            scaled(n, m, DotBytes::value(v, l.sums[n], x.scale[m]));
        });
    case INT8_DYNAMIC:
        return run(DotInt8(), x.bytes, (const int8_t*)l.w, [&](int64_t n, int64_t m, int32_t v) {
            put(n, m, float(v - 128 * l.sums[n]) * (x.scale[m] * l.scale[n]));
        });
#else
    case INT4: return int4_rows(x.wide, x.stride, x.M, int4, n0, n1, put);
    case INT8: return run(Fma(), x.wide, (const int8_t*)l.w, scaled);
    case INT8_DYNAMIC:  // the quantized activations stand in `wide`
        return run(Fma(), x.wide, (const int8_t*)l.w, [&](int64_t n, int64_t m, float v) {
            put(n, m, v * (x.scale[m] * l.scale[n]));
        });
#endif
    }
}

// The same for the rows of a prompt.
template <class Put>
static void prompt_linear(const Linear& l, const Rows& x, int64_t n0, int64_t n1, float* scratch,
                          Put put) {
    const auto run = [&](auto f, const void* rows, int64_t bytes, auto fill, auto value) {
        using F = decltype(f);
        const int64_t parts = x.form == PLANES ? 3 : 1;  // rows of words that make one of x
        panel_rows<F>((const Word*)rows, bytes / 4, x.M * parts,
                      (l.k + F::PER_WORD - 1) / F::PER_WORD, n0, n1, (Word*)scratch, fill,
                      [&](int64_t row, int64_t n, int64_t count, const float* sums) {
                          const int64_t m = row / parts;
                          for (int64_t i = 0; i < count && row % parts == 0; ++i)
                              put(n + i, m, value(n + i, m, sums + i));
                      });
    };
    const auto rows_of = [&](auto f, const auto* w) {
        return [=, k = l.k](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
            turn<decltype(f)>(w, k, n0, n1, w0, w1, panel);
        };
    };
    const auto wide_int8 = [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
        turn_wide((const int8_t*)l.w, l.k, n0, n1, w0, w1, panel);
    };
    const auto plain = [](int64_t, int64_t, const float* v) { return *v; };
    const auto scaled = [&](int64_t n, int64_t, const float* v) { return *v * l.scale[n]; };
    const auto both = [&](int64_t n, int64_t m, const float* v) {
        return *v * (x.scale[m] * l.scale[n]);
    };
    const int64_t wide = 4 * x.stride;
    (void)both;
#if defined(__AVX512BF16__)
    if (x.form == PAIRED && l.kind == BF16)
        return run(Pairs(), x.bytes, x.stride, rows_of(Pairs(), (const bf16*)l.w), plain);
    if (x.form == PAIRED)
        return run(Pairs(), x.bytes, x.stride, rows_of(Pairs(), (const int8_t*)l.w), scaled);
#endif
#if defined(__AVX512VNNI__)
    if (x.form == PLANES)  // three sums, of the upper, the middle and the lower bytes
        return run(Quads(), x.bytes, x.stride / 3, rows_of(Bytes(), (const int8_t*)l.w),
                   [&](int64_t n, int64_t m, const float* v) {
                       const auto part = [&](int i) { return bit_cast<int32_t>(v[i * PANEL]); };
                       const float upper = float(part(0) - 128 * l.sums[n]) * 65536.f;
                       return (upper + (float(part(1)) * 256.f + float(part(2)))) *
                              (x.scale[m] * l.scale[n]);
                   });
    if (x.form == QUANTIZED)
        return run(Quads(), x.bytes, x.stride, rows_of(Bytes(), (const int8_t*)l.w),
                   [&](int64_t n, int64_t m, const float* v) {
                       return float(bit_cast<int32_t>(*v) - 128 * l.sums[n]) *
                              (x.scale[m] * l.scale[n]);
                   });
#else
    if (x.form == QUANTIZED) return run(Singles(), x.wide, wide, wide_int8, both);
#endif
    if (l.kind == FP32)
        return run(Singles(), x.wide, wide, rows_of(Singles(), (const float*)l.w), plain);
    if (l.kind == BF16)
        return run(Singles(), x.wide, wide, rows_of(Singles(), (const bf16*)l.w), plain);
    if (l.kind == INT8) return run(Singles(), x.wide, wide, wide_int8, scaled);
    const Int4 w{(const uint32_t*)l.w, (const bf16*)l.scale, l.k, l.group};
    run(
        Singles(), x.wide, wide,
        [&](int64_t n0, int64_t n1, int64_t w0, int64_t w1, Word* panel) {
            turn(w, n0, n1, w0, w1, panel);
        },
        plain);
}
