"""Rotary position embedding in Triton: a program per token and block of its pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

BLOCK = 1024
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {"rope_kernel": {"constants": {"BLOCK_SIZE": BLOCK}, "warps": 4,
                            "types": {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}}}  # fmt: skip


@triton.jit
def rope_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, stride_head, length, heads, half,
                BLOCK_SIZE: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = at < heads * half
    head, i = at // half, at % half
    table = (token % length) * half + i
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    where = x_ptr + (token * heads + head) * stride_head + i
    first = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(where + half, mask=inside, other=0.0).to(tl.float32)
    out = y_ptr + (token * heads + head) * 2 * half + i
    tl.store(out, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(out + half, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D) turned, contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (_, stride), (batch, length, heads, width) = rows_of(x, "x of rope"), x.shape
    if y.numel():
        grid = (batch * length, triton.cdiv(heads * (width // 2), BLOCK))
        rope_kernel[grid](x, cos, sin, y, stride, length, heads, width // 2, BLOCK_SIZE=BLOCK,
                          num_warps=4)  # fmt: skip
    return y
