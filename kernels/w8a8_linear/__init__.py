"""Linear layer in int8: weights per output, activations quantized here, per row; sums in int32.

Source: Yao et al. 2022 (ZeroQuant, token-wise activations), https://arxiv.org/abs/2206.01861
"""

from __future__ import annotations

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.linears import allocating, empty_output, int8_checks, launch_bytes, linear_flops
from kernels.op import Op, expect, rows_of

from . import reference

NAME = "w8a8_linear"
_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT)
_expect_int8 = int8_checks(NAME)


def _check(x, weight, scale, bias=None):
    _expect_int8(x, weight, scale, bias)
    k = weight.shape[1]
    expect(k <= 131072, f"w8a8_linear adds at most 131072 products in int32, not {k}; split K")


def _fake(x, weight, scale, bias=None):
    return empty_output(x, weight.shape[0])


def into_cpu(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous."""
    rows, stride = rows_of(x, "x of w8a8_linear")
    n, k = weight.shape
    function = build.cpu_function(NAME, "w8a8_linear_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, n, k,
             torch.get_num_threads())  # fmt: skip


FEW = 64  # rows up to which impl='cuda' reads the weights once per 16 rows, outputs 8 at a time


def into_cuda(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous: quantize x, then multiply on tensor cores."""
    wgmma = build.has_wgmma(x.device.index or 0)
    launch_bytes(NAME, y, x, weight, scale, bias, FEW, wgmma)


_OP = Op(NAME, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor", check=_check,
         fake=_fake, reference=reference.w8a8_linear, cpu=allocating(into_cpu, _fake),
         cuda=allocating(into_cuda, _fake), flops=linear_flops)  # fmt: skip


def w8a8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
                bias: torch.Tensor | None = None, *,
                impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = (int8(x) weight^T) * scale_x * scale + bias, scale_x = max|x| / 127 of each row.

    x       (..., K) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight  (N, K) int8, contiguous; ``int8_linear.quantize`` makes it and scale (N,) fp32
    bias    (N,) fp32 or None
    Returns (..., N) in x's dtype; a row that holds a NaN or infinity gives NaN.
    Helps from a few rows on, where arithmetic counts: four products an instruction and lane.
    On a GPU tensor cores add in int32 too; not measured there yet.  Sums are whole: a row of a
    batch has the same bits as alone.
    Costs accuracy where a few channels of x are much larger than the others.
    """
    return _OP(x, weight, scale, bias, impl=impl)


def bytes_moved(rows: int, n: int, k: int, itemsize: int) -> int:
    """Weights, scales and x read once, y written once."""
    return n * k + 4 * n + rows * (k + n) * itemsize
