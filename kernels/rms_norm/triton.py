"""RMSNorm in Triton: a program per row, the row in registers, or in two passes when it is long."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

ONE_PASS = 16384  # columns that one program holds in registers
TARGETS = ("sm_80", "sm_90a")
# what is compiled ahead of time in the tests: kernel, constants, warps
VARIANTS = {"rms_norm_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8},
            "rms_norm_long_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8}}  # fmt: skip


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, y_ptr, stride_row, n_cols, eps, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = x * inverse * weight
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_long_kernel(x_ptr, weight_ptr, y_ptr, stride_row, n_cols, eps,
                         BLOCK_SIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + row * stride_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        squares += x * x
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / n_cols + eps)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < n_cols
        x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        y = x * inverse * weight
        tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of x (..., N), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (rows, stride), n = rows_of(x, "x of rms_norm"), x.shape[-1]
    if y.numel():
        block = triton.next_power_of_2(n)
        kernel = rms_norm_kernel if block <= ONE_PASS else rms_norm_long_kernel
        block = min(block, ONE_PASS)
        kernel[(rows,)](x, weight, y, stride, n, eps, BLOCK_SIZE=block,
                        num_warps=min(max(block // 512, 1), 16))  # fmt: skip
    return y
