// paged_attention(Tensor q, Tensor keys, Tensor values, Tensor block_table, Tensor lengths,
//                 float scale) -> Tensor
#include "attention_call.hpp"

const char* const OPERATOR = "paged_attention.cpu";
const char* const symbols[] = {"paged_attention_f32", "paged_attention_bf16", "paged_attention_f16",
                               nullptr};

void call(Arguments arguments) { call_cached(arguments, true); }
