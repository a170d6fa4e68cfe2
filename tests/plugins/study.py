"""What one session knows: its budget, ceilings, A/A trials, records, and what did not run."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.budget import Budget
from tests.plugins.ceilings import DRIFT, Ceilings
from tests.plugins.intervals import verdict
from tests.plugins.journal import Journal
from tests.plugins.machine import busy, conditions_now
from tests.plugins.sampler import FEWEST_PAIRS, Rounds

SEED = 0
STUDY: "pytest.StashKey[Study]" = pytest.StashKey()


class KeptRounds:
    """The rounds of this session, for cells all of whose sides stood in the rounds of another.

    The cells of a table are sampled together, a peer beside the technique that names it; each
    needs its own checks, but no second set of samples.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[tuple[str, dict[str, list[float]]]]] = {}

    def keep(
        self, cell: dict[str, Any], timing: str, whose: str, named: dict[str, list[float]]
    ) -> None:
        """Remember the samples of every stack, by its name; ``whose`` cell they were taken for."""
        self._kept.setdefault(_place(cell, timing), []).append((whose, named))

    def find(
        self, cell: dict[str, Any], timing: str, stacks: Mapping[str, str]
    ) -> tuple[str, Rounds] | None:
        """(whose, rounds) in which each of ``stacks`` was timed on this workload, or None."""
        for whose, named in self._kept.get(_place(cell, timing), ()):
            if set(stacks.values()) <= set(named):
                rounds = Rounds({side: list(named[name]) for side, name in stacks.items()})
                if len(rounds) >= FEWEST_PAIRS:
                    rounds.stop = "budget"
                    return whose, rounds
        return None


def _place(cell: dict[str, Any], timing: str) -> tuple[Any, ...]:
    return cell["model"], cell["precision"], cell["batch"], cell["workload"], timing


@dataclass
class Study:
    """State of a session; kept in ``config.stash[STUDY]``."""

    precision: float
    budget: Budget
    ceilings: Ceilings
    journal: Journal
    device: str
    enabled: bool  # False: check only, no timing
    fast: bool = False
    trace_folder: Path | None = None
    before: dict[str, Any] | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)  # extra_info by fullname
    medians: dict[str, float] = field(default_factory=dict)  # s per call by fullname
    resumed: set[str] = field(default_factory=set)
    cells: dict[str, dict[str, Any] | None] = field(default_factory=dict)  # of the selection
    not_run: dict[str, str] = field(default_factory=dict)  # reason by fullname
    marks: list[str] = field(default_factory=list)
    saved: bool = False
    rounds: KeptRounds = field(default_factory=KeptRounds)

    def begin_timing(self) -> None:
        """Before the first sample of the session: note the conditions, probe the ceilings."""
        if self.before is None:
            self.before = conditions_now()
            if complaint := busy(self.before):
                self.marks.append(complaint)
            start = self.budget.clock()
            self.budget.reserve = float(self.ceilings.measure_first()["seconds"])
            self.budget.not_its_own(self.budget.clock() - start)

    def end_timing(self) -> None:
        """After the last sample: probe again, and give every verdict its final margin."""
        self.budget.reserve = 0.0
        if self.before is not None:
            self.ceilings.measure_last()
            if (drift := self.ceilings.drift() or 0.0) > DRIFT:
                self.marks.append(f"the ceilings moved by {drift:.0%} during the run")
        self.settle_verdicts()

    def margin(self) -> float:
        """How far from 1 a speed-up may lie and still be the same."""
        return max(2 * self.precision, self.noise_floor() or 0.0)

    def trials(self) -> list[dict[str, Any]]:
        """Records of stacks paired with themselves: free A/A tests."""
        return [r for r in self.records.values() if is_self_paired(r) and r["pairs"] >= 6]

    def noise_floor(self) -> float | None:
        """How far the speed-up of unchanged code strays from 1: the 95th percentile of trials."""
        off = sorted(abs(math.log(trial["speedup"])) for trial in self.trials())
        if not off:
            return None
        return math.exp(off[math.ceil(0.95 * len(off)) - 1]) - 1

    def settle_verdicts(self) -> None:
        """Verdicts with the noise floor of the whole run; the same however often it is called."""
        for record in self.records.values():
            bounds = record["speedup_low"], record["speedup_high"]
            record["verdict"] = verdict(*bounds, self.margin())

    def as_json(self) -> dict[str, Any]:
        """The keys added at the top of the run's file."""
        import torch

        trials = self.trials()
        missed = [t for t in trials if not t["speedup_low"] <= 1 <= t["speedup_high"]]
        return {
            "not_run": [
                {"fullname": name, "cell": self.cells.get(name), "reason": reason}
                for name, reason in self.not_run.items()
                if name not in self.records
            ],
            "ceilings": self.ceilings.as_json(),
            "aa": {
                "trials": len(trials),
                "misses": len(missed),
                "noise_floor": self.noise_floor(),
            },
            "conditions": {
                "threads": torch.get_num_threads(),
                "seed": SEED,
                "precision": self.precision,
                "budget_s": self.budget.seconds,
                "before": self.before,
                "after": conditions_now(),
                "marks": list(dict.fromkeys(self.marks)),
            },
        }

    def keep(self, fullname: str, record: dict[str, Any], seconds: list[float]) -> None:
        """Remember a finished record."""
        self.records[fullname] = record
        self.medians[fullname] = statistics.median(seconds)


def is_self_paired(record: dict[str, Any]) -> bool:
    """Whether a record pairs a stack with itself: its only technique is its own baseline."""
    return bool([record["baseline"]] == record["cell"]["techniques"])
