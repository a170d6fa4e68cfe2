"""Runs put together: shards of one run, and the same cells in several fresh processes."""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

from reports.compare import check_hardware
from reports.load import Record, ReportError, Run

UNSTABLE = 0.10
CLAIM_SECONDS = 1e-3  # repeatability is claimed for wall times above 1 ms


def merge(runs: Sequence[Run], *, worst: bool = False) -> dict[str, Any]:
    """The union of shards of one run, as JSON.

    Shards must share hardware and commit. A cell in two of them is an error unless both hold the
    same values, or `worst` asks for the slower one.
    """
    first = runs[0]
    for run in runs[1:]:
        check_hardware(first, run)
        if run.commit != first.commit:
            raise ReportError(
                f"{first.path} is of commit {first.commit_short} and {run.path} of "
                f"{run.commit_short}: measure both shards at one commit"
            )
    kept: dict[tuple[Any, ...], tuple[Record, Run]] = {}
    for run in runs:
        for record in run.records:
            other, whose = kept.get(record.key, (record, run))
            if other.info != record.info or other.stats != record.stats:
                if not worst:
                    raise ReportError(
                        f"{record.cell} has different values in {whose.path} and {run.path}: merge "
                        "shards that do not overlap, or pass --worst to keep the slower"
                    )
                if ratio(other) <= ratio(record):
                    continue
            kept[record.key] = (record, run)
    return assemble(runs, [record for record, _ in kept.values()])


def ratio(record: Record) -> float:
    return record.speedup.value if record.speedup else 0.0


def assemble(runs: Sequence[Run], records: Sequence[Record]) -> dict[str, Any]:
    """A run that holds `records` and what the top levels of `runs` say together."""
    raw = copy.deepcopy(runs[0].raw)
    own = {id(record.info) for record in records}
    raw["benchmarks"] = [
        dict(benchmark)
        for run in runs
        for benchmark in run.raw["benchmarks"]
        if id(benchmark.get("extra_info")) in own
    ]
    measured = {(r.cell.key, r.fullname) for r in records}
    names = {name for _, name in measured}
    not_run = {n["fullname"]: n for run in runs for n in run.raw.get("not_run") or []}
    raw["not_run"] = [entry for name, entry in not_run.items() if name not in names]
    raw["datetime"] = max(run.when for run in runs)
    raw["aa"] = merged_aa(runs)
    raw["ceilings"] = merged_ceilings(runs)
    conditions = [run.raw.get("conditions") or {} for run in runs]
    if any(conditions):
        marks = [mark for c in conditions for mark in c.get("marks") or []]
        raw["conditions"] = {
            **conditions[0],
            "after": conditions[-1].get("after"),
            "marks": list(dict.fromkeys(marks)),
        }
    raw["merged"] = [{"file": run.path.name, "datetime": run.when} for run in runs]
    return raw


def merged_aa(runs: Sequence[Run]) -> dict[str, Any]:
    trials = [run.raw.get("aa") or {} for run in runs]
    floors = [aa["noise_floor"] for aa in trials if aa.get("noise_floor") is not None]
    return {
        "trials": sum(aa.get("trials") or 0 for aa in trials),
        "misses": sum(aa.get("misses") or 0 for aa in trials),
        "noise_floor": max(floors, default=None),
    }


def merged_ceilings(runs: Sequence[Run]) -> dict[str, Any]:
    """The first run's first probes, the last one's last; the largest drift of any run."""
    found = [run.raw.get("ceilings") or {} for run in runs]
    drifts = [c["drift"] for c in found if c.get("drift") is not None]
    return {
        "first": found[0].get("first"),
        "last": found[-1].get("last"),
        "drift": max(drifts, default=None),
    }


def headline(runs: Sequence[Run]) -> dict[str, Any]:
    """The worst of several fresh processes: lowest low, highest high, a verdict if all agree.

    A cell is in it if every process measured it; `headline.cells` says how well each repeats:
    spread = largest speed-up / smallest - 1 over the processes, unstable above 10 %.
    """
    if len(runs) < 2:
        raise ReportError("one process is no repetition: name two runs or more, three for a claim")
    for run in runs[1:]:
        check_hardware(runs[0], run)
        if run.commit != runs[0].commit:
            raise ReportError(
                f"{runs[0].path} is of commit {runs[0].commit_short} and {run.path} of "
                f"{run.commit_short}: run all processes at one commit"
            )
        if run.when == runs[0].when and run.raw == runs[0].raw:
            raise ReportError(
                f"{runs[0].path} and {run.path} are the same run: each process must be its own"
            )
    common = [key for key in runs[0].by_key if all(key in run.by_key for run in runs)]
    if not common:
        raise ReportError("the runs have no cell in common: run all with the same selection")
    middle, cells = [], []
    for key in common:
        records = [run.by_key[key] for run in runs]
        worst, repeat = worst_of(records)
        middle.append(worst)
        if repeat:
            cells.append(repeat)
    raw = assemble(runs, [record for record, _ in middle])
    changed = {id(record.info): info for record, info in middle}
    for benchmark in raw["benchmarks"]:
        benchmark["extra_info"] = changed[id(benchmark["extra_info"])]
    everywhere = set(common)
    raw["not_run"] += [
        {
            "fullname": record.fullname,
            "cell": record.info["cell"],
            "reason": "not measured in every process",
        }
        for record in {r.key: r for run in runs for r in run.records}.values()
        if record.key not in everywhere
    ]
    raw["headline"] = {
        "runs": [{"file": run.path.name, "datetime": run.when} for run in runs],
        "cells": cells,
        **repeatability(cells),
    }
    return raw


def worst_of(records: Sequence[Record]) -> tuple[tuple[Record, dict[str, Any]], dict[str, Any]]:
    """The record of the median speed-up with the worst bounds, and how well the cell repeats."""
    ranked = sorted(records, key=ratio)
    middle = ranked[(len(ranked) - 1) // 2]
    info = copy.deepcopy(middle.info)
    ratios = [r.speedup for r in records if r.speedup]
    if len(ratios) < len(records):
        return (middle, info), {}
    lows = [x.low for x in ratios]
    highs = [x.high for x in ratios]
    known = None not in lows and None not in highs
    info["speedup_low"] = min(x for x in lows if x is not None) if known else None
    info["speedup_high"] = max(x for x in highs if x is not None) if known else None
    verdicts = [r.verdict for r in records]
    if len(set(verdicts)) > 1 or not known:
        info["verdict"] = "ambiguous"
    for which in ("without", "peer"):
        others = [r.info.get(which) for r in records]
        if all(o and o["low"] and o["name"] == middle.info[which]["name"] for o in others):
            info[which]["low"] = min(o["low"] for o in others if o)
            info[which]["high"] = max(o["high"] for o in others if o)
    spread = max(x.value for x in ratios) / min(x.value for x in ratios) - 1
    return (middle, info), {
        "cell": info["cell"],
        "timing": middle.timing,
        "seconds": middle.seconds,
        "speedups": [x.value for x in ratios],
        "verdicts": verdicts,
        "spread": spread,
        "unstable": spread > UNSTABLE,
    }


def repeatability(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over wall times above 1 ms: the median cell's spread, and the share of cells within 10 %."""
    spreads = [c["spread"] for c in cells if c["timing"] == "wall" and c["seconds"] > CLAIM_SECONDS]
    return {
        "claimed_cells": len(spreads),
        "median_spread": statistics.median(spreads) if spreads else None,
        "within_10_percent": (
            sum(s <= UNSTABLE for s in spreads) / len(spreads) if spreads else None
        ),
    }
