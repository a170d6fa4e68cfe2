"""Softmax over the last dimension: y = exp(x - max x) / sum exp(x - max x).

Source: Milakov and Gimelshein 2018 (passes over memory), https://arxiv.org/abs/1805.02867
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

ONE_BLOCK = 12288  # columns that impl='cuda' keeps in shared memory; longer rows are read again


def _check(x):
    expect(x.dtype in SUFFIX, f"softmax takes float32, bfloat16 or float16, not {x.dtype}; "
           "convert x")  # fmt: skip
    expect(x.dim() >= 1, "softmax needs x (..., N), not a single number; call .reshape(1) on it")
    rows_of(x, "x of softmax")


def _fake(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGTYPES = (POINTER, LONG, POINTER, LONG, LONG, INT)


def into_cpu(y, x) -> None:
    """Write the softmax of x into the contiguous y (for outputs that are allocated once)."""
    rows, stride = rows_of(x, "x of softmax")
    function = build.cpu_function("softmax", "softmax_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, y.data_ptr(), rows, x.shape[-1], torch.get_num_threads())


def into_cuda(y, x) -> None:
    """Write the softmax of x into the contiguous y: a block per row, on chip if it fits."""
    (rows, stride), n = rows_of(x, "x of softmax"), x.shape[-1]
    way = "" if n <= ONE_BLOCK else "long_"
    kernel = build.cuda_kernel("softmax", f"softmax_{way}{SUFFIX[x.dtype]}", x.device.index or 0)
    block = min(1024, max(32, -(-n // 128) * 32))
    build.launch(kernel, rows, block, x, y, ctypes.c_int64(stride), ctypes.c_int(n),
                 shared=0 if way else 4 * n)  # fmt: skip


def _allocating(into):
    def implementation(x):
        y = _fake(x)
        if y.numel():
            into(y, x)
        return y

    return implementation


_OP = Op("softmax", "(Tensor x) -> Tensor", check=_check, fake=_fake, reference=reference.softmax,
         cpu=_allocating(into_cpu), cuda=_allocating(into_cuda))  # fmt: skip


def softmax(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """y = exp(x - max x) / sum exp(x - max x) over the last dimension, in fp32, rounded once.

    x     (..., N) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    impl  ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    A row with a NaN or +infinity, or of -infinity alone, gives NaN, as torch does.
    Helps where the row is read once and stays on chip; a row beyond the caches is read twice.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, impl=impl)


def bytes_moved(rows: int, n: int, itemsize: int) -> int:
    """x read once, y written once."""
    return 2 * rows * n * itemsize


def flops(rows: int, n: int) -> int:
    """A comparison, a subtraction, an exponential, a sum and a product per element."""
    return 5 * rows * n
