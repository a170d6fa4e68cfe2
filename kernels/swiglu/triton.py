"""SwiGLU in Triton: a program per row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

BLOCK = 2048
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {"swiglu_kernel": {"constants": {"BLOCK_SIZE": BLOCK}, "warps": 4}}


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, n_cols,
                  BLOCK_SIZE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * n_cols + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    (rows, gate_stride), n = rows_of(gate, "gate of swiglu"), gate.shape[-1]
    _, up_stride = rows_of(up, "up of swiglu")
    if y.numel():
        swiglu_kernel[(rows, triton.cdiv(n, BLOCK))](gate, up, y, gate_stride, up_stride, n,
                                                     BLOCK_SIZE=BLOCK, num_warps=4)  # fmt: skip
    return y
