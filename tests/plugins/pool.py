"""Engines by stack: built on demand, kept while they are needed, sharing weights that are large."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from impl.core import Engine, Technique, build
from impl.machine import memory_bytes
from impl.models import ModelSpec, costs, load
from tests import matrix
from tests.matrix import Cell

KEEP_SHARE = 1 / 16  # of the memory: engines kept for later cells
SHARE_FROM = 1 / 32  # of the memory: a model this large is loaded once, whatever stacks it is in
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Built:
    """An engine, and what it cost to make it."""

    engine: Engine
    load_s: float


class Recalled:
    """An engine that is in memory only while it is used: another takes its place in between.

    ``recall()`` gives the engine, built anew when it had to leave.  It must not be kept, nor
    anything of it but ``stats``.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: str, batch: int, recall):
        self.spec, self.dtype, self.device, self.batch = spec, dtype, torch.device(device), batch
        self.recall = recall
        self.stats: dict[str, Any] = {}

    def _engine(self) -> Engine:
        engine = self.recall()
        self.stats = engine.stats
        return engine

    def __getattr__(self, name: str):
        return getattr(self._engine(), name)  # model, new_cache, undo

    def forward(self, inputs):
        return self._engine().forward(inputs)

    def generate(self, *args, **options):
        return self._engine().generate(*args, **options)

    def serve(self, requests):
        return self._engine().serve(requests)


class Weights:
    """Models as loaded: each engine's own, unless so large that all of its engines share one.

    Engines of a large model get modules of their own whose parameters share memory.  One that
    writes into that memory is found out by a checksum: what it wrote is undone, and it is built
    again on a model of its own.
    """

    def __init__(self, device: str):
        self.device = device
        self._shared: dict[tuple[ModelSpec, str], tuple[nn.Module, list[Tensor]]] = {}

    def are_shared(self, spec: ModelSpec, precision: str) -> bool:
        """Whether the engines of this model hold its weights together."""
        size = costs.parameters(spec) * DTYPES[precision].itemsize
        return size > SHARE_FROM * memory_bytes(self.device)

    def load(self, spec: ModelSpec, precision: str) -> nn.Module:
        """The model afresh."""
        return load(spec, DTYPES[precision], self.device)[1]

    def borrow(self, spec: ModelSpec, precision: str) -> nn.Module:
        """The model, its parameters in memory that other engines read too."""
        key = spec, precision
        if key not in self._shared:
            loaded = self.load(spec, precision)
            self._shared[key] = loaded, checksums(loaded)
        return alias(self._shared[key][0])

    def restore(self, spec: ModelSpec, precision: str) -> nn.Module | None:
        """Undo what was written into the shared weights; then, a model to write into."""
        loaded, sums = self._shared[spec, precision]
        if all(map(torch.equal, checksums(loaded), sums)):
            return None
        afresh = self.load(spec, precision)
        with torch.no_grad():
            for ours, right in zip(loaded.parameters(), afresh.parameters(), strict=True):
                ours.data.copy_(right)
        return afresh

    def keep_only(self, spec: ModelSpec | None = None, precision: str | None = None) -> None:
        """Let go of other models, and of this one at another precision."""
        for key in [key for key in self._shared if key != (spec, precision)]:
            del self._shared[key]


