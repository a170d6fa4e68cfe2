"""Attention: of a prompt, of a few tokens over a cache, of a few tokens over pages."""

from torch.nn.functional import scaled_dot_product_attention

from tests.kernel_cases import Case, Rival, Speed, bad, random

FULL, CAUSAL = 1, 2
# batch, heads, kv heads, queries, keys, head_dim, mask: grouped and longer keys; one of each;
# several blocks of both, one key over; head 128; odd head; no query, no key, no row
PREFILL = [(3, 4, 2, 5, 7, 16, CAUSAL), (1, 1, 1, 1, 1, 1, CAUSAL), (1, 2, 1, 129, 257, 64, CAUSAL),
           (1, 3, 3, 70, 131, 128, FULL), (2, 2, 1, 33, 40, 37, FULL), (2, 2, 1, 0, 3, 8, CAUSAL),
           (1, 2, 1, 3, 0, 8, FULL), (0, 2, 1, 3, 3, 8, CAUSAL)]  # fmt: skip


def _flash_attention(shape, dtype):
    B, H, Hkv, T, S, D, mask = shape
    q = random(B, H, T, D, dtype=dtype)
    k, v = (random(B, Hkv, S, D, seed=i, dtype=dtype) for i in (1, 2))
    return [q, k, v, mask == CAUSAL, D**-0.5]


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


SPEEDS = [
    Speed("flash_attention", _flash_attention, PROMPTS, core=1, eager=Rival(_sdpa),
          moved=_flash_bytes, arithmetic=_flash_flops, rows=lambda *shape: shape[0] * shape[3]),
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
]  # fmt: skip
