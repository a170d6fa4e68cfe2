// rope(Tensor x, Tensor cos, Tensor sin) -> Tensor
#include "torch_call.hpp"

const char* const OPERATOR = "rope.cpu";
const char* const symbols[] = {"rope_f32", "rope_bf16", "rope_f16", nullptr};

void call(Arguments arguments) {
    const Tensor x = arguments.tensor(0), cos = arguments.tensor(1), sin = arguments.tensor(2);
    const auto rope = kernel<void(const void*, int64_t, const void*, const void*, void*, int64_t,
                                  int64_t, int64_t, int64_t, int)>(x.kind());
    expect(x.dim == 4 && x.sizes[3] % 2 == 0);
    const int64_t batch = x.sizes[0], length = x.sizes[1], heads = x.sizes[2], half = x.sizes[3] / 2;
    for (const Tensor* table : {&cos, &sin})
        expect(table->dim == 2 && table->sizes[0] == length && table->sizes[1] == half &&
               table->dtype == aoti_torch_dtype_float32() && table->contiguous() &&
               table->device == x.device);
    const int64_t step = x.rows().step;
    Tensor y = empty_like(x);
    if (x.numel)
        rope(x.data, step, cos.data, sin.data, y.data, batch * length, length, heads, half,
             threads());
    arguments.give(0, y);
}
