"""Linear layer with int8 weights, one scale per output, activations in 16 or 32 bits.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339 (row-wise scales)
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.linears import allocating, empty_output, int8_checks, linear_flops
from kernels.op import Op, rows_of

from . import reference
from .reference import quantize as quantize

NAME = "int8_linear"


def _fake(x, weight, scale, bias=None):
    return empty_output(x, weight.shape[0])


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT)


def into_cpu(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous."""
    rows, stride = rows_of(x, "x of int8_linear")
    n, k = weight.shape
    function = build.cpu_function(NAME, "int8_linear_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, n, k,
             torch.get_num_threads())  # fmt: skip


DOT = 64  # rows up to which impl='cuda' takes CUDA cores, 8 at a time; not measured yet
STEP = 64  # inputs that its tensor cores take at once: rows in 16 bits are filled up to them


def into_cuda(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous: dot products for a step, tensor cores for prompts."""
    (rows, stride), (n, k) = rows_of(x, "x of int8_linear"), weight.shape
    suffix, device = SUFFIX[x.dtype], x.device.index or 0
    pointer = ctypes.c_void_p(0) if bias is None else bias
    if rows <= DOT or not k:
        kernel = build.cuda_kernel(NAME, f"{NAME}_dot_{suffix}", device)
        build.launch(kernel, (-(-n // 4), -(-rows // 8)), 128, x, weight, scale, pointer, y,
                     ctypes.c_int64(stride), ctypes.c_int(rows), ctypes.c_int(n),
                     ctypes.c_int(k))  # fmt: skip
        return
    padded = -(-k // STEP) * STEP
    planes, dtype = (3, torch.bfloat16) if x.dtype == torch.float32 else (1, x.dtype)
    a = torch.empty(rows, planes * padded, dtype=dtype, device=x.device)
    first = build.cuda_kernel(NAME, f"{NAME}_arrange_{suffix}", device)
    build.launch(first, rows, 256, x, a, ctypes.c_int64(stride), ctypes.c_int(k),
                 ctypes.c_int(padded))  # fmt: skip
    packs = k % 16 == 0 and weight.data_ptr() % 16 == 0  # rows of weights start at 16 bytes
    kernel = build.cuda_kernel(NAME, f"{NAME}_gemm_{suffix}", device)
    build.launch(kernel, (-(-n // 128), -(-rows // 64)), 256, a, weight, scale, pointer, y,
                 ctypes.c_int(rows), ctypes.c_int(n), ctypes.c_int(k), ctypes.c_int(padded),
                 ctypes.c_int(packs))  # fmt: skip


_OP = Op(NAME, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
         check=int8_checks(NAME), fake=_fake, reference=reference.int8_linear,
         cpu=allocating(into_cpu, _fake), cuda=allocating(into_cuda, _fake),
         flops=linear_flops)  # fmt: skip


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
                bias: torch.Tensor | None = None, *,
                impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = (x weight^T) * scale + bias; products and sums as exact as fp32 accumulation gives.

    x       (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight  (N, K) int8, contiguous; ``quantize`` makes it and scale (N,) fp32
    bias    (N,) fp32 or None
    Returns (..., N) in x's dtype.  Raises ``KernelError`` for anything else.
    Helps at small batch, where the time is that of reading the weights: half the bytes of bf16.
    Does not at large batch on hardware whose int8 units it leaves idle: see ``w8a8_linear``.
    On a GPU from 65 rows on tensor cores take them, in bf16 or fp16, fp32 as three numbers in bf16.
    Not measured there yet.
    A row of a batch has the same bits as alone, on a CPU, but see below.  There, with VNNI or with
    AVX2, a row in bf16 is taken as whole numbers of 16 bits, relative to its largest, unless that
    is 32 times the root of the mean square or not finite: then in fp32.  With AVX2 alone a row in
    fp32 or fp16 of fewer than 32 is taken as whole numbers of 30 bits, whose products are added up
    exactly; from 32 rows on fused multiply-adds in fp32 are faster, in another order of sums, and
    a row may differ from one alone by their rounding.
    """
    return _OP(x, weight, scale, bias, impl=impl)


def bytes_moved(rows: int, n: int, k: int, itemsize: int) -> int:
    """Weights, scales and x read once, y written once."""
    return n * k + 4 * n + rows * (k + n) * itemsize
