"""int4 times int8 in Triton: x is quantized first; int32 sums, on tensor cores from 16 rows on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.linears import empty_output, group_of
from kernels.op import rows_of

TARGETS = ("sm_80", "sm_90a")
_TYPES = {"q_ptr": "*i8", "packed_ptr": "*i32", "scale_ptr": "*bf16", "scale_x_ptr": "*fp32",
          "bias_ptr": "*fp32"}  # fmt: skip
# a fused multiply-add would round x * (1 / scale) to a whole number at once: another one at ties
UNFUSED = {"enable_fp_fusion": False}
VARIANTS = {
    "int4_a8_linear_quantize_kernel": {
        "constants": {"GROUP": 32, "BLOCK": 32}, "warps": 4, "types": _TYPES, "options": UNFUSED},
    "int4_a8_linear_gemv_kernel": {
        "constants": {"HAS_BIAS": True, "GROUP": 32, "OCTETS": 64}, "warps": 4, "types": _TYPES},
    "int4_a8_linear_gemm_kernel": {
        "constants": {"HAS_BIAS": True, "GROUP": 32, "BLOCK_M": 64, "BLOCK_N": 64}, "warps": 4,
        "types": _TYPES},
    "int4_a8_linear_gemm_kernel[128]": {
        "constants": {"HAS_BIAS": True, "GROUP": 128, "BLOCK_M": 64, "BLOCK_N": 64}, "warps": 4,
        "types": _TYPES},
}  # fmt: skip


@triton.jit
def int4_a8_linear_quantize_kernel(x_ptr, q_ptr, scale_x_ptr, x_stride, K, GROUP: tl.constexpr,
                                   BLOCK: tl.constexpr):  # fmt: skip
    row, groups = tl.program_id(0).to(tl.int64), K // GROUP
    g = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    # bits of |x| order as the numbers do; infinity and NaN are the largest
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = top < 0x7F800000
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full([BLOCK], 127.0, tl.float32))
    scale = tl.maximum(scale, 1.1754944e-38)  # 2^-126: of less, no inverse is finite
    inverse = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), scale)
    # from 3 * 2^22 on floats are whole: to the nearest, at ties to the even one
    whole = x * inverse[:, None] + 12582912.0 - 12582912.0
    tl.store(q_ptr + row * K + k, tl.where(finite[:, None], whole, 0.0).to(tl.int8), mask=k < K)
    tl.store(scale_x_ptr + row * groups + g, tl.where(finite, scale, float("nan")),
             mask=g < groups)  # fmt: skip


@triton.jit
def int4_a8_linear_gemv_kernel(q_ptr, scale_x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, N, K,
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
        scale_x = tl.load(scale_x_ptr + row * (K // GROUP) + groups, mask=inside, other=0.0)
        part = tl.zeros([OCTETS, 16], dtype=tl.int32)
        for j in tl.static_range(8):
            at = q_ptr + row * K + octet * 8 + (j % 4 * 2 + j // 4)
            x = tl.load(at, mask=inside, other=0).to(tl.int32)
            part += ((words >> (4 * j) & 15) - 8) * x[:, None]
        total += part.to(tl.float32) * (scale_x[:, None] * scale.to(tl.float32))
    n = block * 16 + side
    y = tl.sum(total, axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def int4_a8_linear_gemm_kernel(q_ptr, scale_x_ptr, packed_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K,
                               HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, last, groups = m.to(tl.int64), (N + 15) // 16 * 16, K // GROUP
    block, side = (n // 16).to(tl.int64), n % 16
    octets = tl.arange(0, GROUP // 8)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(groups):
        k = group * GROUP + tl.arange(0, GROUP)
        x = tl.load(q_ptr + rows[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0)
        octet = group * (GROUP // 8) + octets
        words = tl.load(packed_ptr + (block * (K // 8) * 16 + side)[None, :] + octet[:, None] * 16,
                        mask=(n < last)[None, :], other=0)  # (GROUP / 8, BLOCK_N)  # fmt: skip
        # inputs 4 h + 2 l + i of an octet are nibble 2 h + l + 4 i: three pairs, innermost i
        near = tl.join(tl.join(words, words >> 16), tl.join(words >> 4, words >> 20))
        far = tl.join(tl.join(words >> 8, words >> 24), tl.join(words >> 12, words >> 28))
        each = tl.join(near, far)  # (GROUP / 8, BLOCK_N, i, l, h)
        each = tl.reshape(tl.permute(each, (0, 4, 3, 2, 1)), (GROUP, BLOCK_N))
        sums = tl.dot(x, ((each & 15) - 8).to(tl.int8))
        scale = tl.load(scale_ptr + block * groups * 16 + group * 16 + side, mask=n < last,
                        other=0.0)  # fmt: skip
        scale_x = tl.load(scale_x_ptr + rows * groups + group, mask=m < M, other=0.0)
        total += sums.to(tl.float32) * (scale_x[:, None] * scale.to(tl.float32)[None, :])
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :]
    where = rows[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y_ptr + where, total.to(y_ptr.dtype.element_ty), mask=inside)


def int4_a8_linear(x, packed, scale, outputs, bias=None):
    """y (..., N), contiguous."""
    y, k, group = empty_output(x, outputs), x.shape[-1], group_of(packed, scale)
    rows, stride = rows_of(x, "x of int4_a8_linear")
    if not y.numel():
        return y
    q = torch.empty(rows, k, dtype=torch.int8, device=x.device)
    scale_x = torch.empty(rows, k // group, dtype=torch.float32, device=x.device)
    if k:
        block = 1024 // group  # groups of 1024 inputs
        int4_a8_linear_quantize_kernel[(rows, triton.cdiv(k // group, block))](
            x, q, scale_x, stride, k, GROUP=group, BLOCK=block, num_warps=4,
            **UNFUSED)  # fmt: skip
    given = bias if bias is not None else scale  # never read
    if rows < 16:
        int4_a8_linear_gemv_kernel[(len(packed), rows)](
            q, scale_x, packed, scale, given, y, outputs, k, HAS_BIAS=bias is not None,
            GROUP=group, OCTETS=64, num_warps=4)  # fmt: skip
    else:
        block_m = 16 if rows <= 16 else 64
        int4_a8_linear_gemm_kernel[(triton.cdiv(outputs, 64), triton.cdiv(rows, block_m))](
            q, scale_x, packed, scale, given, y, rows, outputs, k, HAS_BIAS=bias is not None,
            GROUP=group, BLOCK_M=block_m, BLOCK_N=64, num_warps=4)  # fmt: skip
    return y
