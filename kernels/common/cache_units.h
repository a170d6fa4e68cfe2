// What is attended to at once in a cache: chunks of keys, their states, and what callers get wrong.
#pragma once
#include <atomic>
#include <memory>
#include "softmax.h"

struct Cached {
    int64_t batch, heads, kv_heads, queries, dim;
    int64_t blocks, page, max_blocks;       // pages there are; tokens in one; most in a row
    int64_t k[3], v[3], q[3], y[3];         // elements from one (page or row, head, token) to the next
};
constexpr int64_t CHUNK = 512;  // keys of a unit of work

// Keys [first, last) of batch row b and kv head h.
struct Unit {
    int64_t b, h, first, last;
};

// A query row's state over one chunk, and where it ends up: out (wide) before division by total.
struct Partial {
    float top, total;
};

// Refusals: 0 is fine, 1 a length out of range, 2 a page out of range; `where` gets row and place.
inline int refuse(const Cached& c, const int32_t* table, const int64_t* lengths, int64_t* where) {
    const int64_t room = c.page * c.max_blocks;
    for (int64_t b = 0; b < c.batch; ++b) {
        where[0] = b;
        if (lengths[b] < 0 || lengths[b] > room) return 1;
        for (int64_t i = 0; table && i * c.page < lengths[b]; ++i) {
            where[1] = i;
            const int32_t page = table[b * c.max_blocks + i];
            if (page < 0 || page >= c.blocks) return 2;
        }
    }
    return 0;
}
