// flash_attention(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> Tensor
#include "attention_call.hpp"

const char* const OPERATOR = "flash_attention.cpu";
const char* const symbols[] = {"flash_attention_f32", "flash_attention_bf16", "flash_attention_f16",
                               nullptr};

void call(Arguments arguments) {
    const Tensor q = arguments.tensor(0), k = arguments.tensor(1), v = arguments.tensor(2);
    const bool causal = arguments.flag(3);
    const double scale = arguments.number(4);
    const auto attend = kernel<void(const void*, const void*, const void*, void*, const int64_t*,
                                    const int64_t*, int, float, int)>(q.kind());
    expect_attention(q, k, v, scale);
    const int64_t queries = q.sizes[2], keys = k.sizes[2];
    expect(k.sizes[0] == q.sizes[0] && (!causal || queries <= keys));
    Tensor y = output_of(q);
    if (y.numel && !keys)  // nothing to look at
        std::memset(y.data, 0, size_t(y.numel) * (q.kind() ? 2 : 4));
    else if (y.numel) {
        const int64_t shape[] = {q.sizes[0], q.sizes[1], k.sizes[1], queries, keys, q.sizes[3]};
        int64_t strides[12];
        put_strides({&q, &k, &v, &y}, strides);
        attend(q.data, k.data, v.data, y.data, shape, strides, causal, float(scale), threads());
    }
    arguments.give(0, y);
}
