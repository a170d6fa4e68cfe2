"""Two saved runs of one machine: what became faster, slower, larger or worse, and what was lost.

Speed is compared through speed-ups: each one is a ratio of samples taken in pairs inside one
process, so the load of the machine on that day divides out. Milliseconds do not have that
property; they are shown only where the ceilings of both runs agree, and gate nothing.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from reports.load import Interval, Record, ReportError, Run, quality_change
from reports.schema import over_budget

Verdict = Literal["same", "faster", "slower", "ambiguous"]
SLOWDOWN = 0.10  # unchanged code shifts 2.7..15 % between runs: disjoint intervals alone are not it
MEMORY_GROWTH = 0.01
CEILINGS_AGREE = 0.03
PRECISION = {"cpu": 0.03, "cuda": 0.01}  # the defaults of --bench-precision
MEMORY_KEYS = ("peak_bytes", "weight_bytes", "kv_bytes")
SOFTWARE = ("torch", "transformers", "triton", "cuda", "driver", "python_version")


@dataclass
class Change:
    """One cell in both runs. `regressions` gate; `notes` inform."""

    old: Record
    new: Record
    verdict: Verdict
    ratio: Interval | None  # new speed-up / old speed-up; above 1 is better
    time: float | None = None  # new median / old median, where the ceilings agree
    memory: dict[str, float] = field(default_factory=dict)  # new / old bytes
    quality: list[str] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Comparison:
    old: Run
    new: Run
    changes: list[Change]
    lost: list[tuple[Record, str]]  # measured before, not now, and why
    added: list[Record]
    notes: list[str]

    @property
    def regressed(self) -> list[Change]:
        return [change for change in self.changes if change.regressions]

    @property
    def exit_code(self) -> int:
        return 1 if self.regressed else 0


def check_hardware(old: Run, new: Run) -> None:
    """ReportError, naming both, where two runs stem from different hardware."""
    if old.hardware == new.hardware:
        return
    parts = sorted({*old.hardware, *new.hardware})
    differ = [part for part in parts if old.hardware.get(part) != new.hardware.get(part)]
    remedy = (
        "run both with the same --threads"
        if differ == ["threads"]
        else "measure both on one machine and compare those"
    )
    raise ReportError(
        f"{old.path} ({old.hardware_name or 'unknown hardware'}) and {new.path} "
        f"({new.hardware_name or 'unknown hardware'}) differ in {', '.join(differ)}: {remedy}"
    )


def compare(old: Run, new: Run, rerun: Run | None = None) -> Comparison:
    """Match cells on coordinates and timing, and judge each (MEASUREMENT: verdicts, gate)."""
    for other in (new, rerun):
        if other is not None:
            check_hardware(old, other)
    agree, notes = ceilings_agree(old, new)
    notes += software_notes(old, new)
    changes = []
    for key, after in new.by_key.items():
        before = old.by_key.get(key)
        if before is not None:
            margin = max(margin_of(old, before), margin_of(new, after))
            again = rerun.by_key.get(key) if rerun else None
            changes.append(judge(before, after, again, margin, agree))
    reasons = {n.cell.key: n.reason for n in new.not_run if n.cell}
    named = {n.fullname: n.reason for n in new.not_run}
    lost = [
        (r, reasons.get(r.cell.key) or named.get(r.fullname) or "no record and no reason given")
        for r in old.records
        if r.key not in new.by_key
    ]
    added = [r for r in new.records if r.key not in old.by_key]
    if not changes:
        raise ReportError(
            f"{old.path} and {new.path} have no cell in common: run both with the same selection"
        )
    return Comparison(old, new, changes, lost, added, notes)


def judge(old: Record, new: Record, again: Record | None, margin: float, times: bool) -> Change:
    ratio = speedup_ratio(old, new)
    change = Change(old, new, verdict(ratio, margin, pairs(old, new)), ratio)
    if texts_differ(old, new):
        change.verdict = "ambiguous"
        change.notes.append("not compared: the runs measured it on different data (hashes differ)")
        return change
    if times:
        change.time = new.seconds / old.seconds
    if same_measurement(old, new):
        change.verdict = "same"
    if is_slowdown(old, new):
        loss = f"speed-up {shown(old)} fell to {shown(new)}"
        if again is None:
            change.regressions.append(loss)
        elif is_slowdown(old, again):
            change.regressions.append(f"{loss}, {shown(again)} in the re-run")
        else:
            change.notes.append(f"{loss}, not confirmed: {shown(again)} in the re-run")
    for key in MEMORY_KEYS:
        before, after = old.number(key), new.number(key)
        if before and after is not None:
            change.memory[key] = after / before
            if after / before > 1 + MEMORY_GROWTH:
                growth = 100 * (after / before - 1)
                change.regressions.append(f"{key} grew {growth:.1f} %: {before:.0f} to {after:.0f}")
    for metric in new.quality:
        if over_budget(metric):
            change.regressions.append(f"{quality_text(metric)} is over its budget")
        change.quality.append(quality_text(metric))
    lost = {m.get("metric") for m in old.quality} - {m.get("metric") for m in new.quality}
    change.notes += [f"{metric} is no longer measured" for metric in sorted(map(str, lost))]
    if old.info.get("effect") and not new.info.get("effect"):
        change.regressions.append(f"effect lost, it was: {old.info['effect']}")
    return change


def speedup_ratio(old: Record, new: Record) -> Interval | None:
    """new / old speed-up; the processes are independent, so log half-widths add in quadrature."""
    a, b = old.speedup, new.speedup
    if a is None or b is None or min(a.value, b.value) <= 0:
        return None
    value = b.value / a.value
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Interval(value, None, None)
    if min(a.low, b.low) <= 0:
        return Interval(value, None, None)
    down = math.hypot(math.log(b.value / b.low), math.log(a.high / a.value))
    up = math.hypot(math.log(b.high / b.value), math.log(a.value / a.low))
    return Interval(value, value * math.exp(-down), value * math.exp(up))


def verdict(ratio: Interval | None, margin: float, pairs: int) -> Verdict:
    """`same` inside the margin; `faster`, `slower` where the interval excludes 1; else unclear."""
    if ratio is None or ratio.low is None or ratio.high is None or pairs < 6:
        return "ambiguous"
    if 1 / (1 + margin) <= ratio.low and ratio.high <= 1 + margin:
        return "same"
    return "faster" if ratio.low > 1 else "slower" if ratio.high < 1 else "ambiguous"


def is_slowdown(old: Record, new: Record) -> bool:
    """Intervals disjoint and more than 10 % slower; never from fewer than six pairs."""
    a, b = old.speedup, new.speedup
    if a is None or b is None or a.low is None or b.high is None or pairs(old, new) < 6:
        return False
    return b.high < a.low and a.value / b.value > 1 + SLOWDOWN


def same_measurement(old: Record, new: Record) -> bool:
    """The very same samples (a run against itself, a cell carried over by --resume)."""
    return old.speedup == new.speedup and old.stats == new.stats and pairs(old, new) >= 6


def pairs(*records: Record) -> int:
    return min(int(record.number("pairs") or 0) for record in records)


def margin_of(run: Run, record: Record) -> float:
    """2 x the precision aimed at, or this machine's A/A noise floor if that is larger."""
    conditions, aa = run.raw.get("conditions") or {}, run.raw.get("aa") or {}
    device = str(record.cell.device).split(":")[0]
    precision = conditions.get("precision") or PRECISION.get(device, PRECISION["cpu"])
    return max(2 * float(precision), float(aa.get("noise_floor") or 0))


