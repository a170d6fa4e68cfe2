"""Attention of a prompt: softmax(q k^T * scale) v without ever holding the scores.

Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135 (blocks, recomputed maxima); the online
softmax is of Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867
"""

from __future__ import annotations

import ctypes
import math

import torch

from kernels import build
from kernels.build import FLOAT, INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect

from . import reference

NAME = "flash_attention"
MOST_DIM = 256


def _check(q, k, v, causal, scale):
    expect(q.dtype in SUFFIX, f"flash_attention takes q in float32, bfloat16 or float16, not "
           f"{q.dtype}; convert it")  # fmt: skip
    expect(q.dim() == 4 and k.dim() == 4, "flash_attention needs q (B, H, T, D) and k (B, Hkv, S, "
           f"D), not {tuple(q.shape)} and {tuple(k.shape)}")  # fmt: skip
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    expect(k.shape[0] == B and k.shape[3] == D, f"flash_attention of q {tuple(q.shape)} needs k "
           f"({B}, Hkv, S, {D}), not {tuple(k.shape)}")  # fmt: skip
    expect(v.shape == k.shape, f"flash_attention needs v shaped like k {tuple(k.shape)}, not "
           f"{tuple(v.shape)}")  # fmt: skip
    expect(1 <= D <= MOST_DIM, f"flash_attention takes a head_dim of 1 to {MOST_DIM}, not {D}")
    expect(Hkv > 0 and H % Hkv == 0, f"flash_attention needs a number of heads that the kv heads "
           f"divide, not {H} and {Hkv}")  # fmt: skip
    expect(not causal or T <= S, f"causal flash_attention is aligned to the end: {T} queries need "
           f"at least as many keys, not {S}")  # fmt: skip
    expect(scale > 0 and math.isfinite(scale), "flash_attention needs a positive finite scale, "
           f"not {scale}")  # fmt: skip
    for name, t in (("k", k), ("v", v)):
        expect(t.dtype == q.dtype and t.device == q.device, f"flash_attention needs {name} and q "
               f"alike, not {t.dtype} on {t.device} and {q.dtype} on {q.device}")  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        expect(t.stride(3) == 1 or D == 1, f"flash_attention needs a last dimension of {name} of "
               f"stride 1, not {t.stride(3)}; call .contiguous() on it")  # fmt: skip


def _fake(q, k, v, causal, scale):
    B, H, T, D = q.shape
    return torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def strides(*tensors: torch.Tensor) -> list[int]:
    """Elements from one (batch, head, token) to the next, of each tensor in turn."""
    return [s for t in tensors for s in t.stride()[:3]]


_ARGTYPES = (*[POINTER] * 4, LONG * 6, LONG * 12, INT, FLOAT, INT)


def into_cpu(y, q, k, v, causal, scale) -> None:
    """Write y (B, H, T, D), of any strides but the last."""
    function = build.cpu_function(NAME, "flash_attention_" + SUFFIX[q.dtype], _ARGTYPES)
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    function(q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), (LONG * 6)(B, H, Hkv, T, S, D),
             (LONG * 12)(*strides(q, k, v, y)), causal, scale, torch.get_num_threads())  # fmt: skip


