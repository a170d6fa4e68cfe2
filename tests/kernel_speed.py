"""How fast are the kernels?  Operation x implementation x dtype x real shape, one cell each.

In the rounds of a cell stand the implementation (the variant), torch eager (the baseline), eager
compiled (``without``) and the fastest library here that computes the same (the peer).  All of them
reuse memory: CPU and CUDA implementations write into outputs allocated before, the others get
what the allocator kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

from impl.core import StudyError
from kernels import build
from kernels.op import OPS, unavailable
from tests import matrix
from tests.kernel_cases import CASES, DTYPES, SPEEDS, Rival, Speed, excess, outputs
from tests.plugins.ceilings import SMALLEST_DRAM, last_level_cache
from tests.plugins.sampler import cold_cache

if TYPE_CHECKING:
    from tests.step_speed import StepCell

MODEL = "kernel"  # the model of a kernel cell
MOST_INPUTS = 16
LOOKED_AT = 1 << 20  # elements, about, in which a rival's answer is compared
CHECKED_ROWS = 16  # in fp64, drawn anew for each check; the others must be finite
IMPLS = ("cpu", "triton", "cuda", "reference")


# ---- cells -------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelCell:
    """One operation by one implementation, in one precision, at one real shape."""

    op: str
    impl: str
    precision: str
    shape: tuple[int, ...]

    @property
    def speed(self) -> Speed:
        return SPEEDS[self.op]

    @property
    def technique(self) -> str:
        return f"{self.op}_{self.impl}"

    @property
    def batch(self) -> int:
        return self.speed.rows(*self.shape)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def workload(self) -> str:
        """The operation is named: two operations of one shape are two workloads."""
        return f"{self.op} {self.size}"

    @property
    def id(self) -> str:
        return f"{self.technique}-{MODEL}-{self.precision}-batch{self.batch}-{self.size}"

    def mark(self) -> pytest.MarkDecorator:
        """The coordinates of its record."""
        return pytest.mark.cell(techniques=self.technique, model=MODEL, precision=self.precision,
                                batch=self.batch, workload=self.workload)  # fmt: skip

    def missing(self, device: str) -> str | None:
        """What this machine lacks to run the cell, as a sentence, or None."""
        kind = device.split(":")[0]
        if self.impl in ("triton", "cuda") and kind == "cpu":
            return (
                f"impl={self.impl!r} needs a GPU to be timed; on a CPU only its numbers are checked"
            )
        if self.precision == "fp16" and kind == "cpu":
            return "needs cuda for fp16; CPUs compute it through fp32"
        return unavailable(self.impl, kind)

    def measure(self, bench: Callable[..., Any], device: str) -> None:
        """Check the cell, then time it; a rival that computes something else fails it."""
        with torch.inference_mode(), kept_memory():
            _measure(self, bench, device)


def cells(selection: matrix.Selection) -> dict[str, KernelCell]:
    """Id -> cell of a profile: ``smoke`` one shape per operation, ``core`` those of decoding."""
    if selection.models or selection.techniques:
        return {}  # somebody asked for stacks
    found = []
    for op, speed in SPEEDS.items():
        taken = {"smoke": 1, "full": len(speed.shapes)}.get(selection.profile, speed.core)
        impls = [i for i in IMPLS if i in OPS[op].functions]
        if selection.profile != "full":
            impls.remove("reference")  # slow, clear, correct: no one runs it
        found += [
            KernelCell(op, impl, precision, shape)
            for impl in impls
            for precision in selection.precisions or selection.size.precisions
            for shape in speed.shapes[:taken]
        ]
    return {c.id: c for c in found if not selection.batches or c.batch in selection.batches}


# ---- inputs ------------------------------------------------------------------------------


@dataclass
class Input:
    """Arguments of the operation, and of each rival what it has prepared from them."""

    args: list[Any]
    operands: dict[str, tuple]


def rolled(args: list[Any], by: int) -> list[Any]:
    """Memory of its own for every tensor, and other numbers of the same distribution.

    Integers keep their values: lengths and tables of pages belong together, and packed weights
    need no others, since x differs.
    """
    return [
        a if not isinstance(a, torch.Tensor)
        else a.roll(by, 0 if len(a) > MOST_INPUTS else -1) if a.is_floating_point() else a.clone()
        for a in args
    ]  # fmt: skip


def nbytes(values: Any) -> int:
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))


def make_inputs(cell: KernelCell, device: str) -> list[Input]:
    """So many that together they exceed the caches four times: at least 4, at most 16."""
    first = cell.speed.make(cell.shape, DTYPES[cell.precision])
    first = [a.to(device) if isinstance(a, torch.Tensor) else a for a in first]
    beyond = max(4 * last_level_cache(device), SMALLEST_DRAM)
    count = min(max(4, math.ceil(beyond / max(nbytes(first), 1))), MOST_INPUTS)
    return [Input(first, {}), *(Input(rolled(first, i), {}) for i in range(1, count))]


def change(given: Input) -> Callable[[], None]:
    """Roll the first argument in place, which every side reads; returns what undoes it."""
    x = given.args[0]
    before = x.clone()
    x.copy_(before.roll(1, -1))
    return lambda: x.copy_(before)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Freed memory stays with the process, so that no side pays page faults for its output.

    glibc's own thresholds move while a process runs, until somebody sets them: afterwards they are
    set to where they would have come to rest.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another C library: its own policy, the same for all sides
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)
        trim(0)


# ---- sides -------------------------------------------------------------------------------


def variant_of(cell: KernelCell, args: list[Any]) -> tuple[Callable[..., Any], tuple]:
    """(call(*args) -> output, its output buffers): ``into_<impl>`` where the operation has it."""
    overload = OPS[cell.op].overloads[cell.impl]
    into = getattr(importlib.import_module(f"kernels.{cell.op}"), f"into_{cell.impl}", None)
    if into is None:
        return overload, ()
    made = overload(*args)
    buffers = outputs(made)

    def call(*args):
        into(*buffers, *args)
        return made

    return call, buffers


def compiled(eager: Rival) -> Rival:
    """The baseline as torch.compile makes it, in one graph."""
    torch._dynamo.reset()
    return Rival(torch.compile(eager.call, fullgraph=True, dynamic=False), eager.prepare)


def sqnr(got: Any, wanted: Any) -> float:
    """Signal over error in dB, the worst of the outputs; a choice among near equals may differ.

    Of large outputs every so many-th element is looked at: in fp64 all of them took 1.3 s.
    """
    worst = math.inf
    for a, b in zip(outputs(got), outputs(wanted), strict=True):
        if not b.is_floating_point():
            continue
        step = max(1, b.numel() // LOOKED_AT) | 1  # odd: it meets all columns of a power of two
        a, b = a.reshape(-1)[::step], b.reshape(-1)[::step]
        error = (a.double() - b.double()).square().sum().item()
        signal = b.double().square().sum().item()
        if not error < math.inf:  # a NaN or an infinity
            return -math.inf
        worst = min(worst, 10 * math.log10(max(signal, 1e-300) / error) if error else math.inf)
    return worst


class Disagrees(AssertionError):
    """A rival answers another question than the operation."""


def prepare(name: str, rival: Rival, given: list[Input], wanted: Any, floor: float | None) -> float:
    """Prepare a rival's operands for every input; its quickest of three calls in seconds.

    Raises Disagrees when its answer to the first input is another one.
    """
    for x in given:
        x.operands[name] = tuple(rival.prepare(*x.args))
    near = sqnr(rival.call(*given[0].operands[name]), wanted)
    if near < (math.inf if floor is None else floor):
        raise Disagrees(f"{name} is {near:.1f} dB from the operation; it computes something else")
    times = []
    for x in given[:3]:
        start = time.perf_counter()
        rival.call(*x.operands[name])
        _synchronize(x.args[0])
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def best_peer(speed: Speed, given: list[Input], wanted: Any) -> tuple[str | None, list[str]]:
    """(the fastest peer there is, what came of each as a few words)."""
    times, told = {}, []
    for name, rival in speed.peers.items():
        try:
            times[name] = prepare(name, rival, given, wanted, speed.closeness)
            told.append(f"{name} about {times[name] * 1e3:.3g} ms")
        except (RuntimeError, NotImplementedError, AttributeError, ImportError) as error:
            told.append(f"no {name} here ({str(error).strip().splitlines()[0][:80]})")
    best = min(times, key=lambda name: times[name], default=None)
    for x in given:  # the others' copies of the weights go
        for name in set(times) - {best}:
            del x.operands[name]
    return best, told


# ---- the measurement ---------------------------------------------------------------------


def check_of(cell: KernelCell) -> Callable[[Any, Input], None]:
    """``agree(output, input)``: within the error budget of tests/test_kernels.py, rows drawn."""
    case = CASES[cell.op]
    draw = torch.Generator().manual_seed(0)

    def agree(output: Any, given: Input) -> None:
        args, got = list(given.args), outputs(output)
        for y in got:
            assert not y.is_floating_point() or y.isfinite().all(), "an output is not finite"
        rows = args[case.row_args[0]].shape[0] if case.row_args else 0
        if rows > CHECKED_ROWS and case.row_stable:
            some = torch.randperm(rows, generator=draw)[:CHECKED_ROWS].to(got[0].device)
            got = tuple(y[some] for y in got)
            for i in (*case.row_args, *case.row_numbers):
                args[i] = args[i][some]
        over = excess(case, got, args)
        assert over <= 1, f"{cell.id}: the error is {over:.3g} times its budget"

    return agree


@contextlib.contextmanager
def watched_symbols() -> Iterator[set[str]]:
    """The C functions that calls inside look up."""
    seen: set[str] = set()
    before = build.cpu_function

    @functools.wraps(before)
    def recording(name, symbol, *rest, **more):
        seen.add(symbol)
        return before(name, symbol, *rest, **more)

    build.cpu_function = recording
    try:
        yield seen
    finally:
        build.cpu_function = before


def proof(cell: KernelCell | StepCell, call: Callable[[], Any], told: list[str]) -> str:
    """What ran, and which peers there were; raises where the compiled code was not reached."""
    words = f"operator study::{cell.op}.{cell.impl}"
    if cell.impl == "cpu":
        with watched_symbols() as seen:
            call()
        if not seen:
            raise StudyError(f"{cell.id} called no C function; is {cell.op} a CPU C++ operation?")
        words = f"C function {', '.join(sorted(seen))} for {build.current_isa()}"
    return "; ".join([words, *told])


def _measure(cell: KernelCell, bench: Callable[..., Any], device: str) -> None:
    speed, given = cell.speed, make_inputs(cell, device)
    call, buffers = variant_of(cell, given[0].args)
    agree = check_of(cell)
    first = call(*given[0].args)
    agree(first, given[0])
    wanted = tuple(y.clone() for y in outputs(first))
    rivals = {"torch_eager": speed.eager, "torch_compile": compiled(speed.eager)}
    for name, rival in rivals.items():
        prepare(name, rival, given, wanted, speed.closeness)
    peer, told = best_peer(speed, given, wanted)
    if peer is not None:
        rivals[peer] = speed.peers[peer]
    del first

    def side(name: str) -> Callable[[Input], Any]:
        rival = rivals[name]
        return lambda x: rival.call(*x.operands[name])

    names = {"baseline": "torch_eager", "without": "torch_compile"} | (
        {"peer": peer} if peer else {}
    )
    on_gpu = device.startswith("cuda")
    weights = nbytes(given[0].args[1:]) if speed.weights else None
    bench(
        sides={"variant": lambda x: call(*x.args)} | {at: side(n) for at, n in names.items()},
        inputs=given,
        agree=agree,
        cell={"techniques": [cell.technique], "families": [], "model": MODEL, "batch": cell.batch,
              "precision": cell.precision, "device": device, "workload": cell.workload},
        names=names,
        effect=lambda: proof(cell, lambda: call(*given[0].args), told),
        timing="event" if on_gpu else "wall",
        flush=cold_cache(device, last_level_cache(device)) if on_gpu else None,
        bytes_moved=speed.bytes_moved(cell.shape, DTYPES[cell.precision]),
        flops=speed.flops(cell.shape, given[0].args, wanted[0]),
        compute_dtype=speed.limited_by(cell.precision),
        working_set=len(given) * nbytes(given[0].args) + sum(y.nbytes for y in buffers),
        bytes_written=sum(y.nbytes for y in wanted),
        weight_bytes=weights,
        change=change,
        outputs=[y for y in buffers if y.is_floating_point()],
    )  # fmt: skip
