"""Attention of a few tokens over a preallocated cache, split over the keys.

Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
"""

from __future__ import annotations

import ctypes
import math

import torch

from kernels import build
from kernels.build import FLOAT, INT, LONG, POINTER, SUFFIX
from kernels.flash_attention import strides
from kernels.linears import allocating
from kernels.op import KernelError, Op, expect

from . import reference

NAME = "decode_attention"
MOST_QUERIES = 16
CUDA_CHUNK = 256  # keys of a block of threads


def check_cached(name: str, q, keys, values, lengths, scale, room: str) -> None:
    """Raise ``KernelError`` for what neither decode nor paged attention takes.

    ``room``: how the first dimensions of keys are called, ``B, Hkv, S`` or ``N, Hkv, page``.
    """
    expect(q.dtype in SUFFIX, f"{name} takes q in float32, bfloat16 or float16, not {q.dtype}; "
           "convert it")  # fmt: skip
    expect(q.dim() == 4 and keys.dim() == 4 and q.shape[3] == keys.shape[3], f"{name} needs q (B, "
           f"H, T, D) and keys ({room}, D), not {tuple(q.shape)} and "
           f"{tuple(keys.shape)}")  # fmt: skip
    (B, H, T, D), Hkv = q.shape, keys.shape[1]
    expect(values.shape == keys.shape, f"{name} needs values shaped like keys "
           f"{tuple(keys.shape)}, not {tuple(values.shape)}")  # fmt: skip
    expect(1 <= D <= 256, f"{name} takes a head_dim of 1 to 256, not {D}")
    expect(Hkv > 0 and H % Hkv == 0, f"{name} needs a number of heads that the kv heads divide, "
           f"not {H} and {Hkv}")  # fmt: skip
    expect(1 <= T <= MOST_QUERIES, f"{name} takes 1 to {MOST_QUERIES} tokens of a row, not {T}; a "
           "prompt is for flash_attention")  # fmt: skip
    expect(lengths.shape == (B,) and lengths.dtype == torch.int64 and lengths.is_contiguous(),
           f"{name} needs contiguous int64 lengths of shape ({B},), not {lengths.dtype} "
           f"{tuple(lengths.shape)}")  # fmt: skip
    expect(scale > 0 and math.isfinite(scale), f"{name} needs a positive finite scale, not {scale}")
    for what, t in (("keys", keys), ("values", values)):
        expect(t.dtype == q.dtype, f"{name} needs {what} and q alike, not {t.dtype} and {q.dtype}")
    for what, t in (("keys", keys), ("values", values), ("lengths", lengths)):
        expect(t.device == q.device, f"{name} needs {what} on {q.device}, not {t.device}")
    for what, t in (("q", q), ("keys", keys), ("values", values)):
        expect(t.stride(3) == 1 or D == 1, f"{name} needs a last dimension of {what} of stride 1, "
               f"not {t.stride(3)}; call .contiguous() on it")  # fmt: skip


def empty_like(q: torch.Tensor) -> torch.Tensor:
    """An output (B, H, T, D) laid out as (B, T, H, D)."""
    B, H, T, D = q.shape
    return torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def check_lengths(name: str, lengths: torch.Tensor, room: int) -> None:
    """Raise ``KernelError`` for a length that the cache has no room for (the host reads them)."""
    for b, length in enumerate(lengths.tolist()):
        _refuse(name, 0 <= length <= room, b, length, room)


def _refuse(name: str, fine: bool, b: int, length: int, room: int) -> None:
    expect(fine, f"{name} got length {length} in row {b}; its cache has room for 0 to {room}")


_ARGTYPES = (*[POINTER] * 6, LONG * 20, LONG * 2, FLOAT, INT)


def attend_cpu(name: str, y, q, keys, values, table, lengths, scale) -> None:
    """Write y (B, H, T, D) by ``kernels/<name>/cpu.cpp``; ``table`` (B, M) int32, or None."""
    function = build.cpu_function(name, f"{name}_{SUFFIX[q.dtype]}", _ARGTYPES, INT)
    (B, H, T, D), (blocks, Hkv, page, _) = q.shape, keys.shape
    most = 1 if table is None else table.shape[1]
    where = (LONG * 2)()
    shape = (B, H, Hkv, T, D, blocks, page, most, *strides(keys, values, q, y))
    refused = function(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), None if table is None else
        table.data_ptr(), lengths.data_ptr(), y.data_ptr(), (LONG * 20)(*shape), where, scale,
        torch.get_num_threads())  # fmt: skip
    b, place = where
    if refused == 1:
        _refuse(name, False, b, int(lengths[b]), page * most)
    if refused:
        raise KernelError(f"{name} got page {int(table[b, place])} at place {place} of row {b}; "
                          f"there are pages 0 to {blocks - 1}")  # fmt: skip


