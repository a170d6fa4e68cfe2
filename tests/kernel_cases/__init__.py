"""What the kernel tests run: per operation its inputs, its shapes and what it must refuse.

Each module of this package holds a group of operations: ``CASES``, and ``BAD`` made by ``bad``.
"""

from __future__ import annotations

import importlib
import pkgutil
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


def bad(op: str, name: str, sentence: str, args: Callable):
    """``op(*args())`` must be refused with a sentence that matches the pattern."""
    return pytest.param(op, args, sentence, id=f"{op}-{name}")


def _collect() -> tuple[dict[str, Case], list]:
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    cases = {case.op: case for module in modules for case in module.CASES}
    for op in cases:
        importlib.import_module(f"kernels.{op}")
    return cases, [entry for module in modules for entry in module.BAD]


CASES, BAD = _collect()
