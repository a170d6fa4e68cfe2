"""Engines by stack: built on demand, kept while they are needed, sharing weights that are large."""

from __future__ import annotations

import contextlib
import copy
import gc
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from impl.core import Engine, Technique, build
from impl.machine import memory_bytes
from impl.models import costs, load
from tests.matrix import Cell

KEEP_SHARE = 1 / 16  # of the memory: engines kept for later cells
SHARE_FROM = 1 / 32  # of the memory: a model this large is loaded once, whatever stacks it is in
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Built:
    """An engine, and what it cost to make it."""

    engine: Engine
    load_s: float


class Weights:
    """Models as loaded: each engine's own, unless so large that all of its engines share one.

    Engines of a large model get modules of their own whose parameters share memory.  One that
    writes into that memory is found out by a checksum: what it wrote is undone, and it is built
    again on a model of its own.
    """

    def __init__(self, specs, device: str):
        self.specs, self.device = specs, device
        self._shared: dict[tuple[str, str], tuple[nn.Module, list[Tensor]]] = {}

    def are_shared(self, model: str, precision: str) -> bool:
        """Whether the engines of this model hold its weights together."""
        size = costs.parameters(self.specs[model]) * DTYPES[precision].itemsize
        return size > SHARE_FROM * memory_bytes(self.device)

    def load(self, model: str, precision: str) -> nn.Module:
        """The model afresh."""
        return load(self.specs[model], DTYPES[precision], self.device)[1]

    def borrow(self, model: str, precision: str) -> nn.Module:
        """The model, its parameters in memory that other engines read too."""
        key = model, precision
        if key not in self._shared:
            loaded = self.load(model, precision)
            self._shared[key] = loaded, checksums(loaded)
        return alias(self._shared[key][0])

    def restore(self, model: str, precision: str) -> nn.Module | None:
        """Undo what was written into the shared weights; then, a model to write into."""
        loaded, sums = self._shared[model, precision]
        if all(map(torch.equal, checksums(loaded), sums)):
            return None
        afresh = self.load(model, precision)
        with torch.no_grad():
            for ours, right in zip(loaded.parameters(), afresh.parameters(), strict=True):
                ours.data.copy_(right)
        return afresh

    def keep_only(self, model: str) -> None:
        """Let go of other models."""
        for key in [key for key in self._shared if key[0] != model]:
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
        self.weights = Weights(specs, device)
        self._built: dict[tuple, Built] = {}

    def get(self, techniques: tuple[Technique, ...], cell: Cell,
            precision: str | None = None) -> Built:  # fmt: skip
        """The engine of this stack on the cell's workload (at ``precision`` if given)."""
        precision = precision or cell.precision
        names = tuple(t.name for t in techniques)
        plain = names in (("eager",), ("lean_decoder",))  # nothing prepared for a batch
        batch = 0 if plain else cell.batch
        key = names, cell.model, precision, batch
        if key not in self._built:
            self._built[key] = self._build(techniques, cell, precision)
        return self._built[key]

    def _build(self, techniques, cell: Cell, precision: str) -> Built:
        model, weights = cell.model, self.weights
        start = time.perf_counter()
        if not weights.are_shared(model, precision):
            engine = self._apply(techniques, cell, precision, weights.load(model, precision))
        else:
            engine = self._apply(techniques, cell, precision, weights.borrow(model, precision))
            if own := weights.restore(model, precision):
                engine.undo.close()
                start = time.perf_counter()
                engine = self._apply(techniques, cell, precision, own)
        return Built(engine, time.perf_counter() - start)

    def _apply(self, techniques, cell: Cell, precision: str, model: nn.Module) -> Engine:
        spec, device = self.specs[cell.model], torch.device(self.device)
        engine = Engine(spec, model, DTYPES[precision], device, cell.batch)
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
        for key in [key for key in self._built if key[1] != cell.model]:
            self.close(key)
        self.weights.keep_only(cell.model)
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
