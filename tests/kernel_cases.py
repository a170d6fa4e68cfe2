"""What the kernel tests run: per operation its inputs, its shapes and what it must refuse."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """How one operation is tested.

    make            ``make(shape, dtype) -> args``, seeded by the shape
    shapes          small and odd; the first has several rows
    large           a shape at which threads share the work
    row_args        arguments whose first dimension is that of the outputs
    row_stable      a row's result has the same bits whatever stands in the other rows
    short_argument  the tensor argument that a bounds test shortens
    mma             the opcode that matrix kernels must have, per architecture
    """

    op: str
    make: Callable
    shapes: list[tuple[int, ...]]
    large: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    row_args: tuple[int, ...] = (0,)
    row_stable: bool = True
    short_argument: int = 1
    mma: dict[str, str] = field(default_factory=dict)
    uses: str = "__syncthreads"
    shim_shapes: tuple = ((1, 64), (3, 301))

    def reference(self, *args):
        """The operation in the precision of its inputs."""
        module = importlib.import_module(f"kernels.{self.op}.reference")
        return getattr(module, self.op)(*args)

    def exact(self, *args):
        """The same in fp64 on the same numbers."""
        return self.reference(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point()
                                else a for a in args))  # fmt: skip

    def fits_shim(self, shape) -> bool:
        """Small enough for a thread of the operating system per CUDA thread."""
        total = 1
        for n in shape:
            total *= n
        return total <= 20000


def seeded(shape) -> torch.Generator:
    return torch.Generator().manual_seed(hash(tuple(shape)) % 2**31)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded((*shape, seed))).to(dtype)


# odd, a power of two, one column, one row, no row, no column, longer than any one block
ROWS = [(5, 123), (3, 2, 64), (4, 1), (1, 384), (0, 7), (2, 0), (2, 4097), (2, 20000)]


def _rms_norm(shape, dtype):
    return [random(*shape, dtype=dtype), 1 + 0.1 * random(shape[-1], dtype=dtype), 1e-6]


def _add_rms_norm(shape, dtype):
    x, weight, eps = _rms_norm(shape, dtype)
    return [x, random(*shape, seed=1, dtype=dtype), weight, eps]


# rows, outputs, inputs: odd everywhere, one of each, none of each, more rows than any tile
LINEAR = [(5, 19, 97), (1, 64, 128), (3, 1, 130), (2, 3, 1), (0, 4, 8), (2, 0, 8), (3, 5, 0),
          (67, 33, 70)]  # fmt: skip


def _int8_linear(shape, dtype):
    from kernels.int8_linear import quantize

    m, n, k = shape
    if k == 0:
        weight, scale = torch.empty(n, 0, dtype=torch.int8), torch.ones(n)
    else:
        weight, scale = quantize(random(n, k))
    return [random(m, k, seed=2, dtype=dtype), weight, scale, random(n, seed=3)]


CASES = {
    case.op: case
    for case in [
        Case("rms_norm", _rms_norm, ROWS, large=(300, 1111)),
        Case(
            "add_rms_norm",
            _add_rms_norm,
            ROWS[:-1],
            large=(300, 1111),
            row_args=(0, 1),
            short_argument=2,
        ),
        Case(
            "int8_linear",
            _int8_linear,
            LINEAR,
            large=(6, 700, 130),
            shim_shapes=((3, 5, 70),),
            mma={"sm_80": "HMMA", "sm_90a": "HGMMA"},
            uses="",
        ),
        Case("w8a8_linear", _int8_linear, LINEAR, large=(6, 700, 130)),
    ]
}
for _name in CASES:
    importlib.import_module(f"kernels.{_name}")


def _bad(op, name, sentence, args):
    return pytest.param(op, args, sentence, id=f"{op}-{name}")


r = random
BAD = [
    _bad("rms_norm", "dtype", "not torch.float64; convert x",
         lambda: (r(2, 4).double(), r(4).double(), 1e-6)),
    _bad("rms_norm", "weight", r"needs a weight of shape \(4,\), not \(5,\)",
         lambda: (r(2, 4), r(5), 1e-6)),
    _bad("rms_norm", "mixed", "needs weight and x alike", lambda: (r(2, 4), r(4).half(), 1e-6)),
    _bad("rms_norm", "transposed", r"stride 1, not 4; call .contiguous\(\)",
         lambda: (r(3, 4).T, r(3), 1e-6)),
    _bad("rms_norm", "uneven", "evenly spaced rows",
         lambda: (r(4, 3, 8)[:, :2], r(8), 1e-6)),
    _bad("add_rms_norm", "residual", r"residual shaped like x \(2, 4\), not \(2, 5\)",
         lambda: (r(2, 4), r(2, 5), r(4), 1e-6)),
    _bad("int8_linear", "weight", r"needs an int8 weight \(N, K\), not torch.float32",
         lambda: (r(2, 4), r(3, 4), r(3), None)),
    _bad("int8_linear", "x", r"weight \(3, 4\) needs x \(..., 4\), not \(2, 5\)",
         lambda: (r(2, 5), r(3, 4).to(torch.int8), r(3), None)),
    _bad("int8_linear", "scale", "needs a contiguous float32 scale of shape",
         lambda: (r(2, 4), r(3, 4).to(torch.int8), r(4), None)),
    _bad("int8_linear", "bias", "needs a contiguous float32 bias of shape",
         lambda: (r(2, 4), r(3, 4).to(torch.int8), r(3), r(3).half())),
    _bad("w8a8_linear", "x", r"weight \(3, 4\) needs x \(..., 4\), not \(2, 5\)",
         lambda: (r(2, 5), r(3, 4).to(torch.int8), r(3), None)),
]  # fmt: skip