def into_cuda(y, q, k, v, causal, scale) -> None:
    """Write y (B, H, T, D): a block of 128 threads per 64 queries (32 in fp32), on Hopper 384 per
    128."""
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    expect(D <= 128, f"impl='cuda' takes a head_dim of up to 128, not {D}; take impl='triton'")
    symbol = f"flash_attention_{64 if D <= 64 else 128}_{SUFFIX[q.dtype]}"
    device = q.device.index or 0
    kernel = build.cuda_kernel(NAME, symbol, device)
    wgmma = q.dtype != torch.float32 and build.has_wgmma(device)
    rows = 32 if q.dtype == torch.float32 else 128 if wgmma else 64
    packs = all(n * q.element_size() % 16 == 0 for n in (*strides(q, k, v), D))
    packs = packs and all(t.data_ptr() % 16 == 0 for t in (q, k, v))
    build.launch(kernel, (-(-T // rows), H, B), 384 if wgmma else 128, q, k, v, y,
                 *map(ctypes.c_int64, strides(q, k, v, y)), ctypes.c_int(H // Hkv),
                 ctypes.c_int(T), ctypes.c_int(S), ctypes.c_int(D), ctypes.c_int(causal),
                 ctypes.c_int(packs), ctypes.c_float(scale),
                 shared=_hopper_shared(64 if D <= 64 else 128) if wgmma else 0)  # fmt: skip


def _hopper_shared(dim: int) -> int:
    """Bytes: a tile of 128 queries, five of keys or values, barriers, up to where tiles start."""
    return (1 + 5) * 128 * 2 * dim + 128 + 1024


def _allocating(into):
    def implementation(q, k, v, causal, scale):
        y = _fake(q, k, v, causal, scale)
        if not k.shape[2]:  # nothing to look at
            y.zero_()
        elif y.numel():
            into(y, q, k, v, causal, scale)
        return y

    return implementation


def _reference(y, *args) -> None:
    y.copy_(reference.flash_attention(*args))


def _flops(q_shape, k_shape, _v_shape, causal, _scale, out_shape=None, **__) -> int:
    return flops(*q_shape[:3], k_shape[2], q_shape[3], causal)


_OP = Op(NAME, "(Tensor q, Tensor k, Tensor v, bool causal, float scale) -> Tensor", check=_check,
         fake=_fake, reference=_allocating(_reference), cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda), flops=_flops)  # fmt: skip


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True,
                    scale: float | None = None, *,
                    impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """softmax(q k^T * scale, over the keys) v, in fp32 sums, rounded once; memory is O(T).

    q       (B, H, T, D) fp32, bf16 or fp16; the last dimension dense, other strides free
    k, v    (B, Hkv, S, D) alike; Hkv divides H: head h looks at kv head h // (H / Hkv)
    causal  query t sees keys 0 .. S - T + t: the queries are the last T of S tokens, T <= S
    scale   positive; None is 1 / sqrt(D)
    Returns (B, H, T, D), laid out as (B, T, H, D), which the projection after it reads as rows.
    In bf16 and fp16 the weights are rounded to that precision before they meet v where the
    processor multiplies it.  Raises ``KernelError`` for anything else.
    Helps for prompts: scores of T x S numbers are neither written nor read.  Does not for one
    token, whose time is that of reading the keys: see ``decode_attention``.
    Measured against torch 2.13's SDPA, one thread of an AMD EPYC (Zen 4) at 3.6 GHz, its own CPU
    time, interleaved, 12 heads of 64, causal: 1024 tokens 1.77x in fp32 and 3.52x in bf16, 2048
    tokens 1.59x and 3.16x, 4096 tokens 1.50x and 3.00x; without a mask 1.2 to 1.3x and 2.5 to 2.7x.
    Of the 117 and 234 GFLOP/s that the thread's units could do, up to 0.83 and 0.76.
    Without AVX-512 (Zen 3, as above), 32 heads of 128 over 8, 512 tokens, causal: 2.2x and 2.7x;
    12 heads of 64, 1024 tokens, without a mask: 1.2x and 1.4x; bf16 is computed in fp32 there.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _OP(q, k, v, causal, scale, impl=impl)


def flops(batch: int, heads: int, queries: int, keys: int, dim: int, causal: bool) -> int:
    """Two per multiply-add of both products, over the pairs of a query and a key that it sees."""
    pairs = queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    return 4 * batch * heads * pairs * dim


def bytes_moved(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int,
                itemsize: int) -> int:  # fmt: skip
    """q, k and v read once, y written once."""
    return 2 * batch * (heads * queries + kv_heads * keys) * dim * itemsize
