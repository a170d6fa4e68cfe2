// int4_linear(Tensor x, Tensor packed, Tensor scale, int outputs, Tensor? bias=None) -> Tensor
#include "linear_call.hpp"

const char* const OPERATOR = "int4_linear.cpu";
const char* const symbols[] = {"int4_linear_f32", "int4_linear_bf16", "int4_linear_f16", nullptr};

void call(Arguments arguments) { call_int4_linear(arguments); }
