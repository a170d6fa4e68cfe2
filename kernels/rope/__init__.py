"""Rotary position embedding: pairs (x_i, x_{i + D/2}) turned by an angle per position.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864 (pairing of halves as Llama's)
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference


def _check(x, cos, sin):
    expect(x.dtype in SUFFIX, f"rope takes float32, bfloat16 or float16, not {x.dtype}; convert x")
    expect(x.dim() == 4 and x.shape[-1] % 2 == 0, "rope needs x (B, T, H, D) with an even D, not "
           f"{tuple(x.shape)}")  # fmt: skip
    table = (x.shape[1], x.shape[3] // 2)
    for name, t in (("cos", cos), ("sin", sin)):
        expect(t.shape == table and t.dtype == torch.float32 and t.is_contiguous(), f"rope of x "
               f"{tuple(x.shape)} needs a contiguous float32 {name} of shape {table}, not "
               f"{t.dtype} {tuple(t.shape)}")  # fmt: skip
        expect(t.device == x.device, f"rope needs {name} on {x.device}, not {t.device}")
    rows_of(x, "x of rope")


def _fake(x, cos, sin):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, POINTER, LONG, LONG, LONG, LONG, INT)


def into_cpu(y, x, cos, sin) -> None:
    """Write the turned x into the contiguous y (for outputs that are allocated once)."""
    (_, stride), (batch, length, heads, width) = rows_of(x, "x of rope"), x.shape
    function = build.cpu_function("rope", "rope_" + SUFFIX[x.dtype], _ARGTYPES)
    function(x.data_ptr(), stride, cos.data_ptr(), sin.data_ptr(), y.data_ptr(), batch * length,
             length, heads, width // 2, torch.get_num_threads())  # fmt: skip


def into_cuda(y, x, cos, sin) -> None:
    """Write the turned x into the contiguous y: a block per token."""
    (_, stride), (batch, length, heads, width) = rows_of(x, "x of rope"), x.shape
    kernel = build.cuda_kernel("rope", "rope_" + SUFFIX[x.dtype], x.device.index or 0)
    block = min(1024, max(32, -(-heads * width // 512) * 32))
    build.launch(kernel, batch * length, block, x, cos, sin, y, ctypes.c_int64(stride),
                 ctypes.c_int(length), ctypes.c_int(heads), ctypes.c_int(width // 2))  # fmt: skip


def _allocating(into):
    def implementation(x, cos, sin):
        y = _fake(x, cos, sin)
        if y.numel():
            into(y, x, cos, sin)
        return y

    return implementation


_OP = Op("rope", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", check=_check, fake=_fake,
         reference=reference.rope, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda))  # fmt: skip


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *,
         impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y_i = x_i cos_i - x_{i+D/2} sin_i, y_{i+D/2} = x_{i+D/2} cos_i + x_i sin_i, in fp32.

    x         (B, T, H, D) fp32, bf16 or fp16; D even and dense, heads evenly spaced
    cos, sin  (T, D/2) fp32: of the angles at each position, one half of transformers' tables
    impl      ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    Helps when memory-bound: a read and a write, where eager also writes the halves swapped.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, cos, sin, impl=impl)


def bytes_moved(batch: int, length: int, heads: int, width: int, itemsize: int) -> int:
    """x read once, y written once, the tables once."""
    return 2 * batch * length * heads * width * itemsize + 4 * length * width


def flops(batch: int, length: int, heads: int, width: int) -> int:
    """Two products and a sum per element."""
    return 3 * batch * length * heads * width
