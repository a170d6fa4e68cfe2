"""Residual addition and RMSNorm in Triton: a program per row; long rows are read twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

ONE_PASS = 16384  # columns that one program holds in registers
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {
    "add_rms_norm_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8},
    "add_rms_norm_long_kernel": {"constants": {"BLOCK_SIZE": 4096}, "warps": 8},
}


@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, x_stride,
                        residual_stride, n_cols, eps, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0)
    # rounded to the output's dtype before it is normalized
    total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * n_cols + cols, total, mask=inside)
    wide = total.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / n_cols + eps)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = wide * inverse * weight
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_rms_norm_long_kernel(x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, x_stride,
                             residual_stride, n_cols, eps, BLOCK_SIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < n_cols
        x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0)
        wide = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty).to(tl.float32)
        squares += wide * wide
    inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / n_cols + eps)
    for start in range(0, n_cols, BLOCK_SIZE):  # added again: no thread reads what another wrote
        cols = start + tl.arange(0, BLOCK_SIZE)
        inside = cols < n_cols
        x = tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * n_cols + cols, total, mask=inside)
        weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        y = total.to(tl.float32) * inverse * weight
        tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(x, residual, weight, eps):
    """(y, total), contiguous."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    (rows, x_stride), n = rows_of(x, "x of add_rms_norm"), x.shape[-1]
    _, residual_stride = rows_of(residual, "residual of add_rms_norm")
    if y.numel():
        block = triton.next_power_of_2(n)
        kernel = add_rms_norm_kernel if block <= ONE_PASS else add_rms_norm_long_kernel
        block = min(block, ONE_PASS)
        kernel[(rows,)](x, residual, weight, y, total, x_stride, residual_stride, n, eps,
                        BLOCK_SIZE=block, num_warps=min(max(block // 512, 1), 16))  # fmt: skip
    return y, total
