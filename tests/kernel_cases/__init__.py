"""What the kernel tests run: per operation its inputs, its shapes and what it must refuse.

Each module of this package holds a group of operations: ``CASES``, ``BAD`` made by ``bad``, and
``SPEEDS``, what ``pytest --benchmark-only tests/test_kernels.py`` times.
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
    row_numbers     integers of which each row has its own; sliced with it, never scaled
    row_stable      a row's result has the same bits whatever stands in the other rows: of any
                    number of them, or of fewer than ``order_changes`` says
    order_changes   the number of rows from which sums may stand in another order on a CPU without
                    AVX-512, by dtype: there speed was bought with the bits of a row alone
    short_argument  the tensor argument that a bounds test shortens
    mma             the opcode that Triton's matrix kernels must have, per architecture
    mma_kernels     a pattern of the names of those kernels
    cuda_mma        the opcode that cuda.cu's matrix kernels must have (they use mma.sync)
    cuda_mma_kernels  a pattern of the names of those kernels
    shim_elements   the host shim gets the shapes whose sizes multiply to no more
    archs           the architectures that its GPU kernels are compiled for
    on_hopper       cuda.cu's kernels with a path of their own for sm_90a (common/wgmma.cuh): a
                    pattern of their names -> the opcode that they must have there
    hopper_shapes   what the host shim gets for that path whatever its size: of several tiles
    judge           ``judge(*outputs, args)``: the share of the budget, where outputs are choices
                    that rounding may turn: to which, it knows
    """

    op: str
    make: Callable
    shapes: list[tuple[int, ...]]
    large: tuple[int, ...]
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    row_args: tuple[int, ...] = (0,)
    row_numbers: tuple[int, ...] = ()
    row_stable: bool = True
    order_changes: dict[str, int] = field(default_factory=dict)
    short_argument: int = 1
    mma: dict[str, str] = field(default_factory=dict)
    mma_kernels: str = "gemm"
    cuda_mma: str | None = None
    cuda_mma_kernels: str = "few|gemm"
    shim_elements: int = 20000
    uses: str = "__syncthreads"
    shim_shapes: tuple = ((1, 64), (3, 301))
    archs: tuple[str, ...] = ("sm_80", "sm_90a")
    on_hopper: dict[str, str] = field(default_factory=dict)
    hopper_shapes: tuple = ()
    judge: Callable | None = None

    def reference(self, *args):
        """The operation in the precision of its inputs."""
        module = importlib.import_module(f"kernels.{self.op}.reference")
        return getattr(module, self.op)(*args)

    def exact(self, *args):
        """The same in fp64 on the same numbers."""
        return self.reference(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point()
                                else a for a in args))  # fmt: skip

    def fits_shim(self, shape) -> bool:
        """Small enough for CUDA threads that are coroutines, or threads under a sanitizer."""
        total = 1
        for n in shape:
            total *= n
        return total <= self.shim_elements


# rows beyond the 12288 columns that a CUDA block keeps in shared memory, on the host shim too
LONG = {"shim_elements": 40_000, "shim_shapes": ((1, 64), (3, 301), (1, 12301))}


def outputs(out) -> tuple[torch.Tensor, ...]:
    """What an operation returns, as a tuple."""
    return out if isinstance(out, tuple) else (out,)


def excess(case: Case, got, args) -> float:
    """The largest error against fp64 as a share of its budget (1 is the limit).

    Budget: twice the error of the reference in this precision on this very input, plus two
    roundings of the largest output; so it grows with the input and the sums as rounding does.
    """
    if case.judge is not None:
        return case.judge(*outputs(got), args)
    exact, rounded = case.exact(*args), case.reference(*args)
    worst = 0.0
    for y, good, low in zip(outputs(got), outputs(exact), outputs(rounded), strict=True):
        assert y.shape == good.shape
        assert y.dtype == low.dtype
        if not y.numel():
            continue
        if not y.is_floating_point():  # a choice: the exact one, or wrong
            worst = max(worst, 0.0 if torch.equal(y, good) else float("inf"))
            continue
        rounding = torch.finfo(y.dtype).eps / 2
        spread = 2 * (low.double() - good).abs().max() + 2 * rounding * good.abs().max()
        budget = max(spread.item(), torch.finfo(y.dtype).tiny)
        error = (y.double() - good).abs().max().item()
        worst = max(worst, float("inf") if error != error else error / budget)
    return worst


