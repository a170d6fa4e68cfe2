"""Softmax in Triton: a program per row, the row in registers, or read twice when it is long."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

ONE_PASS = 16384  # columns that one program holds in registers
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {"softmax_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8},
            "softmax_long_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8}}  # fmt: skip


@triton.jit
def softmax_kernel(x_ptr, y_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_long_kernel(x_ptr, y_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # a running maximum per lane, and the sum of exponentials below it (the online softmax);
    # it starts above -infinity, so that a lane without an element adds exp(-inf) = 0
    top = tl.full([BLOCK_SIZE], -3.4e38, dtype=tl.float32)
    sums = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + row * stride_row + cols, mask=cols < n_cols, other=-float("inf"))
        x = x.to(tl.float32)
        larger = tl.maximum(top, x)
        sums = sums * tl.exp(top - larger) + tl.exp(x - larger)
        top = larger
    highest = tl.max(top, axis=0)
    scale = 1.0 / tl.sum(sums * tl.exp(top - highest), axis=0)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < n_cols
        x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
        y = tl.exp(x - highest) * scale
        tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """The softmax of x (..., N), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (rows, stride), n = rows_of(x, "x of softmax"), x.shape[-1]
    if y.numel():
        block = triton.next_power_of_2(n)
        kernel = softmax_kernel if block <= ONE_PASS else softmax_long_kernel
        block = min(block, ONE_PASS)
        kernel[(rows,)](x, y, stride, n, BLOCK_SIZE=block,
                        num_warps=min(max(block // 512, 1), 16))  # fmt: skip
    return y