def texts_differ(old: Record, new: Record) -> bool:
    before = {m.get("metric"): m.get("data") for m in old.quality if m.get("data")}
    after = {m.get("metric"): m.get("data") for m in new.quality if m.get("data")}
    return any(before[metric] != after[metric] for metric in before.keys() & after.keys())


def quality_text(metric: dict[str, Any]) -> str:
    """'perplexity 12.4 (+0.020 ± 0.010, budget +0.04)'"""
    value = metric.get("value")
    text = f"{metric.get('metric')} " + ("not a number" if value is None else f"{value:.4g}")
    if change := quality_change(metric):
        budget = metric.get("budget")
        text += f" ({change}" + (f", budget {budget:+.3g})" if budget is not None else ")")
    return text


def shown(record: Record) -> str:
    ratio = record.speedup
    if ratio is None:
        return "none"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}x (no interval)"
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"


def ceiling_values(run: Run, when: str = "first") -> dict[str, float]:
    """The probes of a run, flat: 'read 512 MB', 'copy', 'gemm fp32' -> bytes/s or FLOP/s."""
    probes = (run.raw.get("ceilings") or {}).get(when) or {}
    values = {
        f"read {probe['working_set_bytes'] / 1e6:.0f} MB": float(probe["bytes_per_s"])
        for probe in probes.get("read") or []
    }
    if probes.get("copy"):
        values["copy"] = float(probes["copy"]["bytes_per_s"])
    for dtype, probe in (probes.get("gemm") or {}).items():
        values[f"gemm {dtype}"] = float(probe["flops_per_s"])
    return values


def ceilings_agree(old: Run, new: Run) -> tuple[bool, list[str]]:
    """Whether milliseconds of the two runs may be set side by side, and why not."""
    before, after = ceiling_values(old), ceiling_values(new)
    both = before.keys() & after.keys()
    if not both:
        return False, ["times are left out: the runs have no ceiling in common"]
    worst = max(both, key=lambda name: abs(math.log(after[name] / before[name])))
    drift = after[worst] / before[worst] - 1
    if abs(drift) > CEILINGS_AGREE:
        return False, [
            f"times are left out: the {worst} ceiling moved {100 * drift:+.1f} % between the runs"
        ]
    return True, []


def software_notes(old: Run, new: Run) -> list[str]:
    """Versions that moved: a newer baseline lowers a speed-up though our side did not change."""
    before, after = old.machine, new.machine
    return [
        f"{name} {before.get(name)} -> {after.get(name)}: the baseline may have moved"
        for name in SOFTWARE
        if before.get(name) != after.get(name)
    ]
