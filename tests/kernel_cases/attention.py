"""Attention: of a prompt, of a few tokens over a cache, of a few tokens over pages."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.kernel_cases import Case, Rival, Speed, bad, random

FULL, CAUSAL = 1, 2
# batch, heads, kv heads, queries, keys, head_dim, mask: grouped and longer keys; one of each;
# several blocks of both, one key over; head 128; odd head; no query, no key, no row;
# two blocks of 128 queries, four of keys
PREFILL = [(3, 4, 2, 5, 7, 16, CAUSAL), (1, 1, 1, 1, 1, 1, CAUSAL), (1, 2, 1, 129, 641, 64, CAUSAL),
           (1, 3, 3, 70, 131, 128, FULL), (2, 2, 1, 33, 40, 37, FULL), (2, 2, 1, 0, 3, 8, CAUSAL),
           (1, 2, 1, 3, 0, 8, FULL), (0, 2, 1, 3, 3, 8, CAUSAL),
           (1, 2, 1, 130, 400, 100, CAUSAL)]  # fmt: skip


def _flash_attention(shape, dtype):
    B, H, Hkv, T, S, D, mask = shape
    q = random(B, H, T, D, dtype=dtype)
    k, v = (random(B, Hkv, S, D, seed=i, dtype=dtype) for i in (1, 2))
    return [q, k, v, mask == CAUSAL, D**-0.5]


# batch, heads, kv heads, queries, slots, head_dim: grouped; one of each; several chunks; head 128,
# a draft of 5; most queries, odd head; one slot; no slot, no row
CACHED = [(3, 4, 2, 2, 9, 16), (1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1100, 64), (2, 6, 2, 5, 70, 128),
          (1, 3, 3, 16, 33, 37), (3, 2, 2, 1, 1, 8), (2, 2, 1, 1, 0, 8),
          (0, 2, 1, 1, 4, 8)]  # fmt: skip
PAGE = 4


def _lengths(batch, slots):
    """From a few (for the tokens themselves no room, when there are several) to all slots."""
    return torch.tensor([slots - (batch - 1 - b) * slots // batch for b in range(batch)],
                        dtype=torch.int64)  # fmt: skip


def _decode_attention(shape, dtype):
    B, H, Hkv, T, S, D = shape
    q = random(B, H, T, D, dtype=dtype)
    keys, values = (random(B, Hkv, S, D, seed=i, dtype=dtype) for i in (1, 2))
    return [q, keys, values, _lengths(B, S), D**-0.5]


def _paged_attention(shape, dtype, page=PAGE):
    B, H, Hkv, T, S, D = shape
    most = -(-S // page)
    # backwards; page 0 is nobody's
    table = torch.arange(1, B * most + 1, dtype=torch.int32).flip(0).view(B, most)
    pages = (B * most + 1, Hkv, page, D)
    lengths = _lengths(B, S)
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // page) :] = -7  # never read
    keys, values = (random(*pages, seed=i, dtype=dtype) for i in (1, 2))
    return [random(B, H, T, D, dtype=dtype), keys, values, table, lengths, D**-0.5]


CASES = [
    Case(
        "flash_attention",
        _flash_attention,
        PREFILL,
        large=(2, 4, 2, 130, 140, 24, CAUSAL),
        row_args=(0, 1, 2),
        shim_shapes=((1, 2, 1, 5, 37, 16, CAUSAL), (1, 1, 1, 3, 4, 70, FULL)),
        mma={"sm_80": "HMMA", "sm_90a": "HGMMA"},
        mma_kernels="-(bf16|fp16)$",
        cuda_mma="HMMA",
        cuda_mma_kernels="_(bf16|f16)$",
        on_hopper={"_(bf16|f16)": "HGMMA"},
        hopper_shapes=(*PREFILL[2:5], (1, 2, 1, 130, 400, 100, CAUSAL)),
    ),
    Case(
        "decode_attention",
        _decode_attention,
        CACHED,
        large=(2, 4, 2, 2, 1300, 24),
        row_args=(0, 1, 2),
        row_numbers=(3,),
        shim_shapes=((2, 4, 2, 2, 9, 16), (1, 2, 1, 1, 300, 8)),
    ),
    Case(
        "paged_attention",
        _paged_attention,
        CACHED,
        large=(2, 4, 2, 2, 1300, 24),
        row_args=(0,),
        row_numbers=(3, 4),
        shim_shapes=((2, 4, 2, 2, 12, 16), (1, 2, 1, 1, 300, 8)),
    ),
]

# prompts of a Llama of 8 billion (32 heads of 128 over 8), of 1 billion (32 of 64), no mask
PROMPTS = ((1, 32, 8, 512, 512, 128, CAUSAL), (1, 32, 8, 2048, 2048, 128, CAUSAL),
           (1, 32, 8, 1024, 1024, 64, CAUSAL), (8, 12, 12, 512, 512, 64, FULL))  # fmt: skip


def _sdpa(q, k, v, causal, scale):
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)


def _flash_bytes(shape, itemsize):
    from kernels import flash_attention

    return flash_attention.bytes_moved(*shape[:6], itemsize)


def _flash_flops(shape):
    from kernels import flash_attention

    batch, heads, _, queries, keys, dim, mask = shape
    return flash_attention.flops(batch, heads, queries, keys, dim, mask == CAUSAL)


# a step at 8k tokens of context: Llama of 8 billion; of 1 billion, 4 rows of 2k to 8k; a draft
STEPS = ((1, 32, 8, 1, 8192, 128), (4, 32, 8, 1, 8192, 64), (1, 32, 8, 5, 8192, 128))


def _seen(q, slots, lengths):
    """What a mask must say for SDPA to compute the same: (B, 1, T, S)."""
    last = lengths[:, None] - q.shape[2] + torch.arange(q.shape[2], device=q.device) + 1
    return torch.arange(slots, device=q.device) < last[:, None, :, None]


def _masked(q, keys, values, lengths, scale):
    return q, keys, values, _seen(q, keys.shape[2], lengths), scale


def _masked_sdpa(q, keys, values, mask, scale):
    return scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=True)


def _with_mask_of_pages(q, keys, values, table, lengths, scale):
    slots = table.shape[1] * keys.shape[2]
    return q, keys, values, table.clamp(min=0), _seen(q, slots, lengths), scale


def _gathered_sdpa(q, keys, values, table, mask, scale):
    rows = [t[table].transpose(1, 2).flatten(2, 3) for t in (keys, values)]  # (B, Hkv, S, D)
    return _masked_sdpa(q, *rows, mask, scale)


def _cached_bytes(shape, itemsize):
    from kernels import decode_attention

    B, H, Hkv, T, S, D = shape
    return decode_attention.bytes_moved(_lengths(B, S).tolist(), H, Hkv, T, D, itemsize)


def _cached_flops(shape):
    B, H, _, T, S, D = shape
    return 4 * _lengths(B, S).sum().item() * H * T * D


SPEEDS = [
    Speed("flash_attention", _flash_attention, PROMPTS, core=1, eager=Rival(_sdpa),
          moved=_flash_bytes, arithmetic=_flash_flops, rows=lambda *shape: shape[0] * shape[3]),
    Speed("decode_attention", _decode_attention, STEPS, core=1,
          eager=Rival(_masked_sdpa, _masked), moved=_cached_bytes, arithmetic=_cached_flops),
    Speed("paged_attention", lambda shape, dtype: _paged_attention(shape, dtype, page=16), STEPS,
          core=1, eager=Rival(_gathered_sdpa, _with_mask_of_pages), moved=_cached_bytes,
          arithmetic=_cached_flops),
]  # fmt: skip

r = random
BAD = [
    bad("flash_attention", "dtype", "not torch.float64; convert it",
        lambda: (*(r(1, 2, 3, 4).double() for _ in "qkv"), True, 1.0)),
    bad("flash_attention", "rank", r"needs q \(B, H, T, D\) and k \(B, Hkv, S, D\), not \(2, 4\)",
        lambda: (r(2, 4), r(2, 4), r(2, 4), True, 1.0)),
    bad("flash_attention", "head_dim", r"needs k \(1, Hkv, S, 4\), not \(1, 2, 3, 5\)",
        lambda: (r(1, 2, 3, 4), r(1, 2, 3, 5), r(1, 2, 3, 5), True, 1.0)),
    bad("flash_attention", "values", "needs v shaped like k",
        lambda: (r(1, 2, 3, 4), r(1, 2, 3, 4), r(1, 2, 4, 4), True, 1.0)),
    bad("flash_attention", "heads", "heads that the kv heads divide, not 3 and 2",
        lambda: (r(1, 3, 3, 4), r(1, 2, 3, 4), r(1, 2, 3, 4), True, 1.0)),
    bad("flash_attention", "few-keys", "4 queries need at least as many keys, not 3",
        lambda: (r(1, 2, 4, 4), r(1, 2, 3, 4), r(1, 2, 3, 4), True, 1.0)),
    bad("flash_attention", "wide", "a head_dim of 1 to 256, not 300",
        lambda: (*(r(1, 1, 2, 300) for _ in "qkv"), True, 1.0)),
    bad("flash_attention", "scale", "needs a positive finite scale, not -1.0",
        lambda: (*(r(1, 2, 3, 4) for _ in "qkv"), True, -1.0)),
    bad("flash_attention", "mixed", "needs v and q alike",
        lambda: (r(1, 2, 3, 4), r(1, 2, 3, 4), r(1, 2, 3, 4).half(), True, 1.0)),
    bad("flash_attention", "transposed", "stride 1, not 3; call .contiguous",
        lambda: (r(1, 2, 3, 4), r(1, 2, 4, 3).transpose(2, 3), r(1, 2, 3, 4), True, 1.0)),
    bad("decode_attention", "prompt", "takes 1 to 16 tokens of a row, not 17; a prompt is for",
        lambda: (r(1, 2, 17, 4), r(1, 2, 20, 4), r(1, 2, 20, 4), torch.tensor([20]), 1.0)),
    bad("decode_attention", "lengths", r"contiguous int64 lengths of shape \(1,\), not torch.int32",
        lambda: (r(1, 2, 1, 4), r(1, 2, 5, 4), r(1, 2, 5, 4), torch.tensor([5]).int(), 1.0)),
    bad("decode_attention", "rows", "of 2 rows needs a cache of as many, not 1",
        lambda: (r(2, 2, 1, 4), r(1, 2, 5, 4), r(1, 2, 5, 4), torch.tensor([5, 5]), 1.0)),
    bad("decode_attention", "long", "got length 6 in row 1; its cache has room for 0 to 5",
        lambda: (r(2, 2, 1, 4), r(2, 2, 5, 4), r(2, 2, 5, 4), torch.tensor([5, 6]), 1.0)),
    bad("decode_attention", "negative", "got length -1 in row 0; its cache has room for 0 to 5",
        lambda: (r(1, 2, 1, 4), r(1, 2, 5, 4), r(1, 2, 5, 4), torch.tensor([-1]), 1.0)),
    bad("decode_attention", "values", "needs values shaped like keys",
        lambda: (r(1, 2, 1, 4), r(1, 2, 5, 4), r(1, 2, 6, 4), torch.tensor([5]), 1.0)),
    bad("decode_attention", "mixed", "needs keys and q alike",
        lambda: (r(1, 2, 1, 4), r(1, 2, 5, 4).half(), r(1, 2, 5, 4), torch.tensor([5]), 1.0)),
    bad("paged_attention", "table", r"contiguous int32 block_table \(1, M\), not torch.int64",
        lambda: (r(1, 2, 1, 4), r(3, 2, 4, 4), r(3, 2, 4, 4), torch.tensor([[0, 1]]),
                 torch.tensor([5]), 1.0)),
    bad("paged_attention", "page", "got page 3 at place 1 of row 0; there are pages 0 to 2",
        lambda: (r(1, 2, 1, 4), r(3, 2, 4, 4), r(3, 2, 4, 4), torch.tensor([[0, 3]]).int(),
                 torch.tensor([5]), 1.0)),
    bad("paged_attention", "negative-page", "got page -1 at place 0 of row 1; there are pages 0",
        lambda: (r(2, 2, 1, 4), r(3, 2, 4, 4), r(3, 2, 4, 4), torch.tensor([[0], [-1]]).int(),
                 torch.tensor([4, 1]), 1.0)),
    bad("paged_attention", "long", "got length 9 in row 0; its cache has room for 0 to 8",
        lambda: (r(1, 2, 1, 4), r(3, 2, 4, 4), r(3, 2, 4, 4), torch.tensor([[0, 1]]).int(),
                 torch.tensor([9]), 1.0)),
]  # fmt: skip
