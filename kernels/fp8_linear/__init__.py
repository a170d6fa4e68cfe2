"""Linear layer in 8-bit floats: e4m3 weights with a scale per output, activations quantized here.

Source: Micikevicius et al. 2022 (the format), https://arxiv.org/abs/2209.05433; a scale a row of
both, as ``torch._scaled_mm`` has them.
"""

from __future__ import annotations

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.linears import allocating, empty_output, fp8_checks, launch_bytes, linear_flops
from kernels.op import Op, expect, rows_of

from . import reference
from .reference import quantize as quantize

NAME = "fp8_linear"
EMULATED = ("reference", "cpu")  # no CPU multiplies e4m3: these widen it, and are labelled so
_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT)


def _fake(x, weight, scale, bias=None):
    return empty_output(x, weight.shape[0])


def into_cpu(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous.  Emulated: e4m3 is widened to bf16, or to fp32."""
    rows, stride = rows_of(x, f"x of {NAME}")
    n, k = weight.shape
    function = build.cpu_function(NAME, f"{NAME}_emulated_{SUFFIX[x.dtype]}", _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, n, k,
             torch.get_num_threads())  # fmt: skip


FEW = 64  # rows up to which impl='cuda' reads the weights once per 16 rows, outputs 8 at a time


def expect_sm89(device: torch.device) -> None:
    """Refuse a GPU whose tensor cores do not take e4m3."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        expect((major, minor) >= (8, 9), f"{NAME} needs sm89 for fp8; this is sm{major}{minor}; "
               "take impl='reference', which emulates it")  # fmt: skip


def into_cuda(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous: quantize x, then multiply on tensor cores."""
    expect_sm89(x.device)
    # tensor cores keep some 13 bits of sums of e4m3, which shows in outputs of fp32
    wgmma = x.dtype != torch.float32 and build.has_wgmma(x.device.index or 0)
    launch_bytes(NAME, y, x, weight, scale, bias, FEW, wgmma)


_OP = Op(NAME, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
         check=fp8_checks(NAME), fake=_fake, reference=reference.fp8_linear,
         cpu=allocating(into_cpu, _fake), cuda=allocating(into_cuda, _fake),
         flops=linear_flops)  # fmt: skip


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
               bias: torch.Tensor | None = None, *,
               impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = (e4m3(x) weight^T) * scale_x * scale + bias, scale_x = max|x| / 448 of each row.

    x       (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight  (N, K) torch.float8_e4m3fn, contiguous; ``quantize`` makes it and scale (N,) fp32
    bias    (N,) fp32 or None
    impl    ``reference`` and ``cpu``, both emulated: no CPU multiplies e4m3; ``triton`` and
            ``cuda`` on tensor cores, from sm_89 on; None takes the fastest there is
    Returns (..., N) in x's dtype; a row that holds a NaN or infinity gives NaN.
    Helps on a GPU at large batch, where e4m3 runs at twice the rate of bf16, and at small batch
    everywhere, where the time is that of reading half the bytes; emulated it cannot help else.
    On a CPU without AVX-512 eight rows or more are summed in another order than fewer, for speed:
    a row of so large a batch may differ from one alone by the rounding of fp32 sums.
    Costs accuracy: a rounding of e4m3 is 2^-4 of the number.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, weight, scale, bias, impl=impl)


def bytes_moved(rows: int, n: int, k: int, itemsize: int) -> int:
    """Weights, scales and x read once, y written once."""
    return n * k + 4 * n + rows * (k + n) * itemsize
