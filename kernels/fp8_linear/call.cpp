// fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor
#include "linear_call.hpp"

const char* const OPERATOR = "fp8_linear.cpu";
const char* const symbols[] = {"fp8_linear_emulated_f32", "fp8_linear_emulated_bf16",
                               "fp8_linear_emulated_f16", nullptr};

void call(Arguments arguments) { call_byte_linear(arguments, aoti_torch_dtype_float8_e4m3fn()); }
