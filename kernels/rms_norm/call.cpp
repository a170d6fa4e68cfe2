// rms_norm(Tensor x, Tensor weight, float eps) -> Tensor
#include "torch_call.hpp"

const char* const OPERATOR = "rms_norm.cpu";
const char* const symbols[] = {"rms_norm_f32", "rms_norm_bf16", "rms_norm_f16", nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0), weight = arguments.tensor(1);
    const float eps = arguments.number(2);
    const auto norm = kernel<void(const void*, int64_t, const void*, void*, int64_t, int64_t,
                                  float, int)>(x.kind());
    const Rows rows = x.rows();
    expect(weight.spans(x));
    Tensor y = empty_like(x);
    if (x.numel)
        norm(x.data, rows.step, weight.data, y.data, rows.count, rows.n, eps, threads());
    arguments.give(0, y);
}
