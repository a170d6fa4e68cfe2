// What attention's calls by torch's dispatcher share: see kernels/flash_attention and
// kernels/decode_attention, which say the same in Python.
#pragma once
#include <cmath>
#include "torch_call.hpp"

// Queries, keys and values: alike, a number of heads that the kv heads divide, dense at the end.
inline void expect_attention(const Tensor& q, const Tensor& keys, const Tensor& values,
                             double scale) {
    expect(q.dim == 4 && keys.dim == 4 && q.sizes[3] == keys.sizes[3] && values.same_shape(keys));
    const int64_t heads = q.sizes[1], kv_heads = keys.sizes[1], dim = q.sizes[3];
    expect(1 <= dim && dim <= 256 && kv_heads > 0 && heads % kv_heads == 0);
    expect(scale > 0 && std::isfinite(scale));
    expect(keys.like(q) && values.like(q));
    expect(q.last_is_dense() && keys.last_is_dense() && values.last_is_dense());
}

// y (B, H, T, D), laid out as (B, T, H, D)
inline Tensor output_of(const Tensor& q) {
    const int64_t heads = std::max<int64_t>(1, q.sizes[1]), dim = q.sizes[3];
    const int64_t row = std::max<int64_t>(1, q.sizes[2]) * heads * dim;
    const int64_t strides[] = {row, dim, heads * dim, 1};
    AtenTensorHandle made;
    torch_did(aoti_torch_empty_strided(4, q.sizes, strides, q.dtype, q.device, 0, &made));
    return Tensor(made);
}

// Elements from one (batch, head, token) to the next, of each tensor in turn.
inline void put_strides(std::initializer_list<const Tensor*> tensors, int64_t* to) {
    for (const Tensor* t : tensors) to = std::copy(t->strides, t->strides + 3, to);
}

// The C function found a length or a page out of range; `place` is the page's.
[[noreturn]] inline void refuse_length(int64_t length, int64_t row, int64_t room) {
    refuse("got length " + std::to_string(length) + " in row " + std::to_string(row) +
           "; its cache has room for 0 to " + std::to_string(room));
}
[[noreturn]] inline void refuse_page(int32_t page, int64_t place, int64_t row, int64_t pages) {
    refuse("got page " + std::to_string(page) + " at place " + std::to_string(place) + " of row " +
           std::to_string(row) + "; there are pages 0 to " + std::to_string(pages - 1));
}

// (Tensor q, Tensor keys, Tensor values, [Tensor block_table,] Tensor lengths, float scale)
inline void call_cached(Arguments arguments, bool paged) {
    const Tensor q = arguments.tensor(0), keys = arguments.tensor(1), values = arguments.tensor(2);
    const Tensor table = paged ? arguments.tensor(3) : Tensor();
    const Tensor lengths = arguments.tensor(3 + paged);
    const double scale = arguments.number(4 + paged);
    const auto attend = kernel<int(const void*, const void*, const void*, const int32_t*,
                                   const int64_t*, void*, const int64_t*, int64_t*, float, int)>(
        q.kind());
    expect_attention(q, keys, values, scale);
    const int64_t batch = q.sizes[0], tokens = q.sizes[2], pages = keys.sizes[0];
    const int64_t page = keys.sizes[2];
    expect(1 <= tokens && tokens <= 16);
    expect(lengths.shaped({batch}) && lengths.dtype == aoti_torch_dtype_int64() &&
           lengths.contiguous() && lengths.device == q.device);
    if (paged)
        expect(page > 0 && table.dim == 2 && table.sizes[0] == batch &&
               table.dtype == aoti_torch_dtype_int32() && table.contiguous() &&
               table.device == q.device);
    else
        expect(pages == batch);
    const int64_t most = paged ? table.sizes[1] : 1;
    const auto* const places = static_cast<const int32_t*>(table.data);
    const auto* const length = static_cast<const int64_t*>(lengths.data);
    Tensor y = output_of(q);
    if (y.numel) {
        int64_t where[2], shape[20] = {batch, q.sizes[1], keys.sizes[1], tokens, q.sizes[3],
                                       pages, page, most};
        put_strides({&keys, &values, &q, &y}, shape + 8);
        const int refused = attend(q.data, keys.data, values.data, places, length, y.data, shape,
                                   where, float(scale), threads());
        const auto [row, place] = where;
        if (refused == 1) refuse_length(length[row], row, page * most);
        if (refused) refuse_page(places[row * most + place], place, row, pages);
    }
    arguments.give(0, y);
}
