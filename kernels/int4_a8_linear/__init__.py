"""Linear layer of int4 weights and int8 activations, both scaled per group; sums in int32.

Source: Zhao et al. 2024 (Atom, grouped 4-bit weights and low-bit activations),
https://arxiv.org/abs/2310.19102
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import SUFFIX
from kernels.int4_linear import ARGTYPES, SCHEMA
from kernels.linears import (
    allocating,
    empty_output,
    expect_aligned,
    group_of,
    int4_checks,
    linear_flops,
)
from kernels.op import Op, rows_of

from . import reference

NAME = "int4_a8_linear"


def _fake(x, packed, scale, outputs, bias=None):
    return empty_output(x, outputs)


def into_cpu(y, x, packed, scale, outputs, bias=None) -> None:
    """Write y (..., N), contiguous."""
    rows, stride = rows_of(x, "x of int4_a8_linear")
    function = build.cpu_function(NAME, "int4_a8_linear_" + SUFFIX[x.dtype], ARGTYPES)
    function(x.data_ptr(), stride, packed.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, outputs, x.shape[-1],
             group_of(packed, scale), torch.get_num_threads())  # fmt: skip


FEW = 64  # rows up to which impl='cuda' reads the weights once per 16 rows, outputs 32 at a time


def into_cuda(y, x, packed, scale, outputs, bias=None) -> None:
    """Write y (..., N), contiguous: quantize x, then multiply on tensor cores."""
    expect_aligned(NAME, packed=packed, scale=scale)
    (rows, stride), k, group = rows_of(x, f"x of {NAME}"), x.shape[-1], group_of(packed, scale)
    padded = -(-rows // 64) * 64  # a tile of the larger kernel copies 64 rows' scales
    q = torch.empty(rows, k, dtype=torch.int8, device=x.device)
    scale_x = torch.empty(k // group, padded, dtype=torch.float32, device=x.device)
    suffix, device = SUFFIX[x.dtype], x.device.index or 0
    if k:
        first = build.cuda_kernel(NAME, f"{NAME}_quantize_{suffix}", device)
        build.launch(first, (rows, -(-(k // group) // 4)), 128, x, q, scale_x,
                     ctypes.c_int64(stride), ctypes.c_int(k), ctypes.c_int(group),
                     ctypes.c_int(padded))  # fmt: skip
    few = rows <= FEW
    kernel = build.cuda_kernel(NAME, f"{NAME}_{'few' if few else 'gemm'}_{suffix}", device)
    grid = (-(-outputs // 32), -(-rows // 16)) if few else (-(-outputs // 128), -(-rows // 64))
    build.launch(kernel, grid, 256, q, scale_x, packed, scale,
                 ctypes.c_void_p(0) if bias is None else bias, y, ctypes.c_int(rows),
                 ctypes.c_int(padded), ctypes.c_int(outputs), ctypes.c_int(k),
                 ctypes.c_int(group))  # fmt: skip


_OP = Op(NAME, SCHEMA, check=int4_checks(NAME), fake=_fake, reference=reference.int4_a8_linear,
         cpu=allocating(into_cpu, _fake), cuda=allocating(into_cuda, _fake),
         flops=linear_flops)  # fmt: skip


def int4_a8_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, outputs: int,
                   bias: torch.Tensor | None = None, *,
                   impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = sum over groups of (q . int8(x)) * scale_x * scale, + bias; scale_x = max|x| / 127.

    x        (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    packed, scale, outputs, bias  as for ``int4_linear``
    Returns (..., N) in x's dtype; a row that holds a NaN or infinity gives NaN.
    Helps wherever arithmetic counts, from a single row on where widening weights to floats takes
    longer than reading them: a cache line of weights takes 5 instructions here, 23 with fp32.
    What it reaches of a plain read of the weights, and of torch's and oneDNN's products, is in
    reports/findings/quantization.md.
    On a GPU tensor cores add a group in int32 and three operations scale its sum: with groups of
    128 a quarter as many as with 32.  Not measured there yet.
    A group's own scale keeps a large channel of x from costing the accuracy of other groups.
    """
    return _OP(x, packed, scale, outputs, bias, impl=impl)
