"""Engines of the cells, built once for all tests of a cell, and the checks that admit a number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from impl.core import Engine, members, stack
from impl.fidelity import NEAR_TIE, ROUNDING_DB, loosest, loss_of, sqnr_db
from tests import matrix, workloads
from tests.matrix import Cell
from tests.plugins.pool import Pool
from tests.workloads import Size

# A model whose quality metrics are within budget may still differ by noise; not by as much as this.
NOISE_FLOOR_DB = 6.0  # half the amplitude


@dataclass
class Evidence:
    """What the checks of a cell found."""

    effect: str
    quality: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


class Checks:
    """The checks of a cell, each done once and remembered, failures too."""

    def __init__(self, pool: Pool, selection: matrix.Selection, device: str):
        self.pool, self.selection, self.device = pool, selection, device
        self._done: dict[tuple, Any] = {}
        self._agreed: dict[tuple, int] = {}  # tokens that were the reference's choice: near-ties

    def size(self, cell: Cell) -> Size:
        return workloads.size_of(cell, self.pool.spec(cell), self.selection.size)

    def once(self, what: str, cell: Cell, check):
        """The result of ``check()``, or the failure it ended in, remembered."""
        key = what, cell
        if key not in self._done:
            try:
                self._done[key] = check(), None
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                self._done[key] = None, error
        result, failure = self._done[key]
        if failure is not None:
            raise failure
        return result

    def run(self, cell: Cell):
        """The cell's canonical call, for effects that must see it work."""
        engine, size = self.pool.get(cell.techniques, cell).engine, self.size(cell)
        spec = engine.spec
        if spec.kind == "decoder":
            if is_served(cell):
                return lambda: engine.serve(workloads.trace_of(cell, spec, size))
            ids = workloads.inputs_of(cell, spec, size, self.device)[0]
            return lambda: engine.generate(ids, size.new_tokens)
        inputs = workloads.inputs_of(cell, spec, size, self.device)[0]
        return lambda: engine.forward(inputs)

    def effect(self, cell: Cell) -> str:
        """One sentence of proof per technique that is on; raises ``NotEngaged``."""
        return self.once("effect", cell, lambda: self._effect(cell))

    def _effect(self, cell: Cell) -> str:
        engine = self.pool.get(cell.techniques, cell).engine
        run, proofs = self.run(cell), []
        with torch.inference_mode():
            for t in cell.techniques:
                proofs.append(t.effect(engine, run))
        return "; ".join(proofs)

    def same_output(self, cell: Cell) -> str:
        """The cell's output against the stack without its lossless members."""
        return self.once("same_output", cell, lambda: self._same_output(cell))

    def _same_output(self, cell: Cell) -> str:
        with torch.inference_mode():
            engine = self.pool.get(cell.techniques, cell).engine
            if engine.spec.kind != "decoder":
                inputs = workloads.inputs_of(cell, engine.spec, self.size(cell), self.device)
                noise = min(self.near(cell, engine.forward(x), x) for x in inputs)
                return f"{noise:.0f} dB from eager"
            near_ties = tokens = 0
            for ids, new, out in self._emitted(cell, engine):
                near_ties += self.agree(cell, ids, new, out)
                tokens += new * len(ids)
            return f"{tokens} tokens are the reference's choice, {near_ties} of them near-ties"

    def _emitted(self, cell: Cell, engine: Engine):
        """(prompt (B, T), number of new tokens, prompt and answer) of the canonical call."""
        size = self.size(cell)
        if is_served(cell):
            requests = workloads.trace_of(cell, engine.spec, size)
            answers = engine.serve(requests)
            assert [a.id for a in answers] == [r.id for r in requests], "a request is unanswered"
            for request, answer in zip(requests, answers, strict=True):
                yield request.ids[None], request.max_new_tokens, answer.ids[None]
        else:
            ids = workloads.inputs_of(cell, engine.spec, size, self.device)[0]
            yield ids, size.new_tokens, engine.generate(ids, size.new_tokens)

    def near(self, cell: Cell, output: torch.Tensor, inputs) -> float:
        """dB between the output of a forward and eager's; raises below what the stack promises."""
        spec = self.pool.spec(cell)
        fidelity = loosest(t.fidelity for t in members(cell.techniques, spec.needs))
        limit = ROUNDING_DB[_noise_precision(cell)]
        if fidelity.kind == "close":
            limit = min(limit, fidelity.limit)
        elif fidelity.kind == "budget":
            limit = min(limit, NOISE_FLOOR_DB)
        reference = self.pool.get(stack("eager"), cell).engine
        noise = sqnr_db(reference.forward(inputs), output)
        assert noise >= limit, f"output is {noise:.1f} dB from eager's; {limit:g} dB promised"
        return noise

    def agree(self, cell: Cell, ids: torch.Tensor, new: int, out: torch.Tensor) -> int:
        """Number of near-ties in ``out``; raises where a token is not the reference's choice.

        The reference is the stack without its lossless members; a stack of lossy members alone
        must emit the greedy choices of its own forward.
        """
        from impl.models.quality import tokens_agree

        lossy = tuple(t for t in cell.techniques if not t.fidelity.lossless)
        margin = max([NEAR_TIE[_noise_precision(cell)], *(t.fidelity.near_tie for t in lossy)])
        prompt = ids.shape[1]
        assert out.shape == (len(ids), prompt + new), (
            f"{tuple(out.shape)} tokens returned, {(len(ids), prompt + new)} asked for"
        )
        assert torch.equal(out[:, :prompt], ids), "the prompt was changed"
        # most stacks emit the same tokens, and each does several times: one forward judges them
        of = tuple(t.name for t in lossy), cell.model, cell.precision, cell.batch
        same = of, prompt, margin, tuple(out.shape), out.cpu().numpy().tobytes()
        if same in self._agreed:
            return self._agreed[same]
        reference = self.pool.get(lossy or stack("eager"), cell).engine
        violations, ties = tokens_agree(reference.forward(out), out, prompt, margin)
        assert not violations.any(), (
            f"{int(violations.sum())} of {new * len(ids)} tokens are not the choice of the stack "
            f"without {'+'.join(t.name for t in cell.techniques if t not in lossy) or 'a cache'}"
        )
        self._agreed[same] = int(ties.sum())
        return self._agreed[same]

    def quality(self, cell: Cell) -> list[dict[str, Any]]:
        """Metrics of the cell against eager, each with its budget; over budget fails.

        Measured by forwards of a shape of its own, so once for all batches, and once for all
        stacks that differ only in how they decode or schedule: `same_output` holds those.
        """
        spec = self.pool.spec(cell)
        rewrites = [t.name for t in cell.techniques if matrix.slots_of(t) & {"model", "cache"}]
        lean = "lean" in spec.needs and all(t.host == "lean" for t in cell.techniques)
        of = rewrites or (["lean_decoder"] if lean else ["eager"])
        shared = matrix.Cell(stack(*of), cell.model, cell.precision, batch=0)
        # `eager` itself is held against fp32, what leaves it as it is against `eager`
        return self.once(f"quality {bool(rewrites)}", shared, lambda: self._quality(cell))

    def _quality(self, cell: Cell) -> list[dict[str, Any]]:
        from impl.models.quality import quality_of

        engine = self.pool.get(cell.techniques, cell).engine
        if engine.spec.random_weights:
            return []
        applied = members(cell.techniques, engine.spec.needs)
        budgets = loosest(t.fidelity for t in applied).budgets
        precision = cell.precision
        if [t.name for t in cell.techniques] == ["eager"] and matrix.fits_in_fp32(
            cell, engine.spec, self.device
        ):
            precision = "fp32"  # what low precision itself costs
            budgets = {"perplexity": 0.01, "accuracy": 0.01, "cosine": 0.01}
        reference = self.pool.get(stack("eager"), cell, precision).engine
        with torch.inference_mode():
            found = quality_of(engine, reference, self.selection.profile)
        for metric in found:
            if (worst := budgets.get(metric["metric"])) is None:
                continue
            metric["budget"] = _signed(metric["metric"], worst, metric["baseline"])
            loss = loss_of(metric["metric"], metric["value"], metric["baseline"])
            assert loss <= worst, (
                f"{metric['metric']} {metric['value']:.5g} against {metric['baseline']:.5g}: "
                f"worse by {loss:.3g}, {worst:g} allowed"
            )
        return found

    def evidence(self, cell: Cell) -> Evidence:
        """Everything that must hold before a cell is timed."""
        effect = self.effect(cell)
        note = self.same_output(cell)
        return Evidence(effect, self.quality(cell), note)