def alias(model: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters are new objects in the same memory."""
    same = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo=same)


def checksums(model: nn.Module) -> list[Tensor]:
    """Per parameter, its bytes summed as 64-bit words in eight lanes (at the speed of memory)."""
    found = []
    for p in model.parameters():
        data = p.detach().reshape(-1).view(torch.uint8)
        whole = len(data) // 64 * 64
        lanes = data[:whole].view(torch.int64).view(-1, 8).sum(0)
        found.append(torch.cat((lanes, data[whole:].sum()[None])))
    return found


class Pool:
    """Builds engines on demand and keeps those that the current cell needs."""

    def __init__(self, specs, device: str):
        self.specs, self.device = specs, device
        self.weights = Weights(device)
        self.one_at_a_time = False  # of the current cell: two of its engines do not fit
        self._built: dict[tuple, Built] = {}
        self._recalled: dict[tuple, Built] = {}

    def spec(self, cell: Cell) -> ModelSpec:
        """The spec of the cell's model, with as many layers as fit this machine."""
        return matrix.fitted(self.specs[cell.model], cell, self.device)

    def get(self, techniques: tuple[Technique, ...], cell: Cell,
            precision: str | None = None) -> Built:  # fmt: skip
        """The engine of this stack on the cell's workload (at ``precision`` if given)."""
        precision, spec = precision or cell.precision, self.spec(cell)
        names = tuple(t.name for t in techniques)
        plain = names in (("eager",), ("lean_decoder",))  # nothing prepared for a batch
        batch = 0 if plain else cell.batch
        key = names, spec, precision, batch
        if not self.one_at_a_time:
            return self._get(key, techniques, cell)
        if key not in self._recalled:
            build = self._get(key, techniques, cell)
            engine = Recalled(spec, DTYPES[precision], self.device, cell.batch,
                              lambda: self._get(key, techniques, cell).engine)  # fmt: skip
            self._recalled[key] = Built(cast(Engine, engine), build.load_s)  # it has its members
        return self._recalled[key]

    def _get(self, key: tuple, techniques, cell: Cell) -> Built:
        if key not in self._built:
            if self.one_at_a_time:
                self.close_all()
                self.weights.keep_only()
            self._built[key] = self._build(techniques, cell, key[2])
        return self._built[key]

    def _build(self, techniques, cell: Cell, precision: str) -> Built:
        spec, weights = self.spec(cell), self.weights
        start = time.perf_counter()
        if self.one_at_a_time or not weights.are_shared(spec, precision):
            engine = self._apply(techniques, cell, precision, weights.load(spec, precision))
        else:
            engine = self._apply(techniques, cell, precision, weights.borrow(spec, precision))
            if own := weights.restore(spec, precision):
                engine.undo.close()
                start = time.perf_counter()
                engine = self._apply(techniques, cell, precision, own)
        return Built(engine, time.perf_counter() - start)

    def _apply(self, techniques, cell: Cell, precision: str, model: nn.Module) -> Engine:
        device = torch.device(self.device)
        engine = Engine(self.spec(cell), model, DTYPES[precision], device, cell.batch)
        with torch.inference_mode():
            try:
                return build(engine, techniques)
            except BaseException:
                engine.undo.close()
                raise

    def focus(self, cell: Cell) -> None:
        """Let go of other models' engines, and of this one's when they take too much memory.

        An engine that a later cell is measured against need not be built, or compiled, again.
        """
        needed = {t.name for t in cell.techniques} | {"eager", "lean_decoder"}
        spec, large = self.spec(cell), self.weights.are_shared(self.spec(cell), cell.precision)
        self.one_at_a_time = matrix.fits_one_at_a_time(cell, spec, self.device)
        self._recalled.clear()
        for key in list(self._built):
            if key[1] != spec or (large and key[2] != cell.precision):
                self.close(key)
        self.weights.keep_only(spec, cell.precision)
        spare = [key for key in self._built if not set(key[0]) <= needed]
        while spare and self.resident_bytes() > KEEP_SHARE * memory_bytes(self.device):
            self.close(spare.pop(0))

    def resident_bytes(self) -> int:
        """Bytes of weights of all engines in the pool, shared memory counted once."""
        return costs.weight_bytes(nn.ModuleList(b.engine.model for b in self._built.values()))

    def close(self, key: tuple) -> None:
        """Undo what the techniques changed globally, and give the memory back."""
        self._built.pop(key).engine.undo.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        else:
            _malloc_trim()

    def close_all(self) -> None:
        for key in list(self._built):
            self.close(key)


def _malloc_trim() -> None:
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
