"""Who a cell is measured against in the same rounds: baseline, the stack without it, a peer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from impl.core import TECHNIQUES, Engine
from tests import matrix, workloads
from tests.matrix import Cell
from tests.plugins.cells import cell_of, comes_late, families_of, models_at_fp32
from tests.plugins.engines import Checks, Evidence, is_served
from tests.plugins.pool import Pool
from tests.plugins.study import STUDY
from tests.plugins.tables import TableCell, variant_name


@dataclass
class Opponents:
    """Stacks measured beside the cell's; None where there is none."""

    baseline: Cell
    without: Cell | None
    peer: Cell | None
    without_precision: str | None = None

    @property
    def names(self) -> dict[str, str]:
        names = {"baseline": self.baseline.stack}
        if self.without:
            at = f" {self.without_precision}" if self.without_precision else ""
            names["without"] = self.without.stack + at
        if self.peer:
            names["peer"] = self.peer.stack
        return names


def opponents(cell: Cell, spec, device: str, selection: matrix.Selection) -> Opponents:
    """``eager``; the stack less its last member; the peer its last member names, if it runs here
    and the profile has it on this workload.

    ``eager`` itself is paired with itself (an A/A test), and at low precision with fp32 too.
    """
    baseline = cell.of("eager")
    last = cell.techniques[-1]
    if cell.stack == "eager":
        low = cell.precision != "fp32" and matrix.fits_in_fp32(cell, spec, device)
        return Opponents(baseline, baseline if low else None, None, "fp32" if low else None)
    without = None
    if len(cell.techniques) > 1:
        without = cell.of(*(t.name for t in cell.techniques[:-1]))
    elif "lean" in spec.needs and last.host == "lean" and last.name != "lean_decoder":
        without = cell.of("lean_decoder")
    peer = None
    for t in reversed(cell.techniques):
        if t.peer and t.peer in TECHNIQUES:
            candidate = cell.of(t.peer)
            problem = matrix.impossible(candidate.techniques, spec, cell.precision, cell.batch)
            lacks = matrix.missing(candidate, spec, device)
            if not problem and not lacks and selection.takes(candidate):
                peer = candidate
            break
    return Opponents(baseline, without, peer)


