"""Bias and GELU in Triton: a program per row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

BLOCK = 2048
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {
    "gelu_bias_erf_kernel": {"constants": {"BLOCK_SIZE": BLOCK}, "warps": 4},
    "gelu_bias_tanh_kernel": {"constants": {"BLOCK_SIZE": BLOCK}, "warps": 4},
}


@triton.jit
def gelu_bias_erf_kernel(x_ptr, bias_ptr, y_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    z = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = z * (0.5 * (1.0 + tl.erf(z * 0.707106781187)))
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_bias_tanh_kernel(x_ptr, bias_ptr, y_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    z = tl.load(x_ptr + row * stride_row + cols, mask=inside, other=0.0).to(tl.float32)
    z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    # 0.5 z (1 + tanh u) = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)
    y = z / (1.0 + tl.exp(z * (-1.59576912161 - 0.0713548162726 * z * z)))
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def gelu_bias(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(x + bias), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (rows, stride), n = rows_of(x, "x of gelu_bias"), x.shape[-1]
    kernel = gelu_bias_tanh_kernel if approximate == "tanh" else gelu_bias_erf_kernel
    if y.numel():
        kernel[(rows, triton.cdiv(n, BLOCK))](x, bias, y, stride, n, BLOCK_SIZE=BLOCK,
                                              num_warps=4)  # fmt: skip
    return y