def attend_cuda(name: str, y, q, keys, values, table, lengths, scale) -> None:
    """Write y (B, H, T, D): a block per chunk of keys and up to 8 queries, then one that merges."""
    (B, H, T, D), (blocks, Hkv, page, _) = q.shape, keys.shape
    expect(D <= 128, f"impl='cuda' takes a head_dim of up to 128, not {D}; take impl='triton'")
    most = 1 if table is None else table.shape[1]
    rows, chunks = H // Hkv * T, -(-page * most // CUDA_CHUNK)
    device, suffix = q.device.index or 0, SUFFIX[q.dtype]
    packs = all(n * q.element_size() % 16 == 0 for n in (*strides(keys, values), D))
    packs = packs and keys.data_ptr() % 16 == 0 and values.data_ptr() % 16 == 0
    part = torch.empty(B, Hkv, rows, chunks, D, dtype=torch.float32, device=q.device)
    state = torch.empty(B, Hkv, rows, chunks, 2, dtype=torch.float32, device=q.device)
    found = lengths if table is None else table  # never read without pages
    split = build.cuda_kernel(name, f"{name}_split_{64 if D <= 64 else 128}_{suffix}", device)
    build.launch(split, (chunks, Hkv * -(-rows // 8), B), 128, q, keys, values, found, lengths,
                 part, state, *map(ctypes.c_int64, strides(q, keys, values)),
                 *map(ctypes.c_int, (0 if table is None else most, blocks, page, Hkv, H // Hkv, T,
                                     D, packs)), ctypes.c_float(scale))  # fmt: skip
    merge = build.cuda_kernel(name, f"{name}_merge_{suffix}", device)
    build.launch(merge, (T, H, B), 128, part, state, y, *map(ctypes.c_int64, strides(y)),
                 *map(ctypes.c_int, (chunks, H // Hkv, T, D)), ctypes.c_float(scale))  # fmt: skip


def _check(q, keys, values, lengths, scale):
    check_cached(NAME, q, keys, values, lengths, scale, "B, Hkv, S")
    expect(keys.shape[0] == q.shape[0], f"{NAME} of {q.shape[0]} rows needs a cache of as many, "
           f"not {keys.shape[0]}")  # fmt: skip


def _fake(q, keys, values, lengths, scale):
    return empty_like(q)


def into_cpu(y, q, keys, values, lengths, scale) -> None:
    """Write y (B, H, T, D), of any strides but the last."""
    attend_cpu(NAME, y, q, keys, values, None, lengths, scale)


def _cuda(q, keys, values, lengths, scale):
    y = empty_like(q)
    if not keys.shape[2]:
        return y.zero_()
    if y.numel():
        attend_cuda(NAME, y, q, keys, values, None, lengths, scale)
    return y


def _reference(q, keys, values, lengths, scale):
    check_lengths(NAME, lengths, keys.shape[2])
    return empty_like(q).copy_(reference.decode_attention(q, keys, values, lengths, scale))


def _flops(q_shape, keys_shape, *_, out_shape=None, **__) -> int:
    B, H, T, D = q_shape
    return 4 * B * H * T * keys_shape[2] * D  # of full rows: a shape does not say how long they are


_OP = Op(NAME, "(Tensor q, Tensor keys, Tensor values, Tensor lengths, float scale) -> Tensor",
         check=_check, fake=_fake, reference=_reference, cpu=allocating(into_cpu, _fake),
         cuda=_cuda, flops=_flops)  # fmt: skip


def decode_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     lengths: torch.Tensor, scale: float | None = None, *,
                     impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """softmax(q k^T * scale) v over each row's first ``lengths[b]`` slots, read once per kv head.

    q             (B, H, T, D) fp32, bf16 or fp16, T at most 16: the last T tokens of their rows
    keys, values  (B, Hkv, S, D) alike, written up to ``lengths``; the rest is never read
    lengths       (B,) int64, these T tokens included; query t sees lengths[b] - T + t + 1 slots,
                  and gives zeros when that is none
    scale         positive; None is 1 / sqrt(D)
    Returns (B, H, T, D), laid out as (B, T, H, D).  Raises ``KernelError`` for anything else;
    lengths beyond the cache are found on the CPU, where reading them is free, and are cut to its
    size on a GPU, whose host would have to wait to see them.
    Time: bytes of the slots in use / bandwidth, if B * Hkv * S / chunk fills the processor.
    A row of a batch has the same bits as alone.
    Measured on 2 threads of a busy AMD EPYC (Zen 4) at 8192 slots, 4 heads to a kv head, in rounds
    with torch's reductions over as many bytes, medians of three runs in which those read 26 to 37
    GB/s: heads of 128, one row, 0.74 to 0.94 of their rate in fp32 and 0.85 to 0.96 in bf16; heads
    of 64, four rows, 0.76 to 0.97 and 0.68 to 0.94.  The quickest against the quickest: 0.64 to
    0.97, the low ones where reading came to 40 GB/s and more: short of 0.85 then.  One thread had
    0.77 to 0.79 of what one reads.  Fetched ahead into the first-level cache, or not at all, two
    had 0.46 to 0.58.  From the second-level cache a thread takes 48 and 40, 41 and 31 GB/s: not
    arithmetic alone binds, probably the lines that a core may have under way.
    In a later run, full rows, medians of 460 to 1970 pairs: 0.96 and 1.07, 0.79 and 1.01.
    One thread without AVX-512 (Zen 3), medians of 12 to 75 rounds: 0.97 and 0.80, 0.95 and 0.59 of
    what one reads; bf16 is computed in fp32 there, at 13 GB/s from the cache.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _OP(q, keys, values, lengths, scale, impl=impl)


def bytes_moved(lengths: list[int], heads: int, kv_heads: int, queries: int, dim: int,
                itemsize: int) -> int:  # fmt: skip
    """Keys and values in use read once, q read and y written once."""
    return 2 * (sum(lengths) * kv_heads + len(lengths) * heads * queries) * dim * itemsize
