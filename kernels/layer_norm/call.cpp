// layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor
#include "torch_call.hpp"

const char* const OPERATOR = "layer_norm.cpu";
const char* const symbols[] = {"layer_norm_f32", "layer_norm_bf16", "layer_norm_f16",
                                          nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0), weight = arguments.tensor(1), bias = arguments.tensor(2);
    const float eps = arguments.number(3);
    const auto norm = kernel<void(const void*, int64_t, const void*, const void*, void*, int64_t,
                                  int64_t, float, int)>(x.kind());
    const Rows rows = x.rows();
    expect(weight.spans(x) && bias.spans(x));
    Tensor y = empty_like(x);
    if (x.numel)
        norm(x.data, rows.step, weight.data, bias.data, y.data, rows.count, rows.n, eps, threads());
    arguments.give(0, y);
}
