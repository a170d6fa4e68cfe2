"""Weight-only int8 linear in Triton: dot products at small batch, tensor cores from 16 rows on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

TARGETS = ("sm_80", "sm_90a")
_TYPES = {"weight_ptr": "*i8", "scale_ptr": "*fp32", "bias_ptr": "*fp32"}
VARIANTS = {
    "int8_linear_gemv_kernel": {
        "constants": {"HAS_BIAS": True, "BLOCK_N": 16, "BLOCK_K": 256}, "warps": 4,
        "types": _TYPES},
    "int8_linear_gemm_kernel": {
        "constants": {"HAS_BIAS": True, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, "warps": 4,
        "types": _TYPES, "dtypes": ("bf16", "fp16")},
}  # fmt: skip


@triton.jit
def int8_linear_gemv_kernel(x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, x_stride, N, K,
                            HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_K: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        inside = (n < N)[:, None] & (k < K)[None, :]
        where = n.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.load(weight_ptr + where, mask=inside, other=0)
        total += w.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1) * tl.load(scale_ptr + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def int8_linear_gemm_kernel(x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, x_stride, M, N, K,
                            HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_K: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = m.to(tl.int64)[:, None] * x_stride, n.to(tl.int64)[None, :] * K
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight_ptr + cols + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None],
                    other=0)  # fmt: skip
        total = tl.dot(x, w.to(x.dtype), total)  # every int8 is exact in bf16 and fp16
    total *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    where = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + where, total.to(y_ptr.dtype.element_ty), mask=inside)


def int8_linear(x, weight, scale, bias=None):
    """y (..., N), contiguous."""
    n, k = weight.shape
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    rows, stride = rows_of(x, "x of int8_linear")
    if not y.numel():
        return y
    given = bias if bias is not None else scale  # never read
    if rows < 16 or x.dtype == torch.float32:  # tensor cores would round fp32 to tf32
        int8_linear_gemv_kernel[(triton.cdiv(n, 16), rows)](
            x, weight, scale, given, y, stride, n, k, HAS_BIAS=bias is not None, BLOCK_N=16,
            BLOCK_K=256, num_warps=4)  # fmt: skip
    else:
        block_m = 16 if rows <= 16 else 64
        int8_linear_gemm_kernel[(triton.cdiv(n, 64), triton.cdiv(rows, block_m))](
            x, weight, scale, given, y, stride, rows, n, k, HAS_BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=64, num_warps=4)  # fmt: skip
    return y
