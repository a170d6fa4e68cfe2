"""The best token of each block of tokens in Triton; torch takes the best of the blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

from .reference import best_of_blocks

BLOCK_V, BLOCK_K = 16, 256
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {"lm_head_argmax_kernel": {
    "constants": {"BLOCK_V": BLOCK_V, "BLOCK_K": BLOCK_K}, "warps": 4,
    "types": {"tops_ptr": "*fp32", "tokens_ptr": "*i32"}}}  # fmt: skip


@triton.jit
def lm_head_argmax_kernel(x_ptr, weight_ptr, tops_ptr, tokens_ptr, x_stride, rows, V, K,
                          BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    # beyond the last token stands the last again: it cannot win over itself
    v = tl.minimum(tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), V - 1)
    row = tl.program_id(1).to(tl.int64)
    sums = tl.zeros([BLOCK_V, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        where = v.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.load(weight_ptr + where, mask=(k < K)[None, :], other=0.0).to(tl.float32)
        sums += w * x[None, :]
    logits = tl.sum(sums, axis=1)
    rank = tl.where(logits != logits, float("inf"), logits)  # a NaN before any number
    first = tl.min(tl.where(rank == tl.max(rank, axis=0), v, V), axis=0)
    top = tl.sum(tl.where((v == first) & (tl.arange(0, BLOCK_V) == first % BLOCK_V), logits, 0.0))
    at = tl.program_id(0).to(tl.int64) * rows + row
    tl.store(tops_ptr + at, top)
    tl.store(tokens_ptr + at, first)


def lm_head_argmax(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(top, token), contiguous."""
    (rows, stride), (vocab, k) = rows_of(x, "x of lm_head_argmax"), weight.shape
    top = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    token = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    if rows:
        blocks = triton.cdiv(vocab, BLOCK_V)
        tops = torch.empty(blocks, rows, dtype=torch.float32, device=x.device)
        tokens = torch.empty(blocks, rows, dtype=torch.int32, device=x.device)
        lm_head_argmax_kernel[(blocks, rows)](x, weight, tops, tokens, stride, rows, vocab, k,
                                              BLOCK_V=BLOCK_V, BLOCK_K=BLOCK_K,
                                              num_warps=4)  # fmt: skip
        best_of_blocks(tops, tokens, top.view(-1), token.view(-1))
    return top, token
