// swiglu(Tensor gate, Tensor up) -> Tensor
#include "torch_call.hpp"

const char* const OPERATOR = "swiglu.cpu";
const char* const symbols[] = {"swiglu_f32", "swiglu_bf16", "swiglu_f16", nullptr};

void call(Arguments arguments) {
    const Tensor gate = arguments.tensor(0), up = arguments.tensor(1);
    const auto swiglu = kernel<void(const void*, int64_t, const void*, int64_t, void*, int64_t,
                                    int64_t, int)>(gate.kind());
    const Rows rows = gate.rows();
    expect(up.same_shape(gate) && up.like(gate));
    const int64_t up_step = up.rows().step;
    Tensor y = empty_like(gate);
    if (gate.numel)
        swiglu(gate.data, rows.step, up.data, up_step, y.data, rows.count, rows.n, threads());
    arguments.give(0, y);
}
