"""A comparison, or advice, on the terminal and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from reports.compare import Change, Comparison, shown
from reports.load import Interval, Run
from reports.recommend import Advice

COLORS = {"faster": "green", "slower": "red", "same": "dim", "ambiguous": "yellow"}
ORDER = ("slower", "ambiguous", "faster", "same")


def show(found: Comparison, console: Console | None = None) -> None:
    """Regressions last, where the eye ends; unchanged cells are counted, not listed."""
    console = console or Console(width=None if Console().is_terminal else 140)
    console.print(f"old  {found.old.path}  {found.old.when[:16]}  {found.old.commit_short}")
    console.print(f"new  {found.new.path}  {found.new.when[:16]}  {found.new.commit_short}")
    console.print(f"on   {found.new.hardware_name}", highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    changed = [c for c in found.changes if c.verdict != "same" or c.regressions or c.notes]
    if changed:
        console.print(difference_table(sorted(changed, key=rank)))
    counts = {word: sum(c.verdict == word for c in found.changes) for word in ORDER}
    console.print(", ".join(f"{n} {word}" for word, n in counts.items()), highlight=False)
    for record, reason in found.lost:
        console.print(f"lost: {record.cell}: {reason}", style="yellow", highlight=False)
    if found.added:
        console.print(f"{len(found.added)} new cells have nothing to compare with", highlight=False)
    for change in found.regressed:
        for reason in change.regressions:
            console.print(f"REGRESSION {change.new.cell}: {reason}", style="bold red",
                          highlight=False, soft_wrap=True)  # fmt: skip
    if not found.regressed:
        console.print("no regression in time, memory, quality or effect", style="bold green")


def rank(change: Change) -> tuple[int, str]:
    return ORDER.index(change.verdict), str(change.new.cell)


def difference_table(changes: list[Change]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("verdict", "cell", "old speed-up", "new speed-up", "new / old", "time", "memory",
                 "quality, notes"):  # fmt: skip
        table.add_column(name, overflow="fold")
    for c in changes:
        peak = c.memory.get("peak_bytes")
        table.add_row(
            f"[{COLORS[c.verdict]}]{c.verdict}[/]", str(c.new.cell), plain(shown(c.old)),
            plain(shown(c.new)), plain(interval_text(c.ratio)),
            f"{c.time:.2f}x" if c.time else "-", f"{peak:.3f}x" if peak else "-",
            plain("; ".join(c.quality[:2] + c.notes)),
        )  # fmt: skip
    return table


def plain(text: str) -> str:
    """Square brackets of an interval are not rich's markup."""
    return text.replace("[", "\\[")


def interval_text(ratio: Interval | None) -> str:
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (no interval)"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def as_json(found: Comparison) -> dict[str, Any]:
    """The whole comparison; ratios are [value, low, high], above 1 is better."""
    return {
        "old": str(found.old.path),
        "new": str(found.new.path),
        "regressed": bool(found.regressed),
        "notes": found.notes,
        "cells": [
            {
                "cell": c.new.info["cell"],
                "timing": c.new.timing,
                "verdict": c.verdict,
                "ratio": c.ratio and list(c.ratio),
                "time": c.time,
                "memory": c.memory,
                "quality": c.quality,
                "regressions": c.regressions,
                "notes": c.notes,
            }
            for c in found.changes
        ],
        "lost": [{"cell": r.info["cell"], "reason": why} for r, why in found.lost],
        "added": [r.info["cell"] for r in found.added],
    }


def show_advice(run: Run, advice: Advice, console: Console | None = None) -> None:
    console = console or Console(width=None if Console().is_terminal else 140)
    r = advice.record
    say = lambda text: console.print(text, highlight=False, markup=False)  # noqa: E731
    say(f"{r.cell.stack}  ({r.cell.place}, {run.hardware_name})")
    say(f"  {r.number('tokens_per_s'):.0f} tokens/s, speed-up over {r.info['baseline']} {shown(r)}")
    for key, name, scale, unit in (("p99_ms", "p99", 1, "ms"), ("peak_bytes", "peak memory",
                                                                2**20, "MiB")):  # fmt: skip
        if (value := r.number(key)) is not None:
            say(f"  {name} {value / scale:.0f} {unit}")
    if advice.cost_per_million is not None:
        say(f"  cost per million tokens {advice.cost_per_million:.3g} (in the unit of "
            "--cost-per-hour, machine fully used)")  # fmt: skip
    for other in advice.others:
        say(f"  next: {other.cell.stack} at {other.number('tokens_per_s'):.0f} tokens/s "
            f"({other.cell.place})")  # fmt: skip
    for reason, count in sorted(advice.refused.items()):
        say(f"  {count} cells left out: {reason}")
    say(
        "  from this run's workloads alone: measure your own with `pytest --benchmark-only --model`"
    )
