"""Linear layer with int8 weights, one scale per output, activations in 16 or 32 bits.

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339 (row-wise scales)
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference
from .reference import quantize as quantize

NAME = "int8_linear"


def _check(x, weight, scale, bias=None):
    expect(x.dtype in SUFFIX, f"int8_linear takes x in float32, bfloat16 or float16, not {x.dtype}")
    expect(weight.dim() == 2 and weight.dtype == torch.int8, "int8_linear needs an int8 weight "
           f"(N, K), not {weight.dtype} {tuple(weight.shape)}; see quantize")  # fmt: skip
    n, k = weight.shape
    expect(x.dim() >= 1 and x.shape[-1] == k, f"int8_linear of a weight {(n, k)} needs x (..., "
           f"{k}), not {tuple(x.shape)}")  # fmt: skip
    for name, t in (("scale", scale), ("bias", bias)):
        if t is not None:
            expect(t.shape == (n,) and t.dtype == torch.float32 and t.is_contiguous(),
                   f"int8_linear needs a contiguous float32 {name} of shape ({n},), not {t.dtype} "
                   f"{tuple(t.shape)}")  # fmt: skip
            expect(t.device == x.device, f"int8_linear needs {name} on {x.device}, not {t.device}")
    expect(weight.is_contiguous(), "int8_linear needs a contiguous weight; call .contiguous()")
    expect(weight.device == x.device, f"int8_linear needs weight on {x.device}, not "
           f"{weight.device}")  # fmt: skip
    rows_of(x, "x of int8_linear")


def _fake(x, weight, scale, bias=None):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, INT)


def into_cpu(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous."""
    rows, stride = rows_of(x, "x of int8_linear")
    n, k = weight.shape
    function = build.cpu_function(NAME, "int8_linear_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), scale.data_ptr(),
             None if bias is None else bias.data_ptr(), y.data_ptr(), rows, n, k,
             torch.get_num_threads())  # fmt: skip


def into_cuda(y, x, weight, scale, bias=None) -> None:
    """Write y (..., N), contiguous: a warp per output, up to 8 rows of x at a time."""
    (rows, stride), (n, k) = rows_of(x, "x of int8_linear"), weight.shape
    kernel = build.cuda_kernel(NAME, "int8_linear_" + SUFFIX[x.dtype], x.device.index or 0)
    pointer = ctypes.c_void_p(0) if bias is None else bias
    build.launch(kernel, (-(-n // 4), -(-rows // 8)), 128, x, weight, scale, pointer, y,
                 ctypes.c_int64(stride), ctypes.c_int(rows), ctypes.c_int(n),
                 ctypes.c_int(k))  # fmt: skip


def _allocating(into):
    def implementation(x, weight, scale, bias=None):
        y = _fake(x, weight, scale)
        if y.numel():
            into(y, x, weight, scale, bias)
        return y

    return implementation


def _flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * weight_shape[0] * weight_shape[1]


_OP = Op(NAME, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor", check=_check,
         fake=_fake, reference=reference.int8_linear, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda), flops=_flops)  # fmt: skip


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
    A row of a batch has the same bits as alone.
    """
    return _OP(x, weight, scale, bias, impl=impl)


def bytes_moved(rows: int, n: int, k: int, itemsize: int) -> int:
    """Weights, scales and x read once, y written once."""
    return n * k + 4 * n + rows * (k + n) * itemsize
