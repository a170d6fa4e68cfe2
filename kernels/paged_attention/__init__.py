"""Attention of a few tokens over keys and values that stand in pages.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180
"""

from __future__ import annotations

import torch

from kernels.decode_attention import (
    attend_cpu,
    attend_cuda,
    check_cached,
    check_lengths,
    empty_like,
)
from kernels.decode_attention import bytes_moved as bytes_moved
from kernels.linears import allocating
from kernels.op import Op, expect

from . import reference

NAME = "paged_attention"


def _check(q, keys, values, block_table, lengths, scale):
    check_cached(NAME, q, keys, values, lengths, scale, "N, Hkv, page")
    expect(block_table.dim() == 2 and block_table.shape[0] == q.shape[0] and
           block_table.dtype == torch.int32 and block_table.is_contiguous(),
           f"{NAME} needs a contiguous int32 block_table ({q.shape[0]}, M), not "
           f"{block_table.dtype} {tuple(block_table.shape)}")  # fmt: skip
    expect(block_table.device == q.device, f"{NAME} needs block_table on {q.device}, not "
           f"{block_table.device}")  # fmt: skip
    expect(keys.shape[2] > 0, f"{NAME} needs pages of at least one token, not {tuple(keys.shape)}")


def _fake(q, keys, values, block_table, lengths, scale):
    return empty_like(q)


def into_cpu(y, q, keys, values, block_table, lengths, scale) -> None:
    """Write y (B, H, T, D), of any strides but the last."""
    attend_cpu(NAME, y, q, keys, values, block_table, lengths, scale)


def _cuda(q, keys, values, block_table, lengths, scale):
    y = empty_like(q)
    if not block_table.shape[1]:
        return y.zero_()
    if y.numel():
        attend_cuda(NAME, y, q, keys, values, block_table, lengths, scale)
    return y


def _reference(q, keys, values, block_table, lengths, scale):
    blocks, _, page, _ = keys.shape
    check_lengths(NAME, lengths, page * block_table.shape[1])
    for b, length in enumerate(lengths.tolist()):
        for i, at in enumerate(block_table[b, : -(-length // page)].tolist()):
            expect(0 <= at < blocks, f"{NAME} got page {at} at place {i} of row {b}; there are "
                   f"pages 0 to {blocks - 1}")  # fmt: skip
    y = reference.paged_attention(q, keys, values, block_table, lengths, scale)
    return empty_like(q).copy_(y)


def _flops(q_shape, keys_shape, _values, table_shape, *_, out_shape=None, **__) -> int:
    B, H, T, D = q_shape
    return 4 * B * H * T * table_shape[1] * keys_shape[2] * D  # of full rows


_OP = Op(NAME, "(Tensor q, Tensor keys, Tensor values, Tensor block_table, Tensor lengths, "
         "float scale) -> Tensor", check=_check, fake=_fake, reference=_reference,
         cpu=allocating(into_cpu, _fake), cuda=_cuda, flops=_flops)  # fmt: skip


def paged_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                    block_table: torch.Tensor, lengths: torch.Tensor, scale: float | None = None,
                    *, impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """``decode_attention`` over pages: slot s of row b is in page block_table[b, s // page].

    q             (B, H, T, D) fp32, bf16 or fp16, T at most 16
    keys, values  (N, Hkv, page, D) alike: N pages that rows may share; s is at s % page
    block_table   (B, M) int32; entries beyond a row's length are never read
    lengths       (B,) int64, at most M * page
    Returns (B, H, T, D), laid out as (B, T, H, D).  A page that does not exist is refused on the
    CPU; on a GPU, whose host would have to wait to see it, the row becomes NaN.
    Costs a look-up per page over ``decode_attention``; saves the slots that rows never reach.
    Pages of 16 tokens in random order, one thread of a Zen 3 without AVX-512, heads of 128: 0.77 of
    a linear read's rate in fp32 and 0.58 in bf16, short of 0.85.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _OP(q, keys, values, block_table, lengths, scale, impl=impl)
