// Weights of four bits (int4.h says how they are stored) as tensor cores take them.  A warp has 32
// outputs and steps of 32 inputs: a lane's 16 bytes hold eight inputs of four outputs, which become
// its share of four products of 8 outputs each.  No weight moves between lanes: which outputs are a
// product's columns, and in which order inputs meet, is free as long as x and y follow.
#pragma once
#include "mma.cuh"

// Inputs 8 (lane % 4) to + 7 of outputs 4 (lane / 4) to + 3: column lane / 4 of the four products.
using Words = Pack<unsigned>;
// Of outputs `output` on, past the last ones those of some others, and the eight inputs from k on.
__device__ inline const unsigned* words_of(const unsigned* packed, int output, int k, int K, int N) {
    const int block = min(output / 16, (N - 1) / 16);
    return packed + (int64(block) * (K / 8) + k / 8) * 16 + output % 16;
}

// A lane holds the sums of columns 2 (lane % 4) and the next: of outputs 8 (lane % 4) to + 7.  These
// are their scales of group g.
using Scales = Pack<bf16>;
__device__ inline const bf16* scales_of(const bf16* scale, int output, int g, int groups, int N) {
    const int block = min(output / 16, (N - 1) / 16);
    return scale + (int64(block) * groups + g) * 16 + output % 16;
}
// Where in them sum i of product n stands, and which of the warp's outputs it is.
__device__ inline int scale_at(int n, int i) { return i % 2 * 4 + n; }
__device__ inline int output_of(int n, int i) { return threadIdx.x % 4 * 8 + scale_at(n, i); }

// Where in shared memory the words of an octet's outputs 4 quad to + 3 lie: eight lanes side by side,
// which read four octets of eight outputs, find them in banks of their own.
__device__ inline int place(int octet, int quad) { return quad ^ octet / 2 % 2 * 2; }
