"""LayerNorm in Triton: a program per row; short rows stay in registers, long ones do not."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

ONE_PASS = 16384  # columns that one program holds in registers
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {"layer_norm_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8},
            "layer_norm_long_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8}}  # fmt: skip


@triton.jit
def layer_norm_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, stride_row, n_cols, eps,
                      BLOCK_SIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / n_cols
    centred = tl.where(inside, x - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = centred * inverse * weight + bias
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_long_kernel(x_ptr, weight_ptr, bias_ptr, y_ptr, stride_row, n_cols, eps,
                           BLOCK_SIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(x_ptr + row * stride_row + cols, mask=cols < n_cols, other=0.0)
        sums += x.to(tl.float32)
    mean = tl.sum(sums, axis=0) / n_cols
    squares = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < n_cols
        x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - mean, 0.0)
        squares += centred * centred
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / n_cols + eps)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < n_cols
        x = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * inverse * weight + bias
        tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
               eps: float) -> torch.Tensor:  # fmt: skip
    """The norm of x (..., N), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (rows, stride), n = rows_of(x, "x of layer_norm"), x.shape[-1]
    if y.numel():
        block = triton.next_power_of_2(n)
        kernel = layer_norm_kernel if block <= ONE_PASS else layer_norm_long_kernel
        block = min(block, ONE_PASS)
        kernel[(rows,)](x, weight, bias, y, stride, n, eps, BLOCK_SIZE=block,
                        num_warps=min(max(block // 512, 1), 16))  # fmt: skip
    return y
