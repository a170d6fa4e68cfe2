"""int8 times int8 in Triton: x is quantized first; sums in int32, on tensor cores from 16 rows on.

Every sum is whole, so a row of a batch has the same bits as alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.linears import empty_output
from kernels.op import rows_of

TARGETS = ("sm_80", "sm_90a")
_TYPES = {"q_ptr": "*i8", "weight_ptr": "*i8", "scale_ptr": "*fp32", "scale_x_ptr": "*fp32",
          "bias_ptr": "*fp32"}  # fmt: skip
# a fused multiply-add would round x * (1 / scale) to a whole number at once: another one at ties
UNFUSED = {"enable_fp_fusion": False}
VARIANTS = {
    "w8a8_linear_quantize_kernel": {
        "constants": {"BLOCK_K": 1024}, "warps": 4, "types": _TYPES, "options": UNFUSED},
    "w8a8_linear_gemv_kernel": {
        "constants": {"HAS_BIAS": True, "BLOCK_N": 16, "BLOCK_K": 256}, "warps": 4,
        "types": _TYPES},
    "w8a8_linear_gemm_kernel": {
        "constants": {"HAS_BIAS": True, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128}, "warps": 4,
        "types": _TYPES},
}  # fmt: skip


@triton.jit
def rounded(v):
    """v, within 2^22 of 0, to the nearest whole number, to the even one at ties."""
    return v + 12582912.0 - 12582912.0  # 3 * 2^22, from where floats are whole


@triton.jit
def magnitude(x):
    """The bits of |x|, which order as the numbers do; infinity and NaN are the largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(top):
    """(max|x| / 127, its inverse, whether all were finite) of the largest ``magnitude``."""
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, 127.0, tl.float32))
    scale = tl.maximum(scale, 1.1754944e-38)  # 2^-126: of less, no inverse is finite
    return scale, tl.div_rn(tl.full(top.shape, 1.0, tl.float32), scale), top < 0x7F800000


@triton.jit
def w8a8_linear_quantize_kernel(x_ptr, q_ptr, scale_x_ptr, x_stride, K, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0)
        top = tl.maximum(top, magnitude(x))
    scale, inverse, finite = scale_of(tl.max(top, axis=0))
    tl.store(scale_x_ptr + row, tl.where(finite, scale, float("nan")))
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        q = tl.where(finite, rounded(x * inverse), 0.0).to(tl.int8)
        tl.store(q_ptr + row * K + k, q, mask=k < K)


@triton.jit
def w8a8_linear_gemv_kernel(q_ptr, scale_x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, N, K,
                            HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_K: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(q_ptr + row * K + k, mask=k < K, other=0).to(tl.int32)
        inside = (n < N)[:, None] & (k < K)[None, :]
        where = n.to(tl.int64)[:, None] * K + k[None, :]
        total += tl.load(weight_ptr + where, mask=inside, other=0).to(tl.int32) * x[None, :]
    scale = tl.load(scale_x_ptr + row) * tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = tl.sum(total, axis=1).to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def w8a8_linear_gemm_kernel(q_ptr, scale_x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
                            HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                            BLOCK_K: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = m.to(tl.int64)[:, None] * K, n.to(tl.int64)[None, :] * K
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(q_ptr + rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        w = tl.load(weight_ptr + cols + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None],
                    other=0)  # fmt: skip
        total = tl.dot(x, w, total, out_dtype=tl.int32)
    scale = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)[:, None]
    y = total.to(tl.float32) * (scale * tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    where = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)


def w8a8_linear(x, weight, scale, bias=None):
    """y (..., N), contiguous."""
    n, k = weight.shape
    y = empty_output(x, n)
    rows, stride = rows_of(x, "x of w8a8_linear")
    if not y.numel():
        return y
    q = torch.empty(rows, k, dtype=torch.int8, device=x.device)
    scale_x = torch.empty(rows, dtype=torch.float32, device=x.device)
    w8a8_linear_quantize_kernel[(rows,)](x, q, scale_x, stride, k, BLOCK_K=1024, num_warps=4,
                                         **UNFUSED)  # fmt: skip
    given = bias if bias is not None else scale  # never read
    if rows < 16:
        w8a8_linear_gemv_kernel[(triton.cdiv(n, 16), rows)](
            q, scale_x, weight, scale, given, y, n, k, HAS_BIAS=bias is not None, BLOCK_N=16,
            BLOCK_K=256, num_warps=4)  # fmt: skip
    else:
        block_m = 16 if rows <= 16 else 64
        w8a8_linear_gemm_kernel[(triton.cdiv(n, 64), triton.cdiv(rows, block_m))](
            q, scale_x, weight, scale, given, y, rows, n, k, HAS_BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=128, num_warps=4)  # fmt: skip
    return y
