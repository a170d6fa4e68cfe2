"""Seconds: what a session may spend, what a cell's share is, which cells do not fit.

Share of a cell's sampling = 0.8 x (seconds left - building the cells to come) / cells left, so
what one cell saves goes to the rest; of the last ones together 0.9.  Building and compiling are
charged as they happen, and expected from earlier cells and runs, so that the budget ends the
selection, not the patience.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARE = 0.8
LAST_SHARE = 0.9  # of the cells after which no other comes to save for
LEEWAY = 0.05  # of the budget: how far the last cell may run over it


@dataclass
class Plan:
    """What the budget knows about a cell before it runs."""

    fullname: str
    model: str
    techniques: tuple[str, ...]
    by_name: bool = False  # asked for by name: it always runs
    extra_s: float = 0.0  # building it takes longer than its neighbours by about this much


@dataclass
class Budget:
    """The seconds of one session."""

    seconds: float
    clock: Callable[[], float] = time.perf_counter
    reserve: float = 0.0  # for the last probes
    known: dict[str, float] = field(default_factory=dict)  # fixed seconds in earlier runs
    plans: dict[str, Plan] = field(default_factory=dict)  # cells still to come, in order
    fixed: dict[str, float] = field(default_factory=dict)  # seconds not spent on samples
    models: dict[str, str] = field(default_factory=dict)
    sampled: set[str] = field(default_factory=set)  # techniques and models with six pairs
    prepaid: dict[str, float] = field(default_factory=dict)  # s of building before its turn
    checks: list[float] = field(default_factory=list)  # what was left to do in the turns of those

    _start: float | None = None
    _cell_start: float = 0.0

    def plan(self, plans: Iterable[Plan]) -> None:
        """Announce the cells of the selection."""
        for plan in plans:
            self.plans[plan.fullname] = plan
            self.models[plan.fullname] = plan.model

    def start(self) -> None:
        """The session begins now."""
        if self._start is None:
            self._start = self.clock()

    def left(self) -> float:
        """Seconds left."""
        self.start()
        assert self._start is not None
        return self.seconds - self.reserve - (self.clock() - self._start)

    def expected(self, fullname: str) -> float:
        """Seconds a cell will need before its samples (earlier runs, else its model's median)."""
        if fullname in self.known:
            return max(0.0, self.known[fullname] - self.prepaid.get(fullname, 0.0))
        if fullname in self.prepaid:
            return statistics.median(self.checks)
        model = self.models.get(fullname)
        same = [s for name, s in self.fixed.items() if self.models.get(name) == model]
        plan = self.plans.get(fullname)
        extra = plan.extra_s if plan else 0.0
        return statistics.median(same or list(self.fixed.values()) or [0.0]) + extra

    def begin(self, fullname: str) -> str | None:
        """Start a cell; a sentence when there is no time to (it then must not be built)."""
        self._cell_start = self.clock()
        plan, needs = self.plans.get(fullname), self.expected(fullname)
        leeway = LEEWAY * self.seconds
        if plan is None or plan.by_name:
            return None
        if fullname in self.prepaid and self.left() > -leeway / 2:  # its samples are taken
            return None
        if self.left() <= 0 or needs > self.left() + leeway / 2:
            return (
                f"the budget of {self.seconds:g} s leaves {max(0.0, self.left()):.1f} s and this "
                f"cell needs about {max(needs, 0.1):.1f} s; raise --bench-budget"
            )
        return None

    def not_its_own(self, seconds: float) -> None:
        """The session spent these in the turn of a cell, on what is nobody's: probes."""
        self._cell_start += seconds

    def affords(self, fullname: str) -> bool:
        """Whether a cell to come can be built now, and the others built before it still checked."""
        if self.plans[fullname].by_name:
            return True
        due = sum(self.expected(name) for name in self.plans if name in self.prepaid)
        return due + self.expected(fullname) <= self.left()

    def prepay(self, fullname: str, seconds: float) -> None:
        """A cell to come was built in the turn of this one, in so many seconds.

        It runs whatever is left: its samples are taken with this one's.
        """
        if not self.checks:  # until its own turn comes, it has as much to check as this one
            self.checks.append(max(0.0, self.clock() - self._cell_start - seconds))
        self.prepaid[fullname] = self.prepaid.get(fullname, 0.0) + seconds

    def share(self, fullname: str, cells: int = 1) -> float:
        """Seconds that the samples of the cell, or of so many from it on, may take from now."""
        others = [name for name in self.plans if name != fullname]
        coming = sum(self.expected(name) for name in others)
        left = max(self.left() - coming, 0.1 * self.left())
        part = SHARE if cells <= len(others) else LAST_SHARE
        return max(0.0, part * left / (len(others) + 1)) * cells

    def may_overspend(self, fullname: str, needs: float, cells: int = 1) -> bool:
        """Whether six pairs of so many cells may take ``needs`` seconds though their share is less.

        For a technique or a model that has no six pairs yet; or no more than an equal part of the
        whole budget: the first cells of a model pay for what the later ones share.
        """
        plan = self.plans.get(fullname)
        if plan is None or plan.by_name:
            return True
        fits = needs <= self.left() + LEEWAY * self.seconds / 2
        new = not {plan.model, *plan.techniques} <= self.sampled
        return fits and (new or needs <= cells * self.seconds / max(1, len(self.models)))

    def done(self, fullname: str, sampling_s: float, pairs: int = 0) -> None:
        """A cell has ended; ``sampling_s`` of its seconds went into samples or other cells."""
        plan = self.plans.pop(fullname, None)
        if plan is not None:
            own = max(0.0, self.clock() - self._cell_start - sampling_s)
            if pairs:
                self.fixed[fullname] = own + self.prepaid.get(fullname, 0.0)
                self.checks += [own] if fullname in self.prepaid else []
            if pairs >= 6:
                self.sampled.update((plan.model, *plan.techniques))

    def seconds_to_go(self) -> float:
        """A guess for the progress line: never more than the budget."""
        return max(0.0, min(self.left(), len(self.plans) * self._typical()))

    def _typical(self) -> float:
        total = self.seconds - self.reserve - self.left()
        return total / len(self.fixed) if self.fixed else self.left()


def load_costs(path: Path) -> dict[str, float]:
    """Fixed seconds per cell that earlier runs on this machine left behind."""
    with contextlib.suppress(OSError, ValueError):
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): float(v) for k, v in found.items()}
    return {}


def save_costs(path: Path, costs: dict[str, float]) -> None:
    """Leave them for the next run; never worth failing for."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**load_costs(path), **costs}), encoding="utf-8")
