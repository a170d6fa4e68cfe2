// Attention of a few tokens over pages (blocks, Hkv, page, D) that a table finds: see cache.h.
#include "cache.h"

CACHED_ENTRIES(paged_attention)
