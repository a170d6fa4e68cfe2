// add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor total)
#include "torch_call.hpp"

const char* const OPERATOR = "add_rms_norm.cpu";
const char* const symbols[] = {"add_rms_norm_f32", "add_rms_norm_bf16",
                                          "add_rms_norm_f16", nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0), residual = arguments.tensor(1);
    const Tensor weight = arguments.tensor(2);
    const float eps = arguments.number(3);
    const auto norm = kernel<void(const void*, int64_t, const void*, int64_t, const void*, void*,
                                  void*, int64_t, int64_t, float, int)>(x.kind());
    const Rows rows = x.rows();
    expect(residual.same_shape(x) && residual.like(x) && weight.spans(x));
    const int64_t residual_step = residual.rows().step;
    Tensor y = empty_like(x), total = empty_like(x);
    if (x.numel)
        norm(x.data, rows.step, residual.data, residual_step, weight.data, y.data, total.data,
             rows.count, rows.n, eps, threads());
    arguments.give(0, y);
    arguments.give(1, total);
}
