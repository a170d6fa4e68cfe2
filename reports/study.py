"""What a run says: who wins, who is dominated, what adds up, what is missing. No formatting."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from reports.load import KERNEL, Interval, NotRun, Record, Run
from reports.schema import higher_is_better, over_budget

PRIMARY = ("perplexity", "accuracy", "retrieval", "cosine", "top1_agreement", "kl")
PEERS = ("peer_", "bnb_", "torchao_")
LEAN = "lean_decoder"


def is_peer(record: Record) -> bool:
    """Somebody else's implementation: it stands in the tables, it is not ours."""
    return any(name.startswith(PEERS) for name in record.cell.techniques)


def is_kernel(record: Record) -> bool:
    """One operation, not a stack on a model: it has a section of its own."""
    return record.cell.model == KERNEL


def groups(records: Iterable[Record]) -> list[tuple[tuple[Any, ...], list[Record]]]:
    """Records that share everything but the techniques, fastest first, in a stable order."""

    def place(record: Record) -> tuple[str, ...]:
        return (*(f"{part:>6}" if isinstance(part, int) else str(part)
                  for part in record.cell.group), record.timing)  # fmt: skip

    return [
        (key, sorted(found, key=lambda r: -(r.speedup.value if r.speedup else 0)))
        for key, found in groupby(sorted(records, key=place), place)
    ]


def metric_of(record: Record) -> dict[str, Any] | None:
    """The quality metric that speaks for the cell: perplexity or accuracy before agreement, KL."""
    known = [m for m in record.quality if m.get("value") is not None]
    rank = {metric: i for i, metric in enumerate(PRIMARY)}
    return min(known, key=lambda m: rank.get(m["metric"], len(rank)), default=None)


def loss_of(metric: dict[str, Any]) -> float | None:
    """Quality lost, relative to the baseline's value where that is not zero; below 0 is a gain."""
    delta, baseline = metric.get("delta"), metric.get("baseline")
    if delta is None:
        return None
    worse = -delta if higher_is_better(metric["metric"]) else delta
    return worse / abs(baseline) if baseline else worse


def keeps_quality(record: Record) -> bool:
    """No metric is worse than its baseline by more than two standard errors (none: unknown)."""
    return bool(record.quality) and all(
        loss is None or loss <= 1e-9 or loss * abs(m.get("baseline") or 1) <= 2 * (m["stderr"] or 0)
        for m in record.quality
        for loss in [loss_of(m)]
    )


def within_budget(record: Record) -> bool:
    return not any(over_budget(metric) for metric in record.quality)


@dataclass(frozen=True)
class Winner:
    """A row of the headline table. `claim` says among which cells it is the fastest."""

    claim: str
    record: Record


def winners(run: Run) -> list[Winner]:
    """Per model, workload and batch: the fastest that loses nothing, and the fastest in budget.

    Only stacks found faster than the baseline: where none is, the workload has no winner.
    Kernels are no stacks.
    """
    rows = []
    stacks = [r for r in run.records if not is_kernel(r)]

    def place(record: Record) -> tuple[str, str, int, str]:
        cell = record.cell
        return (cell.model, cell.workload, cell.batch, cell.device)

    for _, found in groupby(sorted(stacks, key=place), place):
        cells = [r for r in found if not r.is_baseline and r.info.get("verdict") == "faster"]
        lossless = min((r for r in cells if keeps_quality(r)), key=seconds, default=None)
        fastest = min((r for r in cells if within_budget(r)), key=seconds, default=None)
        if lossless:
            rows.append(Winner("no quality lost", lossless))
        if fastest and fastest is not lossless:
            known = bool(fastest.quality)
            rows.append(Winner("within budget" if known else "quality unmeasured", fastest))
    return rows


def seconds(record: Record) -> float:
    return record.seconds


@dataclass(frozen=True)
class ParetoPoint:
    record: Record
    metric: dict[str, Any]
    dominated_by: Record | None


def pareto(records: Iterable[Record]) -> list[ParetoPoint]:
    """Time against quality, fastest first. Dominated: another is faster and not worse.

    Two values closer than the standard error of the difference count as equal.
    """
    cells = [(r, m) for r in records if (m := metric_of(r))]
    points: list[ParetoPoint] = []
    best: list[tuple[Record, dict[str, Any]]] = []
    for record, metric in sorted(cells, key=lambda pair: pair[0].seconds):
        slack = metric.get("stderr") or 0.0
        sign = -1 if higher_is_better(metric["metric"]) else 1

        def as_good(
            other: tuple[Record, Any], metric: Any = metric, sign: int = sign, slack: float = slack
        ) -> bool:
            same = other[1]["metric"] == metric["metric"]
            return same and sign * (other[1]["value"] - metric["value"]) <= slack

        above = next((other[0] for other in best if as_good(other)), None)
        best.append((record, metric))
        points.append(ParetoPoint(record, metric, above))
    return points


def on_lean(records: Iterable[Record]) -> Callable[[Record], frozenset[str]]:
    """The techniques of a stack as a set; `lean_decoder` is in it where the cell runs on it.

    A single technique paired with the lean decoder shows that the technique runs on it.
    """
    hosted = {
        r.cell.techniques[0]
        for r in records
        if len(r.cell.techniques) == 1 and (r.against("without") or ("",))[0] == LEAN
    } | {LEAN}

    def members(record: Record) -> frozenset[str]:
        names = frozenset(record.cell.techniques) - {"eager"}
        return names | {LEAN} if names & hosted else names

    return members


@dataclass(frozen=True)
class Rung:
    added: tuple[str, ...]
    record: Record
    step: float | None  # speed-up of this rung / speed-up of the one below (unpaired)


