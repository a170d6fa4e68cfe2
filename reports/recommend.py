"""A stack for a service's needs, chosen among cells that were measured. Nothing is extrapolated."""

from collections.abc import Sequence
from dataclasses import dataclass

from reports.load import Record, ReportError, Run
from reports.study import loss_of, metric_of


@dataclass(frozen=True)
class Needs:
    """Limits a stack must keep; None is no limit. Loss is relative, memory in bytes."""

    p99_ms: float | None = None
    max_quality_loss: float | None = None
    max_memory: float | None = None
    cost_per_hour: float | None = None
    model: str | None = None


@dataclass(frozen=True)
class Advice:
    """The cheapest cell that keeps every limit; `refused` counts the others by reason."""

    record: Record
    cost_per_million: float | None
    others: Sequence[Record]
    refused: dict[str, int]


def cost_per_million_tokens(record: Record, cost_per_hour: float) -> float | None:
    """cost per hour / (tokens per second x 3600) x 10^6."""
    rate = record.number("tokens_per_s")
    return cost_per_hour / (rate * 3600) * 1e6 if rate else None


def refusal(record: Record, needs: Needs) -> str | None:
    """Why the cell does not serve, or None. What was not measured cannot be promised."""
    context = record.info.get("context") or {}
    if not record.number("tokens_per_s") or not context.get("new_tokens"):
        return "generates no tokens"
    if needs.p99_ms is not None:
        p99 = record.number("p99_ms")
        if p99 is None:
            return "p99 latency not measured (it needs 459 requests)"
        if p99 > needs.p99_ms:
            return "p99 latency too high"
    if needs.max_quality_loss is not None:
        metric = metric_of(record)
        loss = loss_of(metric) if metric else None
        if loss is None:
            return "quality not measured"
        if loss > needs.max_quality_loss:
            return "quality loss too large"
    if needs.max_memory is not None:
        peak = record.number("peak_bytes")
        if peak is None:
            return "peak memory not measured"
        if peak > needs.max_memory:
            return "needs too much memory"
    return None


def recommend(run: Run, needs: Needs) -> Advice:
    """The stack with the most tokens per second (so the least cost) among those that serve."""
    cells = [r for r in run.records if needs.model in (None, r.cell.model)]
    if not cells:
        known = ", ".join(sorted({r.cell.model for r in run.records}))
        raise ReportError(
            f"{run.path} has no cell of model {needs.model}: choose one of {known}, or measure it "
            "with `pytest --benchmark-only --model`"
        )
    refused: dict[str, int] = {}
    good = []
    for record in cells:
        reason = refusal(record, needs)
        if reason is None:
            good.append(record)
        else:
            refused[reason] = refused.get(reason, 0) + 1
    if not good:
        why = ", ".join(f"{n} x {reason}" for reason, n in sorted(refused.items()))
        raise ReportError(
            f"no measured cell of {run.path} keeps these limits ({why}): loosen one, or measure "
            "more cells"
        )
    good.sort(key=lambda r: -(r.number("tokens_per_s") or 0))
    cost = cost_per_million_tokens(good[0], needs.cost_per_hour) if needs.cost_per_hour else None
    return Advice(good[0], cost, good[1:4], refused)
