"""Paged attention in Triton: the kernels of decode attention, with a table of pages."""

from __future__ import annotations

from kernels.decode_attention.triton import TARGETS as TARGETS
from kernels.decode_attention.triton import attend, variants
from kernels.decode_attention.triton import attend_merge_kernel as attend_merge_kernel
from kernels.decode_attention.triton import attend_split_kernel as attend_split_kernel

VARIANTS = variants(paged=True)


def paged_attention(q, keys, values, block_table, lengths, scale):
    """y (B, H, T, D), laid out as (B, T, H, D)."""
    return attend(q, keys, values, block_table, lengths, scale)