def ladder(records: list[Record]) -> list[Rung]:
    """The longest chain of nested stacks that starts at `eager`; among equals the fastest."""
    members = on_lean(records)
    cells = {members(r): r for r in reversed(records) if r.speedup and not is_peer(r)}
    if frozenset() not in cells:
        return []
    best: dict[frozenset[str], list[frozenset[str]]] = {}
    for names in sorted(cells, key=lambda names: (len(names), sorted(names))):
        below = [best[other] for other in best if other < names]

        def height(chain: list[frozenset[str]]) -> tuple[int, float]:
            top = cells[chain[-1]].speedup
            return len(chain), top.value if top else 0.0

        best[names] = [*max(below, key=height, default=[]), names]
    # a ladder ends where it is fastest among the longest ones
    chain = max(best.values(), key=lambda c: (len(c), -cells[c[-1]].seconds))
    rungs: list[Rung] = []
    for names in chain:
        below_names = chain[len(rungs) - 1] if rungs else frozenset()
        ratio = cells[names].speedup
        under = cells[below_names].speedup if rungs else None
        step = ratio.value / under.value if ratio and under else None
        rungs.append(Rung(tuple(sorted(names - below_names)), cells[names], step))
    return rungs


@dataclass(frozen=True)
class Interaction:
    """`term` = measured / product of singles; its interval assumes independent samples."""

    record: Record
    product: float
    term: Interval


def interactions(records: list[Record]) -> list[Interaction]:
    """For each stack whose singles were measured: does the whole keep what the parts promise?"""
    members = on_lean(records)
    singles = {next(iter(r.cell.techniques)): r for r in records if len(r.cell.techniques) == 1}
    found = []
    for record in records:
        names = sorted(members(record) - {LEAN})
        ratio = record.speedup
        if len(names) < 2 or not ratio or not all(name in singles for name in names):
            continue
        base = singles.get(LEAN) if LEAN in members(record) else None
        if LEAN in members(record) and (base is None or base.speedup is None):
            continue
        parts = [s for name in names if (s := singles[name].speedup)]
        if len(parts) < len(names):
            continue
        lean = base.speedup if base and base.speedup else None
        product = math.prod(part.value for part in parts)
        if lean:  # every single holds the lean decoder's gain once; the stack has it once in all
            product /= lean.value ** (len(parts) - 1)
        spread = [half_width(x) for x in (ratio, *parts)]
        spread += [half_width(lean) * (len(parts) - 1)] if lean else []
        width = None if any(math.isnan(s) for s in spread) else math.hypot(*spread)
        term = ratio.value / product
        low, high = (None, None) if width is None else (term / math.exp(width),
                                                        term * math.exp(width))  # fmt: skip
        found.append(Interaction(record, product, Interval(term, low, high)))
    return sorted(found, key=lambda i: -i.term.value)


def half_width(ratio: Interval) -> float:
    """Half the width of the interval in log space, nan where the bounds are unknown."""
    if ratio.low is None or ratio.high is None:
        return math.nan
    return math.log(ratio.high / ratio.low) / 2


FORMATS: tuple[tuple[str, Callable[[str, str], bool]], ...] = (
    ("FP32", lambda name, at: at == "fp32" and name in ("eager", LEAN)),
    ("FP16", lambda name, at: at == "fp16" and name in ("eager", LEAN)),
    ("BF16", lambda name, at: at == "bf16" and name in ("eager", LEAN)),
    ("INT8", lambda name, at: "int8" in name and "kv_cache" not in name),
    ("INT4", lambda name, at: ("int4" in name or "nf4" in name) and "kv_cache" not in name),
    ("FP8", lambda name, at: "fp8" in name and "kv_cache" not in name),
    ("mixed", lambda name, at: name.startswith(("autocast", "mixed_precision"))),
)


@dataclass(frozen=True)
class FormatRow:
    """One technique of one number format; without a record, the reason why there is none."""

    format: str
    record: Record | None
    reason: str = ""


def format_table(records: list[Record], not_run: list[NotRun]) -> list[FormatRow]:
    """FP32, FP16, BF16, INT8, INT4, FP8, mixed: every single technique at its fastest precision.

    `records` share model, batch, device and workload; their precisions differ.
    """
    rows = []
    for label, belongs in FORMATS:
        at: dict[str, Record] = {}
        for record in records:
            if len(record.cell.techniques) == 1:
                name = record.cell.techniques[0]
                faster = name not in at or record.seconds < at[name].seconds
                if belongs(name, record.cell.precision) and faster:
                    at[name] = record
        if at:
            rows += [FormatRow(label, r) for r in sorted(at.values(), key=seconds)]
            continue
        models = {r.cell.model for r in records}
        reasons = [
            n.reason
            for n in not_run
            if n.cell and n.cell.model in models and len(n.cell.techniques) == 1
            and belongs(n.cell.techniques[0], n.cell.precision)
        ]  # fmt: skip
        rows.append(FormatRow(label, None, reasons[0] if reasons else "no such cell was selected"))
    return rows


def reasons(not_run: list[NotRun]) -> list[tuple[str, list[NotRun]]]:
    """Cells not run, by reason, the most frequent first. Numbers in a reason do not split it."""

    def without_numbers(reason: str) -> str:
        """Estimates differ from cell to cell ('needs 3.1 s', 'needs 3.3 s'): one reason."""
        return " ".join("#" if word.strip("s,;:()").replace(".", "").isdigit() else word
                        for word in reason.split())  # fmt: skip

    found: dict[str, list[NotRun]] = {}
    for entry in not_run:
        found.setdefault(without_numbers(entry.reason), []).append(entry)
    named = [(entries[0].reason, entries) for entries in found.values()]
    return sorted(named, key=lambda pair: -len(pair[1]))
