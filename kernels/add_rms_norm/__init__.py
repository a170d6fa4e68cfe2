"""Residual addition and RMSNorm in one pass: total = x + residual, y = norm(total) * weight."""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import FLOAT, INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

ONE_BLOCK = 12288  # columns that impl='cuda' keeps in shared memory; longer rows are read again


def _check(x, residual, weight, eps):
    expect(x.dtype in SUFFIX, f"add_rms_norm takes float32, bfloat16 or float16, not {x.dtype}; "
           "convert x")  # fmt: skip
    expect(residual.shape == x.shape, f"add_rms_norm needs a residual shaped like x "
           f"{tuple(x.shape)}, not {tuple(residual.shape)}")  # fmt: skip
    expect(x.dim() >= 1 and weight.shape == x.shape[-1:], f"add_rms_norm of x {tuple(x.shape)} "
           f"needs a weight of shape ({x.shape[-1] if x.dim() else 1},), not "
           f"{tuple(weight.shape)}")  # fmt: skip
    for name, t in (("residual", residual), ("weight", weight)):
        expect(t.dtype == x.dtype and t.device == x.device, f"add_rms_norm needs {name} and x "
               f"alike, not {t.dtype} on {t.device} and {x.dtype} on {x.device}")  # fmt: skip
    expect(weight.is_contiguous(), "add_rms_norm needs a contiguous weight; call .contiguous()")
    rows_of(x, "x of add_rms_norm")
    rows_of(residual, "residual of add_rms_norm")


def _fake(x, residual, weight, eps):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


_ARGTYPES = (POINTER, LONG, POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, FLOAT, INT)


def into_cpu(y, total, x, residual, weight, eps) -> None:
    """Write (y, total), contiguous (for outputs that are allocated once)."""
    rows, x_stride = rows_of(x, "x of add_rms_norm")
    _, residual_stride = rows_of(residual, "residual of add_rms_norm")
    function = build.cpu_function("add_rms_norm", "add_rms_norm_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), x_stride, residual.data_ptr(), residual_stride, weight.data_ptr(),
             y.data_ptr(), total.data_ptr(), rows, x.shape[-1], eps,
             torch.get_num_threads())  # fmt: skip


def into_cuda(y, total, x, residual, weight, eps) -> None:
    """Write (y, total), contiguous: a block per row, in shared memory if it fits."""
    (rows, x_stride), n = rows_of(x, "x of add_rms_norm"), x.shape[-1]
    _, residual_stride = rows_of(residual, "residual of add_rms_norm")
    way = "" if n <= ONE_BLOCK else "long_"
    kernel = build.cuda_kernel("add_rms_norm", f"add_rms_norm_{way}{SUFFIX[x.dtype]}",
                               x.device.index or 0)  # fmt: skip
    block = min(1024, max(32, -(-n // 128) * 32))
    build.launch(kernel, rows, block, x, residual, weight, y, total, ctypes.c_int64(x_stride),
                 ctypes.c_int64(residual_stride), ctypes.c_int(n), ctypes.c_float(eps),
                 shared=0 if way else 4 * n)  # fmt: skip


def _allocating(into):
    def implementation(x, residual, weight, eps):
        y, total = _fake(x, residual, weight, eps)
        if y.numel():
            into(y, total, x, residual, weight, eps)
        return y, total

    return implementation


_OP = Op("add_rms_norm",
         "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
         check=_check, fake=_fake, reference=reference.add_rms_norm, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda))  # fmt: skip


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6,
                 *, impl: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, total): total = x + residual, y = total / sqrt(mean(total^2) + eps) * weight.

    x, residual  (..., N) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    weight       (N,) in x's dtype
    impl         ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    total is rounded to x's dtype before it is normalized.  Helps when memory-bound: two reads and
    two writes instead of three and two, and one launch.  Raises ``KernelError`` as ``rms_norm``.
    """
    return _OP(x, residual, weight, eps, impl=impl)


def bytes_moved(rows: int, n: int, itemsize: int) -> int:
    """x and residual read once, weight once, y and total written once."""
    return (4 * rows + 1) * n * itemsize


def flops(rows: int, n: int) -> int:
    """An addition, a square, a sum and two products per element."""
    return 5 * rows * n
