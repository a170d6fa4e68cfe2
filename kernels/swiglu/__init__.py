"""SwiGLU: y = silu(gate) * up, the activation of Llama's MLP.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference


def _check(gate, up):
    expect(gate.dtype in SUFFIX, f"swiglu takes float32, bfloat16 or float16, not {gate.dtype}; "
           "convert gate")  # fmt: skip
    expect(gate.dim() >= 1 and up.shape == gate.shape, f"swiglu needs up shaped like gate "
           f"{tuple(gate.shape)}, not {tuple(up.shape)}")  # fmt: skip
    expect(up.dtype == gate.dtype and up.device == gate.device, f"swiglu needs up and gate alike, "
           f"not {up.dtype} on {up.device} and {gate.dtype} on {gate.device}")  # fmt: skip
    rows_of(gate, "gate of swiglu")
    rows_of(up, "up of swiglu")


def _fake(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


_ARGTYPES = (POINTER, LONG, POINTER, LONG, POINTER, LONG, LONG, INT)


def into_cpu(y, gate, up) -> None:
    """Write silu(gate) * up into the contiguous y (for outputs that are allocated once)."""
    rows, gate_stride = rows_of(gate, "gate of swiglu")
    _, up_stride = rows_of(up, "up of swiglu")
    function = build.cpu_function("swiglu", "swiglu_" + SUFFIX[gate.dtype], _ARGTYPES)
    function(gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, y.data_ptr(), rows,
             gate.shape[-1], torch.get_num_threads())  # fmt: skip


def into_cuda(y, gate, up) -> None:
    """Write silu(gate) * up into the contiguous y: a block per row."""
    (rows, gate_stride), n = rows_of(gate, "gate of swiglu"), gate.shape[-1]
    _, up_stride = rows_of(up, "up of swiglu")
    kernel = build.cuda_kernel("swiglu", "swiglu_" + SUFFIX[gate.dtype], gate.device.index or 0)
    block = min(1024, max(32, -(-n // 256) * 32))
    build.launch(kernel, rows, block, gate, up, y, ctypes.c_int64(gate_stride),
                 ctypes.c_int64(up_stride), ctypes.c_int(n))  # fmt: skip


def _allocating(into):
    def implementation(gate, up):
        y = _fake(gate, up)
        if y.numel():
            into(y, gate, up)
        return y

    return implementation


_OP = Op("swiglu", "(Tensor gate, Tensor up) -> Tensor", check=_check, fake=_fake,
         reference=reference.swiglu, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda))  # fmt: skip


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """y = gate / (1 + exp(-gate)) * up, in fp32, rounded once.

    gate, up  (..., N) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced: the two
              halves of one projection (..., 2N) may be passed as they are
    impl      ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    Helps when memory-bound: two reads and a write, where eager writes silu(gate) and reads it.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(gate, up, impl=impl)


def bytes_moved(rows: int, n: int, itemsize: int) -> int:
    """gate and up read once, y written once."""
    return 3 * rows * n * itemsize


def flops(rows: int, n: int) -> int:
    """A negation, an exponential, a sum, a division and a product per element."""
    return 5 * rows * n