def _signed(metric: str, worst: float, baseline: float) -> float:
    """The worst delta (value - baseline) allowed, with the sign of the bad direction."""
    if metric == "perplexity":
        return worst * baseline
    return worst if metric == "kl" else -worst


def _noise_precision(cell: Cell) -> str:
    names = {t.name for t in cell.techniques}
    return "bf16" if "autocast_bf16" in names else cell.precision


def is_served(cell: Cell) -> bool:
    """Whether the cell's technique shows in serving a trace, not in one generation."""
    return any(t.phase == "schedule" or "scheduler" in t.replaces for t in cell.techniques)


@pytest.fixture(scope="session")
def pool(request, device):
    """Engines of this session."""
    pool = Pool(request.config.selection.specs, device)
    yield pool
    pool.close_all()


@pytest.fixture(scope="session")
def checks(request, pool, device) -> Checks:
    """The checks of this session's cells."""
    return Checks(pool, request.config.selection, device)


@pytest.fixture
def engine(cell, pool) -> Engine:
    """The cell's engine: fresh seeded model, techniques applied in phase order."""
    pool.focus(cell)
    return pool.get(cell.techniques, cell).engine


@pytest.fixture
def evidence(cell, engine, checks) -> Evidence:
    """Effect, fidelity and quality of the cell; a cell that is wrong goes no further."""
    return checks.evidence(cell)
