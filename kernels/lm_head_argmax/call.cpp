// lm_head_argmax(Tensor x, Tensor weight) -> (Tensor top, Tensor token)
#include "linear_call.hpp"

const char* const OPERATOR = "lm_head_argmax.cpu";
const char* const symbols[] = {"lm_head_argmax_f32", "lm_head_argmax_bf16", "lm_head_argmax_f16",
                               nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0), weight = arguments.tensor(1);
    const auto argmax = kernel<void(const void*, int64_t, const void*, void*, void*, int64_t,
                                    int64_t, int64_t, int)>(x.kind());
    expect(weight.dim == 2 && weight.sizes[0] > 0 && weight.like(x) && is_weight(weight, x));
    const int64_t vocab = weight.sizes[0], k = weight.sizes[1];
    const Rows rows = rows_of(x, k);
    Tensor top = empty(x.sizes, x.dim - 1, aoti_torch_dtype_float32());
    Tensor token = empty(x.sizes, x.dim - 1, aoti_torch_dtype_int64());
    if (top.numel)
        argmax(x.data, rows.step, weight.data, top.data, token.data, rows.count, vocab, k,
               threads());
    arguments.give(0, top);
    arguments.give(1, token);
}
