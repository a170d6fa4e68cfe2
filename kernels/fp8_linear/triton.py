"""e4m3 times e4m3 in Triton: x is rounded first; on tensor cores from 16 rows on.

Where x is fp32, and in the interpreter, which adds up e4m3 wrongly, both sides go to the tensor
cores as fp16, which holds every e4m3: half the rate, but sums of full precision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import build
from kernels.linears import empty_output
from kernels.op import rows_of

TARGETS = ("sm_90a",)
_TYPES = {"q_ptr": "*fp8e4nv", "weight_ptr": "*fp8e4nv", "scale_ptr": "*fp32",
          "scale_x_ptr": "*fp32", "bias_ptr": "*fp32"}  # fmt: skip

# a fused multiply-add would round x * (1 / scale) to e4m3 at once: another one at ties
UNFUSED = {"enable_fp_fusion": False}
_GEMM = {"HAS_BIAS": True, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128}
VARIANTS = {
    "fp8_linear_quantize_kernel": {
        "constants": {"BLOCK_K": 1024}, "warps": 4, "types": _TYPES, "options": UNFUSED},
    "fp8_linear_gemv_kernel": {
        "constants": {"HAS_BIAS": True, "BLOCK_N": 16, "BLOCK_K": 256}, "warps": 4,
        "types": _TYPES},
    "fp8_linear_gemm_kernel": {
        "constants": _GEMM | {"AS_HALF": False}, "warps": 4, "types": _TYPES,
        "dtypes": ("bf16", "fp16")},
    "fp8_linear_gemm_kernel[half]": {
        "constants": _GEMM | {"AS_HALF": True, "BLOCK_K": 64}, "warps": 4, "types": _TYPES,
        "dtypes": ("fp32",)},
}  # fmt: skip


@triton.jit
def rounded(v):
    """v, at most 448 and a little, to the nearest e4m3, of two the even one; still fp32."""
    bits = v.to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(bits.to(tl.float32, bitcast=True), 0.015625)
    # floats are as far apart at `shift` as e4m3 are at v
    shift = power * 1572864.0
    return (v + shift) - shift


@triton.jit
def fp8_linear_quantize_kernel(x_ptr, q_ptr, scale_x_ptr, x_stride, K, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK_K], dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        # the bits of |x| order as the numbers do; infinity and NaN are the largest
        top = tl.maximum(top, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    most = tl.max(top, axis=0)
    finite = most < 0x7F800000
    scale = tl.div_rn(most.to(tl.float32, bitcast=True), tl.full(most.shape, 448.0, tl.float32))
    scale = tl.maximum(scale, 7.52316385e-37)  # 2^-120
    inverse = tl.div_rn(tl.full(most.shape, 1.0, tl.float32), scale)
    tl.store(scale_x_ptr + row, tl.where(finite, scale, float("nan")))
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        q = tl.where(finite, rounded(x * inverse), 0.0)
        tl.store(q_ptr + row * K + k, q.to(q_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def fp8_linear_gemv_kernel(q_ptr, scale_x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, N, K,
                           HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
                           BLOCK_K: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(q_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        inside = (n < N)[:, None] & (k < K)[None, :]
        where = n.to(tl.int64)[:, None] * K + k[None, :]
        total += tl.load(weight_ptr + where, mask=inside, other=0.0).to(tl.float32) * x[None, :]
    scale = tl.load(scale_x_ptr + row) * tl.load(scale_ptr + n, mask=n < N, other=0.0)
    y = tl.sum(total, axis=1) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def fp8_linear_gemm_kernel(q_ptr, scale_x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
                           HAS_BIAS: tl.constexpr, AS_HALF: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, cols = m.to(tl.int64)[:, None] * K, n.to(tl.int64)[None, :] * K
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(q_ptr + rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(weight_ptr + cols + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None],
                    other=0.0)  # fmt: skip
        if AS_HALF:
            total = tl.dot(x.to(tl.float16), w.to(tl.float16), total)
        else:
            # tensor cores keep some 13 bits of such sums: few of them, the rest in fp32
            total = tl.dot(x, w, total, max_num_imprecise_acc=128)
    scale = tl.load(scale_x_ptr + m, mask=m < M, other=0.0)[:, None]
    y = total * (scale * tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    where = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)


def fp8_linear(x, weight, scale, bias=None):
    """y (..., N), contiguous."""
    from . import expect_sm89

    expect_sm89(x.device)
    n, k = weight.shape
    y = empty_output(x, n)
    rows, stride = rows_of(x, "x of fp8_linear")
    if not y.numel():
        return y
    q = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scale_x = torch.empty(rows, dtype=torch.float32, device=x.device)
    fp8_linear_quantize_kernel[(rows,)](x, q, scale_x, stride, k, BLOCK_K=1024, num_warps=4,
                                        **UNFUSED)  # fmt: skip
    given = bias if bias is not None else scale  # never read
    if rows < 16:
        fp8_linear_gemv_kernel[(triton.cdiv(n, 16), rows)](
            q, scale_x, weight, scale, given, y, n, k, HAS_BIAS=bias is not None, BLOCK_N=16,
            BLOCK_K=256, num_warps=4)  # fmt: skip
    else:
        half = x.dtype == torch.float32 or build.interpreting()
        fp8_linear_gemm_kernel[(triton.cdiv(n, 128), triton.cdiv(rows, 64))](
            q, scale_x, weight, scale, given, y, rows, n, k, HAS_BIAS=bias is not None,
            AS_HALF=half, BLOCK_M=64, BLOCK_N=128, BLOCK_K=64 if half else 128,
            num_warps=4)  # fmt: skip
    return y
