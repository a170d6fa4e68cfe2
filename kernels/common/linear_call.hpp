// The linear layers over packed weights as torch's dispatcher calls them: see kernels/linears.py,
// which says the same in Python.
#pragma once
#include "torch_call.hpp"

// What all of them ask for: x (..., K) in evenly spaced dense rows, weights that are contiguous, a
// bias (N,) or none.
inline bool is_vector(const Tensor& t, int64_t n, const Tensor& x) {
    return t.shaped({n}) && t.dtype == aoti_torch_dtype_float32() && t.contiguous() &&
           t.device == x.device;
}
inline bool is_weight(const Tensor& t, const Tensor& x) {
    return t.contiguous() && t.device == x.device;
}
inline Rows rows_of(const Tensor& x, int64_t k) {
    expect(x.dim >= 1 && x.last() == k);
    return x.rows();
}

// y (..., N) for x (..., K)
inline Tensor output_of(const Tensor& x, int64_t n) {
    int64_t sizes[MOST_DIMENSIONS];
    expect(x.dim <= MOST_DIMENSIONS);
    std::copy(x.sizes, x.sizes + x.dim, sizes);
    sizes[x.dim - 1] = n;
    return empty(sizes, x.dim, x.dtype);
}

// (Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor over a weight (N, K) of
// `dtype` and a scale for each output.
inline void call_byte_linear(Arguments arguments, int32_t dtype, int64_t most_inputs = INT64_MAX) {
    const Tensor x = arguments.tensor(0), weight = arguments.tensor(1), scale = arguments.tensor(2);
    const Tensor bias = arguments.optional_tensor(3);
    const auto linear = kernel<void(const void*, int64_t, const void*, const void*, const void*,
                                    void*, int64_t, int64_t, int64_t, int)>(x.kind());
    expect(weight.dim == 2 && weight.dtype == dtype && is_weight(weight, x));
    const int64_t n = weight.sizes[0], k = weight.sizes[1];
    expect(k <= most_inputs && is_vector(scale, n, x) && (!bias.handle || is_vector(bias, n, x)));
    const Rows rows = rows_of(x, k);
    Tensor y = output_of(x, n);
    if (y.numel)
        linear(x.data, rows.step, weight.data, scale.data, bias.data, y.data, rows.count, n, k,
               threads());
    arguments.give(0, y);
}

// (Tensor x, Tensor packed, Tensor scale, int outputs, Tensor? bias=None) -> Tensor over
// int4_linear.quantize's packed (N / 16, K / 8, 16) and scale (N / 16, K / group, 16).
inline void call_int4_linear(Arguments arguments) {
    const Tensor x = arguments.tensor(0), packed = arguments.tensor(1), scale = arguments.tensor(2);
    const int64_t n = arguments.integer(3);
    const Tensor bias = arguments.optional_tensor(4);
    const auto linear = kernel<void(const void*, int64_t, const void*, const void*, const void*,
                                    void*, int64_t, int64_t, int64_t, int64_t, int)>(x.kind());
    expect(packed.dim == 3 && packed.sizes[2] == 16 && packed.dtype == aoti_torch_dtype_int32() &&
           is_weight(packed, x));
    const int64_t blocks = packed.sizes[0], k = packed.sizes[1] * 8;
    expect(scale.dim == 3 && scale.dtype == aoti_torch_dtype_bfloat16() && is_weight(scale, x));
    const int64_t group = scale.sizes[1] ? k / scale.sizes[1] : 32;
    expect((group == 32 || group == 128) && k % group == 0 &&
           scale.shaped({blocks, k / group, 16}));
    expect(std::max<int64_t>(0, 16 * blocks - 15) <= n && n <= 16 * blocks);
    expect(!bias.handle || is_vector(bias, n, x));
    const Rows rows = rows_of(x, k);
    Tensor y = output_of(x, n);
    if (y.numel)
        linear(x.data, rows.step, packed.data, scale.data, bias.data, y.data, rows.count, n, k,
               group, threads());
    arguments.give(0, y);
}
