// Attention of a few tokens over a cache (B, Hkv, S, D): see cache.cuh.
#include "cache.cuh"

#define ENTRY(T, name)                                                                           \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    decode_attention_split_64_##name(SPLIT_ARGUMENTS(T)) { SPLIT(T, 64); }                          \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    decode_attention_split_128_##name(SPLIT_ARGUMENTS(T)) { SPLIT(T, 128); }                        \
    extern "C" __global__ void __launch_bounds__(128)                                            \
    decode_attention_merge_##name(MERGE_ARGUMENTS(T)) { MERGE(T); }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
