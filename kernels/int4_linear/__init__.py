"""Linear layer with weights of four bits, a scale per group of inputs, activations in 16 or 32.

Source: Frantar et al. 2024 (Marlin, weights stored in the order a kernel reads them),
https://arxiv.org/abs/2408.11743
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
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
from .reference import dequantize as dequantize
from .reference import quantize as quantize

NAME = "int4_linear"
SCHEMA = "(Tensor x, Tensor packed, Tensor scale, int outputs, Tensor? bias=None) -> Tensor"
ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, LONG, INT)


def _fake(x, packed, scale, outputs, bias=None):
    return empty_output(x, outputs)


def into_cpu(y, x, packed, scale, outputs, bias=None) -> None:
    """Write y (..., N), contiguous."""
    rows, stride = rows_of(x, "x of int4_linear")
    function = build.cpu_function(NAME, "int4_linear_" + SUFFIX[x.dtype], ARGTYPES)
    function(x.data_ptr(), stride, packed.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, outputs, x.shape[-1],
             group_of(packed, scale), torch.get_num_threads())  # fmt: skip


DOT = 8  # rows up to which impl='cuda' takes CUDA cores: a row has the same bits in all of them
FEW = 64  # and up to which tensor cores read the weights once per 16 rows, outputs 32 at a time


def into_cuda(y, x, packed, scale, outputs, bias=None) -> None:
    """Write y (..., N), contiguous: dot products for a step, tensor cores for more rows."""
    expect_aligned(NAME, packed=packed, scale=scale)
    (rows, stride), k = rows_of(x, "x of int4_linear"), x.shape[-1]
    if rows > DOT and k:
        x, stride = _arranged(x, rows, stride)
    if rows <= DOT:
        way, grid, block = "dot", (len(packed), -(-rows // 4)), 128
    elif rows <= FEW:
        way, grid, block = "few", (-(-outputs // 32), -(-rows // 16)), 256
    else:
        way, grid, block = "gemm", (-(-outputs // 128), -(-rows // 64)), 256
    kernel = build.cuda_kernel(NAME, f"{NAME}_{way}_{SUFFIX[y.dtype]}", x.device.index or 0)
    pointer = ctypes.c_void_p(0) if bias is None else bias
    build.launch(kernel, grid, block, x, packed, scale, pointer, y, ctypes.c_int64(stride),
                 ctypes.c_int(rows), ctypes.c_int(outputs), ctypes.c_int(k),
                 ctypes.c_int(group_of(packed, scale)))  # fmt: skip


def _arranged(x, rows: int, stride: int) -> tuple[torch.Tensor, int]:
    """x in 16 bits and its stride, rows at multiples of 16 bytes; fp32 as three bf16 in a row."""
    if x.dtype != torch.float32 and stride % 8 == 0 and x.data_ptr() % 16 == 0:
        return x, stride
    planes, dtype = (3, torch.bfloat16) if x.dtype == torch.float32 else (1, x.dtype)
    a = torch.empty(rows, planes * x.shape[-1], dtype=dtype, device=x.device)
    kernel = build.cuda_kernel(NAME, f"{NAME}_arrange_{SUFFIX[x.dtype]}", x.device.index or 0)
    build.launch(kernel, rows, 256, x, a, ctypes.c_int64(stride),
                 ctypes.c_int(x.shape[-1]))  # fmt: skip
    return a, a.shape[1]


_OP = Op(NAME, SCHEMA, check=int4_checks(NAME), fake=_fake, reference=reference.int4_linear,
         cpu=allocating(into_cpu, _fake), cuda=allocating(into_cuda, _fake),
         flops=linear_flops)  # fmt: skip


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, outputs: int,
                bias: torch.Tensor | None = None, *,
                impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = x (scale * q)^T + bias, as exact as fp32 accumulation gives.

    x        (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    packed   (ceil(N / 16), K / 8, 16) int32: ``quantize`` makes it and
    scale    (ceil(N / 16), K / group, 16) bf16, a group of 32 or 128 inputs
    outputs  N
    bias     (N,) fp32 or None
    Returns (..., N) in x's dtype.  Raises ``KernelError`` for anything else.
    Helps at small batch, where the time is that of reading the weights: 4.5 bits each with groups
    of 32, 4.125 with 128.  Does not at large batch, where widening costs and nothing is saved:
    see ``int4_a8_linear``.
    What it reaches of a plain read of the weights, and of torch's and oneDNN's products, is in
    reports/findings/quantization.md.
    On a GPU up to 8 rows are dot products; from 9 on tensor cores take them, in bf16 or fp16, fp32
    as three numbers in bf16.  Not measured there yet.
    A row of a batch has the same bits as alone, on a CPU, but with AVX2 alone for rows in fp32 and
    fp16 from 16 on, which are multiplied in fp32, faster there and in another order of sums.  With
    VNNI or AVX2 x is otherwise taken as whole numbers, a scale per row and group: 24 bits of fp32
    and fp16, 16 of bf16, relative to a group's largest; a row with NaN or infinity, or below 1e-18,
    is multiplied in fp32.
    """
    return _OP(x, packed, scale, outputs, bias, impl=impl)


def bytes_moved(rows: int, n: int, k: int, itemsize: int, group: int = 32) -> int:
    """Weights, scales and x read once, y written once."""
    return n * k // 2 + 2 * n * (k // group) + rows * (k + n) * itemsize
