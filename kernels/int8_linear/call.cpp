// int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor
#include "linear_call.hpp"

const char* const OPERATOR = "int8_linear.cpu";
const char* const symbols[] = {"int8_linear_f32", "int8_linear_bf16", "int8_linear_f16", nullptr};

void call(Arguments arguments) { call_byte_linear(arguments, aoti_torch_dtype_int8()); }
