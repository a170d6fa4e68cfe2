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
def biased(x_ptr, bias_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    """x + bias of this program's block, in fp32."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = tl.load(x_ptr + row * stride_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    return x + tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)


@triton.jit
def put(y_ptr, y, n_cols, BLOCK_SIZE: tl.constexpr):
    """Write this program's block."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=cols < n_cols)


@triton.jit
def gelu_bias_erf_kernel(x_ptr, bias_ptr, y_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    z = biased(x_ptr, bias_ptr, stride_row, n_cols, BLOCK_SIZE)
    put(y_ptr, z * (0.5 * (1.0 + tl.erf(z * 0.707106781187))), n_cols, BLOCK_SIZE)


@triton.jit
def gelu_bias_tanh_kernel(x_ptr, bias_ptr, y_ptr, stride_row, n_cols, BLOCK_SIZE: tl.constexpr):
    z = biased(x_ptr, bias_ptr, stride_row, n_cols, BLOCK_SIZE)
    # 0.5 z (1 + tanh u) = z / (1 + exp(-2u)), u = sqrt(2/pi) (z + 0.044715 z^3)
    y = z / (1.0 + tl.exp(z * (-1.59576912161 - 0.0713548162726 * z * z)))
    put(y_ptr, y, n_cols, BLOCK_SIZE)


def gelu_bias(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(x + bias), contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (rows, stride), n = rows_of(x, "x of gelu_bias"), x.shape[-1]
    kernel = gelu_bias_tanh_kernel if approximate == "tanh" else gelu_bias_erf_kernel
    if y.numel():
        kernel[(rows, triton.cdiv(n, BLOCK))](x, bias, y, stride, n, BLOCK_SIZE=BLOCK,
                                              num_warps=4)  # fmt: skip
    return y
