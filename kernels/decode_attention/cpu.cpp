// Attention of a few tokens over a cache (B, Hkv, S, D), each row of it one page: see cache.h.
#include "cache.h"

CACHED_ENTRIES(decode_attention)
