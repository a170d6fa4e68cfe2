// decode_attention(Tensor q, Tensor keys, Tensor values, Tensor lengths, float scale) -> Tensor
#include "attention_call.hpp"

const char* const OPERATOR = "decode_attention.cpu";
const char* const symbols[] = {"decode_attention_f32", "decode_attention_bf16",
                               "decode_attention_f16", nullptr};

void call(Arguments arguments) { call_cached(arguments, false); }