@dataclass(frozen=True)
class Rival:
    """Another way to the same result: ``call(*prepare(*args))``.

    ``prepare`` takes the operation's arguments, packs and converts, and is never timed.  Both may
    raise where this machine or torch lacks it: the rival is then left out, and the record says so.
    """

    call: Callable
    prepare: Callable = lambda *args: args


@dataclass(frozen=True)
class Speed:
    """How one operation is timed: real shapes, and what a user of torch would run instead.

    make       ``make(shape, dtype) -> args``, seeded
    shapes     real ones, each with its meaning beside it; the first is all that ``smoke`` takes.
               Element-wise work moves 128 MB or more
    core       how many of them, from the first, ``core`` takes: those of decoding
    eager      the baseline; it is also what torch.compile gets
    peers      name -> the same work by a library; the fastest that agrees stands in the record
    weights    whether the arguments after the first are weights, which a step only reads
    compute    the arithmetic whose rate limits it, by precision or of all (""), where that is not
               the precision's
    rows       ``rows(*shape)``: the cell's batch
    moved      ``moved(shape, itemsize)``, where that is not its ``bytes_moved(*shape, itemsize)``
    arithmetic ``arithmetic(shape)``, where that is not its ``flops(*shape)`` nor torch's formula
    closeness  SQNR in dB that eager and peers must reach against the operation, or None: exact
    """

    op: str
    make: Callable
    shapes: tuple[tuple[int, ...], ...]
    core: int
    eager: Rival
    peers: dict[str, Rival] = field(default_factory=dict)
    weights: bool = False
    compute: dict[str, str] = field(default_factory=dict)
    rows: Callable = lambda *shape: shape[0]
    moved: Callable | None = None
    arithmetic: Callable | None = None
    closeness: float | None = 20.0

    def limited_by(self, precision: str) -> str:
        """The arithmetic whose rate limits it, a key of ``tests.plugins.ceilings.CAN_COMPUTE``."""
        return self.compute.get(precision) or self.compute.get("") or precision

    def bytes_moved(self, shape, dtype: torch.dtype) -> int:
        """The operation's own count."""
        if self.moved is not None:
            return self.moved(shape, dtype.itemsize)
        module = importlib.import_module(f"kernels.{self.op}")
        return module.bytes_moved(*shape, dtype.itemsize)

    def flops(self, shape, args, output) -> int:
        """The operation's own count: ``flops`` of its module, or the formula torch knows."""
        from torch.utils.flop_counter import flop_registry

        if self.arithmetic is not None:
            return self.arithmetic(shape)
        module = importlib.import_module(f"kernels.{self.op}")
        if hasattr(module, "flops"):
            return module.flops(*shape)
        return flop_registry[getattr(torch.ops.study, self.op)](*args, out_val=output)


def seeded(shape) -> torch.Generator:
    return torch.Generator().manual_seed(hash(tuple(shape)) % 2**31)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded((*shape, seed))).to(dtype)


def bad(op: str, name: str, sentence: str, args: Callable):
    """``op(*args())`` must be refused with a sentence that matches the pattern."""
    return pytest.param(op, args, sentence, id=f"{op}-{name}")


def _collect() -> tuple[dict[str, Case], list, dict[str, Speed]]:
    modules = [
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    ]
    cases = {case.op: case for module in modules for case in module.CASES}
    for op in cases:
        importlib.import_module(f"kernels.{op}")
    speeds = {s.op: s for module in modules for s in getattr(module, "SPEEDS", ())}
    return cases, [entry for module in modules for entry in module.BAD], speeds


CASES, BAD, SPEEDS = _collect()
