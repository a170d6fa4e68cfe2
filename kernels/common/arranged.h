// Rows of activations, each in the form in which it is multiplied: as whole numbers where these
// hold it well, as floats elsewhere.  That is each row's own matter, so that a row of a batch has
// the bits of one alone.
#pragma once
#include <memory>
#include <vector>
#include "rows.h"

struct Arranged {
    std::vector<int64_t> by_digits, by_floats;  // the rows of x, in the order in which they stand in
    std::unique_ptr<uint8_t[]> digits;          // (, stride) and
    std::unique_ptr<float[]> wide;              // (, wide_stride)
};

// split(row, to) makes bytes of K floats, or says that they are not to be; stride 0: none are.
template <class T, class Split>
inline Arranged arrange(const T* x, int64_t x_stride, int64_t M, int64_t K, int64_t wide_stride,
                        int64_t stride, Split split) {
    Arranged rows;
    rows.wide.reset(new float[M * wide_stride]);
    rows.digits.reset(new uint8_t[M * stride]);
    for (int64_t m = 0; m < M; ++m) {
        const T* from = x + m * x_stride;
        float* row = rows.wide.get() + rows.by_floats.size() * wide_stride;
        fill_row(row, K, false, [&](int64_t k) { return load(from + k); },
                 [&](int64_t k) { return to_float(from[k]); });
        if (stride && split(row, rows.digits.get() + rows.by_digits.size() * stride))
            rows.by_digits.push_back(m);
        else
            rows.by_floats.push_back(m);
    }
    return rows;
}
