"""Weight-only int4 linear in Triton: dot products at small batch, tensor cores from 16 rows on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.linears import empty_output, group_of
from kernels.op import rows_of

TARGETS = ("sm_80", "sm_90a")
_TYPES = {"packed_ptr": "*i32", "scale_ptr": "*bf16", "bias_ptr": "*fp32"}
VARIANTS = {
    "int4_linear_gemv_kernel": {
        "constants": {"HAS_BIAS": True, "GROUP": 32, "OCTETS": 64}, "warps": 4, "types": _TYPES},
    "int4_linear_gemm_kernel": {
        "constants": {"HAS_BIAS": True, "GROUP": 32, "BLOCK_M": 64, "BLOCK_N": 64}, "warps": 4,
        "types": _TYPES, "dtypes": ("bf16", "fp16")},
}  # fmt: skip


@triton.jit
def int4_linear_gemv_kernel(x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, x_stride, N, K,
                            HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
                            OCTETS: tl.constexpr):  # fmt: skip
    block, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    side = tl.arange(0, 16)
    total = tl.zeros([OCTETS, 16], dtype=tl.float32)
    for start in range(0, K // 8, OCTETS):
        octet = start + tl.arange(0, OCTETS)
        inside = octet < K // 8
        words = tl.load(packed_ptr + block * (K // 8) * 16 + octet[:, None] * 16 + side[None, :],
                        mask=inside[:, None], other=0)  # fmt: skip
        groups = octet * 8 // GROUP
        scale = tl.load(scale_ptr + block * (K // GROUP) * 16 + groups[:, None] * 16
                        + side[None, :], mask=inside[:, None], other=0.0)  # fmt: skip
        part = tl.zeros([OCTETS, 16], dtype=tl.float32)
        for j in tl.static_range(8):
            at = x_ptr + row * x_stride + octet * 8 + (j % 4 * 2 + j // 4)
            x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            part += ((words >> (4 * j) & 15) - 8).to(tl.float32) * x[:, None]
        total += part * scale.to(tl.float32)
    n = block * 16 + side
    y = tl.sum(total, axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def int4_linear_gemm_kernel(x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, x_stride, M, N, K,
                            HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_N: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, last = m.to(tl.int64)[:, None] * x_stride, (N + 15) // 16 * 16
    block, side = (n // 16).to(tl.int64), n % 16
    octets = tl.arange(0, GROUP // 8)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(K // GROUP):
        k = group * GROUP + tl.arange(0, GROUP)
        x = tl.load(x_ptr + rows + k[None, :], mask=(m < M)[:, None], other=0.0)
        octet = group * (GROUP // 8) + octets
        words = tl.load(packed_ptr + (block * (K // 8) * 16 + side)[None, :] + octet[:, None] * 16,
                        mask=(n < last)[None, :], other=0)  # (GROUP / 8, BLOCK_N)  # fmt: skip
        # inputs 4 h + 2 l + i of an octet are nibble 2 h + l + 4 i: three pairs, innermost i
        near = tl.join(tl.join(words, words >> 16), tl.join(words >> 4, words >> 20))
        far = tl.join(tl.join(words >> 8, words >> 24), tl.join(words >> 12, words >> 28))
        each = tl.join(near, far)  # (GROUP / 8, BLOCK_N, i, l, h)
        each = tl.reshape(tl.permute(each, (0, 4, 3, 2, 1)), (GROUP, BLOCK_N))
        weight = ((each & 15) - 8).to(x.dtype)  # exact in bf16 and fp16
        scale = tl.load(scale_ptr + block * (K // GROUP) * 16 + group * 16 + side, mask=n < last,
                        other=0.0)  # fmt: skip
        total += tl.dot(x, weight) * scale.to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    where = m.to(tl.int64)[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + where, total.to(y_ptr.dtype.element_ty), mask=inside)


def int4_linear(x, packed, scale, outputs, bias=None):
    """y (..., N), contiguous."""
    y, k, group = empty_output(x, outputs), x.shape[-1], group_of(packed, scale)
    rows, stride = rows_of(x, "x of int4_linear")
    if not y.numel():
        return y
    given = bias if bias is not None else scale  # never read
    if rows < 16 or x.dtype == torch.float32:  # tensor cores would round fp32 to tf32
        int4_linear_gemv_kernel[(len(packed), rows)](
            x, packed, scale, given, y, stride, outputs, k, HAS_BIAS=bias is not None,
            GROUP=group, OCTETS=64, num_warps=4)  # fmt: skip
    else:
        block_m = 16 if rows <= 16 else 64
        int4_linear_gemm_kernel[(triton.cdiv(outputs, 64), triton.cdiv(rows, block_m))](
            x, packed, scale, given, y, stride, rows, outputs, k, HAS_BIAS=bias is not None,
            GROUP=group, BLOCK_M=block_m, BLOCK_N=64, num_warps=4)  # fmt: skip
    return y
