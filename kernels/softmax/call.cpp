// softmax(Tensor x) -> Tensor
#include "torch_call.hpp"

const char* const OPERATOR = "softmax.cpu";
const char* const symbols[] = {"softmax_f32", "softmax_bf16", "softmax_f16", nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0);
    const auto softmax = kernel<void(const void*, int64_t, void*, int64_t, int64_t, int)>(x.kind());
    const Rows rows = x.rows();
    Tensor y = empty_like(x);
    if (x.numel) softmax(x.data, rows.step, y.data, rows.count, rows.n, threads());
    arguments.give(0, y);
}