class Study:
    """What a benchmark test asks for a cell: the sides, and the facts of its record."""

    def __init__(
        self, cell: Cell, checks: Checks, evidence: Evidence, device: str,
        company: Mapping[str, Cell] | None = None,
    ):  # fmt: skip
        self.cell, self.checks, self.evidence, self.device = cell, checks, evidence, device
        self.company = company or {}  # by the names of their tests
        self.pool = checks.pool
        self.spec = self.pool.spec(cell)
        self.size = checks.size(cell)
        self.opponents = opponents(cell, self.spec, device, checks.selection)
        self.answer: torch.Tensor | None = None  # the tokens checked last

    @property
    def engine(self) -> Engine:
        return self.pool.get(self.cell.techniques, self.cell).engine

    def sides(self, call: Callable[[Engine], Callable[[Any], Any]]) -> dict[str, Any]:
        """Side -> ``call(engine)``: the same work on every engine."""
        builders = self._builders(self.cell, self.opponents, call)
        return {side: build() for side, (_, build) in builders.items()}

    def table(self, call: Callable[[Engine], Callable[[Any], Any]]) -> list[TableCell]:
        """The cells of this table still to come, this one first."""
        found = []
        for name, cell in self.company.items():
            their = opponents(cell, self.spec, self.device, self.checks.selection)
            found.append(TableCell(name, dict(self._builders(cell, their, call).values())))
        return found

    def _builders(
        self, cell: Cell, o: Opponents, call: Callable[[Engine], Callable[[Any], Any]]
    ) -> dict[str, tuple[str, Callable[[], Any]]]:
        """Side -> its name in tables, and what builds its call."""

        def builder(of: Cell, precision: str | None = None) -> Callable[[], Any]:
            def build() -> Any:
                run = call(self.pool.get(of.techniques, of, precision).engine)
                if precision is None:
                    return run  # inputs come in the cell's precision
                return lambda x: run(workloads.to(x, self.device, precision))

            return build

        found = {
            "variant": (variant_name(cell.stack, o.names), builder(cell)),
            "baseline": (o.names["baseline"], builder(o.baseline)),
        }
        if o.without:
            found["without"] = o.names["without"], builder(o.without, o.without_precision)
        if o.peer:
            found["peer"] = o.names["peer"], builder(o.peer)
        return found

    @property
    def baseline(self) -> Engine:
        o = self.opponents
        return self.pool.get(o.baseline.techniques, o.baseline).engine

    @property
    def is_served(self) -> bool:
        return is_served(self.cell)

    def inputs(self) -> list:
        """The inputs all sides rotate through."""
        return workloads.inputs_of(self.cell, self.spec, self.size, self.device)

    def agree(self, output, ids) -> None:
        """Raises unless generated ``output`` is right for the prompt ``ids``."""
        with torch.inference_mode():
            self.checks.agree(self.cell, ids, self.size.new_tokens, output)
        self.answer = output[:, ids.shape[1] :]

    def agree_responses(self, output, trace) -> None:
        """Raises unless every request has the answer it asked for."""
        assert [r.id for r in output] == [r.id for r in trace], "a request is unanswered"
        with torch.inference_mode():
            for request, answer in zip(trace, output, strict=True):
                self.checks.agree(
                    self.cell, request.ids[None], request.max_new_tokens, answer.ids[None]
                )

    def agree_logits(self, output, inputs) -> None:
        """Raises unless ``output`` is as near to eager's as the stack promises."""
        with torch.inference_mode():
            self.checks.near(self.cell, output, inputs)

    def latencies(self, trace, responses) -> list[float]:
        """Seconds from scheduled arrival to the last token, of each request."""
        arrived = {r.id: r.arrival_s for r in trace}
        return [r.done_s - arrived[r.id] for r in responses]

    def counters(self) -> dict[str, Any]:
        """What the techniques counted while they ran, under the schema's names."""
        kept = ("accept_rate", "mean_accepted", "hit_rate", "false_hit_rate", "kv_bytes")
        return {k: v for k, v in self.engine.stats.items() if k in kept}

    def facts(self, workload: str) -> dict[str, Any]:
        """What every record of this cell says, whatever is timed."""
        from impl.models.costs import weight_bytes

        return {
            "names": self.opponents.names,
            "cell": {
                "techniques": [t.name for t in self.cell.techniques],
                "families": families_of(self.cell),
                "model": self.cell.model,
                "precision": self.cell.precision,
                "batch": self.cell.batch,
                "device": self.device,
                "workload": workload + self.spec.size_note,
            },
            "take_turns": self.pool.one_at_a_time,
            "effect": self.evidence.effect,
            "quality": self.evidence.quality,
            "load_s": self.pool.get(self.cell.techniques, self.cell).load_s,
            "weight_bytes": weight_bytes(self.engine.model),
            "compute_dtype": workloads.dtype_of_compute(self.cell),
        }


def company_of(item: pytest.Function, cell: Cell, pool: Pool) -> dict[str, Cell]:
    """The cells of this table that are still to come, by test; none where models are large."""
    session = item.config.stash.get(STUDY, None)
    if session is None or pool.one_at_a_time:
        return {}
    if pool.weights.are_shared(pool.spec(cell), cell.precision):
        return {}
    both = models_at_fp32(item.config)
    late = comes_late(cell, both)  # nobody is measured before his turn at the cost of others
    return {
        it.nodeid: other
        for it in item.session.items
        if it.nodeid in session.budget.plans
        and getattr(it, "originalname", None) == item.originalname
        and (other := cell_of(it)) is not None and other.workload == cell.workload
        and comes_late(other, both) == late
    }  # fmt: skip


@pytest.fixture
def study(request, cell, evidence, checks, device) -> Study:
    """The cell with its opponents; only a cell whose checks passed gets this far."""
    company = company_of(request.node, cell, checks.pool)
    return Study(cell, checks, evidence, device, company)
