"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.

Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import FLOAT, INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

ONE_BLOCK = 12288  # columns that impl='cuda' keeps in shared memory; longer rows are read again


def _check(x, weight, eps):
    expect(x.dtype in SUFFIX, f"rms_norm takes float32, bfloat16 or float16, not {x.dtype}; "
           "convert x")  # fmt: skip
    expect(x.dim() >= 1 and weight.shape == x.shape[-1:], f"rms_norm of x {tuple(x.shape)} needs a "
           f"weight of shape ({x.shape[-1] if x.dim() else 1},), not "
           f"{tuple(weight.shape)}")  # fmt: skip
    expect(weight.dtype == x.dtype and weight.device == x.device, f"rms_norm needs weight and x "
           f"alike, not {weight.dtype} on {weight.device} and {x.dtype} on {x.device}")  # fmt: skip
    expect(weight.is_contiguous(), "rms_norm needs a contiguous weight; call .contiguous() on it")
    rows_of(x, "x of rms_norm")


def _fake(x, weight, eps):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, LONG, LONG, FLOAT, INT)


def into_cpu(y, x, weight, eps) -> None:
    """Write the norm of x into the contiguous y (for outputs that are allocated once)."""
    rows, stride = rows_of(x, "x of rms_norm")
    function = build.cpu_function("rms_norm", "rms_norm_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, weight.data_ptr(), y.data_ptr(), rows, x.shape[-1], eps,
             torch.get_num_threads())  # fmt: skip


def into_cuda(y, x, weight, eps) -> None:
    """Write the norm of x into the contiguous y: a block per row, in shared memory if it fits."""
    (rows, stride), n = rows_of(x, "x of rms_norm"), x.shape[-1]
    way = "" if n <= ONE_BLOCK else "long_"
    kernel = build.cuda_kernel("rms_norm", f"rms_norm_{way}{SUFFIX[x.dtype]}", x.device.index or 0)
    block = min(1024, max(32, -(-n // 128) * 32))
    build.launch(kernel, rows, block, x, weight, y, ctypes.c_int64(stride), ctypes.c_int(n),
                 ctypes.c_float(eps), shared=0 if way else 4 * n)  # fmt: skip


def _allocating(into):
    def implementation(x, weight, eps):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if y.numel():
            into(y, x, weight, eps)
        return y

    return implementation


_OP = Op("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", check=_check, fake=_fake,
         reference=reference.rms_norm, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda))  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *,
             impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32, rounded once.

    x       (..., N) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight  (N,) in x's dtype
    impl    ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, weight, eps, impl=impl)


def bytes_moved(rows: int, n: int, itemsize: int) -> int:
    """x read once, weight once, y written once."""
    return (2 * rows + 1) * n * itemsize


def flops(rows: int, n: int) -> int:
    """A square, a sum and two products per element."""
    return 4 * rows * n
