"""LayerNorm: y = (x - mean x) / sqrt(var x + eps) * weight + bias.

Source: Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import FLOAT, INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

ONE_BLOCK = 12288  # columns that impl='cuda' keeps in shared memory; longer rows are read again


def _check(x, weight, bias, eps):
    expect(x.dtype in SUFFIX, f"layer_norm takes float32, bfloat16 or float16, not {x.dtype}; "
           "convert x")  # fmt: skip
    for name, t in (("weight", weight), ("bias", bias)):
        expect(x.dim() >= 1 and t.shape == x.shape[-1:], f"layer_norm of x {tuple(x.shape)} needs "
               f"a {name} of shape ({x.shape[-1] if x.dim() else 1},), not "
               f"{tuple(t.shape)}")  # fmt: skip
        expect(t.dtype == x.dtype and t.device == x.device, f"layer_norm needs {name} and x "
               f"alike, not {t.dtype} on {t.device} and {x.dtype} on {x.device}")  # fmt: skip
        expect(t.is_contiguous(), f"layer_norm needs a contiguous {name}; call .contiguous()")
    rows_of(x, "x of layer_norm")


def _fake(x, weight, bias, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, FLOAT, INT)


def into_cpu(y, x, weight, bias, eps) -> None:
    """Write the norm of x into the contiguous y (for outputs that are allocated once)."""
    rows, stride = rows_of(x, "x of layer_norm")
    function = build.cpu_function("layer_norm", "layer_norm_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), bias.data_ptr(), y.data_ptr(), rows,
             x.shape[-1], eps, torch.get_num_threads())  # fmt: skip


def into_cuda(y, x, weight, bias, eps) -> None:
    """Write the norm of x into the contiguous y: a block per row, in shared memory if it fits."""
    (rows, stride), n = rows_of(x, "x of layer_norm"), x.shape[-1]
    way = "" if n <= ONE_BLOCK else "long_"
    kernel = build.cuda_kernel(
        "layer_norm", f"layer_norm_{way}{SUFFIX[x.dtype]}", x.device.index or 0
    )
    block = min(1024, max(32, -(-n // 128) * 32))
    build.launch(kernel, rows, block, x, weight, bias, y, ctypes.c_int64(stride), ctypes.c_int(n),
                 ctypes.c_float(eps), shared=0 if way else 4 * n)  # fmt: skip


def _allocating(into):
    def implementation(x, weight, bias, eps):
        y = _fake(x, weight, bias, eps)
        if y.numel():
            into(y, x, weight, bias, eps)
        return y

    return implementation


_OP = Op("layer_norm", "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", check=_check,
         fake=_fake, reference=reference.layer_norm, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda))  # fmt: skip


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5, *,
               impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = (x - mean x) / sqrt(var x + eps) * weight + bias over the last dimension, in fp32.

    x             (..., N) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight, bias  (N,) in x's dtype
    impl          ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    The variance is that of the differences from the mean: no cancellation, whatever the mean.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, weight, bias, eps, impl=impl)


def bytes_moved(rows: int, n: int, itemsize: int) -> int:
    """x read once, weight and bias once, y written once."""
    return 2 * (rows + 1) * n * itemsize


def flops(rows: int, n: int) -> int:
    """A sum, a difference, a square, a sum, two products and an addition per element."""
    return 7 * rows * n
