// gelu_bias(Tensor x, Tensor bias, str approximate) -> Tensor
#include "torch_call.hpp"

const char* const OPERATOR = "gelu_bias.cpu";
const char* const symbols[] = {"gelu_bias_f32", "gelu_bias_bf16", "gelu_bias_f16",
                               "gelu_bias_tanh_f32", "gelu_bias_tanh_bf16", "gelu_bias_tanh_f16",
                               nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0), bias = arguments.tensor(1);
    const std::string approximate = arguments.text(2);
    const bool tanh = approximate == "tanh";
    expect(tanh || approximate == "none");
    const auto gelu = kernel<void(const void*, int64_t, const void*, void*, int64_t, int64_t,
                                  int)>(x.kind() + 3 * tanh);
    const Rows rows = x.rows();
    expect(bias.spans(x));
    Tensor y = empty_like(x);
    if (x.numel) gelu(x.data, rows.step, bias.data, y.data, rows.count, rows.n, threads());
    arguments.give(0, y);
}
