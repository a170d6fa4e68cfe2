// Rows of activations, each in the form in which it is multiplied: as whole numbers where these
// hold it well, as floats elsewhere.  That is each row's own matter, so that a row of a batch has
// the bits of one alone.
#pragma once
#include <memory>
#include <vector>
#include "rows.h"

struct Arranged {
    std::vector<int64_t> by_digits, by_floats;  // the rows of x, in the order in which they stand in
    uint8_t* digits;                            // (, stride) and
    float* wide;                                // (, wide_stride), from the start of a cache line
    std::unique_ptr<uint8_t[]> memory;
};

// split(row, to) makes bytes of K floats, or says that they are not to be; stride 0: none are.
template <class T, class Split>
inline Arranged arrange(const T* x, int64_t x_stride, int64_t M, int64_t K, int64_t wide_stride,
                        int64_t stride, Split split) {
    Arranged rows;
    const int64_t floats = M * wide_stride * int64_t(sizeof(float));
    rows.memory.reset(new uint8_t[floats + M * stride + 64]);
    uint8_t* start = rows.memory.get();
    start += -reinterpret_cast<uintptr_t>(start) % 64;
    rows.wide = (float*)start;
    rows.digits = start + floats;
    for (int64_t m = 0; m < M; ++m) {
        const T* from = x + m * x_stride;
        float* row = rows.wide + rows.by_floats.size() * wide_stride;
        fill_row(row, K, false, [&](int64_t k) { return load(from + k); },
                 [&](int64_t k) { return to_float(from[k]); });
        if (stride && split(row, rows.digits + rows.by_digits.size() * stride))
            rows.by_digits.push_back(m);
        else
            rows.by_floats.push_back(m);
    }
    return rows;
}
