"""Bias and GELU in one pass: y = gelu(x + bias), by the erf as in BERT or in GPT-2's tanh form.

Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415
"""

from __future__ import annotations

import ctypes

import torch

from kernels import build
from kernels.build import INT, LONG, POINTER, SUFFIX
from kernels.op import Op, expect, rows_of

from . import reference

FORMS = {"none": "", "tanh": "tanh_"}  # approximate -> its part of a kernel's name


def _check(x, bias, approximate):
    expect(approximate in FORMS, f"gelu_bias knows approximate='none' and 'tanh', not "
           f"{approximate!r}")  # fmt: skip
    expect(x.dtype in SUFFIX, f"gelu_bias takes float32, bfloat16 or float16, not {x.dtype}; "
           "convert x")  # fmt: skip
    expect(x.dim() >= 1 and bias.shape == x.shape[-1:], f"gelu_bias of x {tuple(x.shape)} needs "
           f"a bias of shape ({x.shape[-1] if x.dim() else 1},), not "
           f"{tuple(bias.shape)}")  # fmt: skip
    expect(bias.dtype == x.dtype and bias.device == x.device, f"gelu_bias needs bias and x alike, "
           f"not {bias.dtype} on {bias.device} and {x.dtype} on {x.device}")  # fmt: skip
    expect(bias.is_contiguous(), "gelu_bias needs a contiguous bias; call .contiguous() on it")
    rows_of(x, "x of gelu_bias")


def _fake(x, bias, approximate):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGTYPES = (POINTER, LONG, POINTER, POINTER, LONG, LONG, INT)


def into_cpu(y, x, bias, approximate) -> None:
    """Write gelu(x + bias) into the contiguous y (for outputs that are allocated once)."""
    rows, stride = rows_of(x, "x of gelu_bias")
    symbol = f"gelu_bias_{FORMS[approximate]}{SUFFIX[x.dtype]}"
    function = build.cpu_function("gelu_bias", symbol, _ARGTYPES)
    function(x.data_ptr(), stride, bias.data_ptr(), y.data_ptr(), rows, x.shape[-1],
             torch.get_num_threads())  # fmt: skip


def into_cuda(y, x, bias, approximate) -> None:
    """Write gelu(x + bias) into the contiguous y: a block per row."""
    (rows, stride), n = rows_of(x, "x of gelu_bias"), x.shape[-1]
    symbol = f"gelu_bias_{FORMS[approximate]}{SUFFIX[x.dtype]}"
    kernel = build.cuda_kernel("gelu_bias", symbol, x.device.index or 0)
    block = min(1024, max(32, -(-n // 256) * 32))
    build.launch(kernel, rows, block, x, bias, y, ctypes.c_int64(stride), ctypes.c_int(n))


def _allocating(into):
    def implementation(x, bias, approximate):
        y = _fake(x, bias, approximate)
        if y.numel():
            into(y, x, bias, approximate)
        return y

    return implementation


_OP = Op("gelu_bias", "(Tensor x, Tensor bias, str approximate) -> Tensor", check=_check,
         fake=_fake, reference=reference.gelu_bias, cpu=_allocating(into_cpu),
         cuda=_allocating(into_cuda))  # fmt: skip


def gelu_bias(x: torch.Tensor, bias: torch.Tensor, approximate: str = "none", *,
              impl: str | None = None) -> torch.Tensor:  # fmt: skip
    """y = z Phi(z), Phi(z) = (1 + erf(z / sqrt 2)) / 2, z = x + bias, in fp32, rounded once.

    x            (..., N) fp32, bf16 or fp16; the last dimension dense, rows evenly spaced
    bias         (N,) in x's dtype
    approximate  as torch's: "none" is the above, "tanh" is z / (1 + exp(-2u)) with u = sqrt(2/pi)
                 (z + 0.044715 z^3), the same function as 0.5 z (1 + tanh u)
    impl         ``reference``, ``cpu``, ``triton``, ``cuda``; None takes the fastest there is
    In C++ nothing cancels for negative z: on a CPU the error by the erf is at most (12 + z^2 / 2)
    2^-24 of y (CUDA: 12 + 2 z^2), where 1 + erf has lost all of y at -5.5.
    Helps when memory-bound: a read and a write, where eager makes two of each.
    Raises ``KernelError`` for other shapes, dtypes, strides, devices, and a missing compiler.
    """
    return _OP(x, bias, approximate, impl=impl)


def bytes_moved(rows: int, n: int, itemsize: int) -> int:
    """x read once, bias once, y written once."""
    return (2 * rows + 1) * n * itemsize


def flops(rows: int, n: int) -> int:
    """The tanh form's: an addition, five for 2u, an exponential, a sum, a division."""
    return 9 * rows * n
