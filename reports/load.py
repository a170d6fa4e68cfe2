"""Saved runs: read them, check that they are ours, find the newest one of each machine.

A run is the JSON that pytest-benchmark writes, with the study's own keys in `extra_info` and at
the top level.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator

from impl.core import StudyError
from reports.schema import schema

PLACES = (Path(".benchmarks"), Path("reports/results"))
KERNEL = "kernel"  # the model of a cell that is one operation
SCRATCH = Path(".benchmarks/running")  # runs in progress: no one's newest run
ROUNDING = 1e-6  # of a value: arithmetic in another order moves a metric of fp32 by less
AXES = ("techniques", "model", "precision", "batch", "device", "workload")
HOW_TO_MAKE_ONE = "make one with `pytest --benchmark-only --benchmark-json=run.json`"


class ReportError(StudyError):
    """Bad input to a report: one sentence that names the input and the remedy."""


class Interval(NamedTuple):
    """A ratio and its 95 % interval; the bounds are None where there were too few pairs."""

    value: float
    low: float | None
    high: float | None

    @property
    def known(self) -> bool:
        return self.low is not None and self.high is not None


def interval(value: Any, low: Any, high: Any) -> Interval | None:
    return None if value is None else Interval(value, low, high)


@dataclass(frozen=True)
class Cell:
    """Coordinates of one measurement. A stack is a set: `techniques` has an order for reading."""

    techniques: tuple[str, ...]
    model: str
    precision: str
    batch: int
    device: str
    workload: str
    families: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: dict[str, Any]) -> "Cell":
        """Raises KeyError or TypeError where a coordinate is missing or not what it should be."""
        axes = {axis: data[axis] for axis in AXES[1:]}
        return cls(tuple(data["techniques"]), families=tuple(data.get("families") or ()), **axes)

    @property
    def key(self) -> tuple[Any, ...]:
        return (tuple(sorted(self.techniques)), *(getattr(self, axis) for axis in AXES[1:]))

    @property
    def group(self) -> tuple[Any, ...]:
        """What cells must share to stand in one plot: everything but the techniques."""
        return (self.workload, self.model, self.precision, self.batch, self.device)

    @property
    def stack(self) -> str:
        return "+".join(self.techniques)

    @property
    def place(self) -> str:
        return f"{self.model} · {self.precision} · batch {self.batch} · {self.workload}"

    def __str__(self) -> str:
        return f"{self.stack} · {self.place}"


@dataclass(frozen=True)
class Record:
    """One measured cell: its coordinates, pytest-benchmark's statistics, the study's numbers."""

    cell: Cell
    name: str
    fullname: str
    stats: dict[str, Any]
    info: dict[str, Any]

    @property
    def timing(self) -> str:
        return str(self.info.get("timing") or "wall")

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.cell.key, self.timing)

    @property
    def seconds(self) -> float:
        """Median seconds per call."""
        return float(self.stats["median"])

    @property
    def speedup(self) -> Interval | None:
        """Baseline time / variant time."""
        info = self.info
        return interval(info.get("speedup"), info.get("speedup_low"), info.get("speedup_high"))

    def against(self, which: str) -> tuple[str, Interval] | None:
        """`without` or `peer`: the other side's name and the ratio, None where there is none."""
        other = self.info.get(which) or {}
        ratio = interval(other.get("speedup"), other.get("low"), other.get("high"))
        return (str(other["name"]), ratio) if ratio and other.get("name") else None

    @property
    def verdict(self) -> str:
        return str(self.info.get("verdict") or "ambiguous")

    @property
    def quality(self) -> list[dict[str, Any]]:
        return list(self.info.get("quality") or [])

    @property
    def is_baseline(self) -> bool:
        return self.cell.stack == self.info.get("baseline")

    def number(self, key: str) -> float | None:
        """A number of `extra_info`, None where it does not apply."""
        value = self.info.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def quality_change(metric: dict[str, Any]) -> str:
    """'+0.009 ± 0.008': against the baseline, to the digits its error leaves; '' if unknown."""
    value, delta, error = (metric.get(key) for key in ("value", "delta", "stderr"))
    if delta is None:
        return ""
    if value is not None and max(abs(delta), error or 0.0) <= ROUNDING * abs(value):
        return "unchanged"
    if not error:
        return f"{delta:+.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{delta:+.{digits}f} ± {error:.{digits}f}"


@dataclass(frozen=True)
class NotRun:
    """A cell without a record, and why."""

    fullname: str
    cell: Cell | None
    reason: str


@dataclass(frozen=True)
class Run:
    """One saved run. `raw` is the JSON as read."""

    path: Path
    raw: dict[str, Any]
    records: list[Record]
    not_run: list[NotRun] = field(default_factory=list)
    foreign: int = 0  # benchmarks in the file that are not cells of the study

    @cached_property
    def by_key(self) -> dict[tuple[Any, ...], Record]:
        return {record.key: record for record in self.records}

    @property
    def machine(self) -> dict[str, Any]:
        return dict(self.raw.get("machine_info") or {})

    @property
    def when(self) -> str:
        return str(self.raw.get("datetime") or "")

    @property
    def commit(self) -> str:
        info = self.raw.get("commit_info") or {}
        return str(info.get("id") or "unversioned") + ("+changes" if info.get("dirty") else "")

    @property
    def commit_short(self) -> str:
        commit, mark, _ = self.commit.partition("+")
        return commit[:12] + mark

    @property
    def headline(self) -> dict[str, Any] | None:
        """Set in a file that `reports headline` wrote from several processes."""
        return self.raw.get("headline")

    @property
    def about(self) -> str:
        """What it measured: ``study``, ``kernels`` alone, or ``headline`` cells several times."""
        if self.headline:
            return "headline"
        kernels = self.records and all(r.cell.model == KERNEL for r in self.records)
        return "kernels" if kernels else "study"

    @cached_property
    def hardware(self) -> dict[str, Any]:
        """What must agree before two runs may be compared (hardware and how much of it is used)."""
        machine = self.machine
        cpu = machine.get("cpu") or {}
        parts = {
            "CPU": cpu.get("brand_raw") or cpu.get("brand") or machine.get("processor"),
            "arch": cpu.get("arch") or machine.get("machine"),
            "cores": cpu.get("count"),
            "ISA": (cpu.get("isa") or [""])[-1].upper().replace("_", " "),  # the best comes last
            "threads": machine.get("threads"),
            "GPU": gpu_names(machine),
        }
        return {name: value for name, value in parts.items() if value}

    @property
    def hardware_name(self) -> str:
        return ", ".join(
            f"{value} {name}" if name in ("cores", "threads") else str(value)
            for name, value in self.hardware.items()
            if name != "arch"
        )

    @property
    def slug(self) -> str:
        """A name for folders and anchors: the GPU where there is one, else the CPU and its ISA.

        Clouds call processors of several generations by one name: what they can do tells them
        apart.
        """
        hardware = self.hardware
        name = f"{hardware.get('CPU', 'machine')} {hardware.get('ISA', '')}"
        name = str(hardware.get("GPU") or name)
        return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def gpu_names(machine: dict[str, Any]) -> str | None:
    """'2x NVIDIA H200' from any of the shapes `machine_info['gpu']` takes, None without a GPU."""
    gpu = machine.get("gpu") or machine.get("gpus")
    gpus = gpu if isinstance(gpu, list) else [gpu] if gpu else []
    names = [str(g.get("name")) if isinstance(g, dict) else str(g) for g in gpus]
    if not names:
        return None
    return names[0] if len(names) == 1 else f"{len(names)}x {names[0]}"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ReportError where there is no file, no JSON or no object."""

    def refuse(word: str) -> float:
        raise ReportError(f"{path} holds a bare {word}, which is not JSON: {HOW_TO_MAKE_ONE} again")

    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist: {HOW_TO_MAKE_ONE}") from None
    except IsADirectoryError:
        raise ReportError(f"{path} is a folder: name the JSON file in it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(
            f"{path} is not JSON ({error}): was its run interrupted? {HOW_TO_MAKE_ONE}"
        ) from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}): check its rights") from None
    if not isinstance(data, dict):
        raise ReportError(
            f"{path} holds a JSON {type(data).__name__}, not a run of this study: {HOW_TO_MAKE_ONE}"
        )
    return data


def load_run(path: str | Path, *, allow_empty: bool = False) -> Run:
    """The run saved in `path`; ReportError where it is missing, malformed, foreign or empty."""
    path = Path(path)
    raw = read_json(path)
    missing = [key for key in ("benchmarks", "machine_info") if key not in raw]
    if missing:
        raise ReportError(
            f"{path} is not a run of this study, it has no {' and no '.join(missing)}: "
            f"{HOW_TO_MAKE_ONE}"
        )
    if not isinstance(raw["benchmarks"], list) or not isinstance(raw["machine_info"], dict):
        raise ReportError(
            f"{path} is not a run of this study, its benchmarks are no list or its machine_info is "
            f"no object: {HOW_TO_MAKE_ONE}"
        )
    records, foreign, lacking = [], 0, ""
    for benchmark in raw["benchmarks"]:
        try:
            records.append(read_record(benchmark))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            foreign += 1
            lacking = lacking or str(error).strip("'")
    complain_of_types(path, raw)
    not_run = [read_not_run(entry) for entry in raw.get("not_run") or []]
    if foreign and not records:
        raise ReportError(
            f"{path} was written by pytest-benchmark, but not by this study: none of its {foreign} "
            f"benchmarks has extra_info.cell and stats as ours do (missing: {lacking}); "
            f"{HOW_TO_MAKE_ONE}"
        )
    if not records and not allow_empty:
        why = f": {not_run[0].reason} (and {len(not_run) - 1} more)" if not_run else ""
        raise ReportError(
            f"{path} has no measured cell{why}; run `pytest --benchmark-only` with a wider -k or a "
            "larger --bench-budget"
        )
    return Run(path, raw, records, not_run, foreign)


def complain_of_types(path: Path, raw: dict[str, Any]) -> None:
    """ReportError at the first value of a wrong type or range.

    Keys that are missing or unknown pass: a run of last year must still be comparable.
    """
    ours = [
        b
        for b in raw["benchmarks"]
        if isinstance(b, dict) and "cell" in (b.get("extra_info") or ())
    ]
    for error in Draft202012Validator(schema()).iter_errors({**raw, "benchmarks": ours}):
        if error.validator not in ("required", "additionalProperties"):
            where = ".".join(str(part) for part in error.absolute_path)
            raise ReportError(
                f"{path} is malformed: {where}: {error.message[:200]}; {HOW_TO_MAKE_ONE} again"
            )


def read_record(benchmark: dict[str, Any]) -> Record:
    """One benchmark of the file as a Record; the error names what is missing."""
    info = benchmark["extra_info"]
    for key in ("cell", "timing", "baseline", "speedup", "verdict"):
        if key not in info:
            raise KeyError(f"extra_info.{key}")
    median = benchmark["stats"]["median"]
    if not isinstance(median, int | float) or not math.isfinite(median) or median <= 0:
        raise ValueError("stats.median above zero")
    name = str(benchmark.get("name", ""))
    cell = Cell.of(info["cell"])
    return Record(cell, name, str(benchmark.get("fullname", name)), benchmark["stats"], info)


def read_not_run(entry: dict[str, Any]) -> NotRun:
    try:
        cell = Cell.of(entry["cell"])
    except (KeyError, TypeError):
        cell = None
    reason = str(entry.get("reason") or "no reason recorded")
    return NotRun(str(entry.get("fullname", "")), cell, reason)


def saved_runs(places: Sequence[Path] = PLACES) -> Iterator[Run]:
    """Every file below `places` that is a run of ours; others are passed over."""
    for place in places:
        for path in sorted(place.rglob("*.json")):
            if not path.is_relative_to(SCRATCH):
                with contextlib.suppress(ReportError):
                    yield load_run(path)


def newest_runs(places: Sequence[Path] = PLACES, about: str = "study") -> list[Run]:
    """The newest run of each machine, by the time stamped in the file; newest first.

    ``about``: which runs, as ``Run.about`` says.  ReportError without any of the study.
    """
    newest: dict[str, Run] = {}
    for run in saved_runs(places):
        if run.about == about:
            kept = newest.setdefault(run.hardware_name, run)
            if run.when > kept.when:
                newest[run.hardware_name] = run
    if not newest and about == "study":
        raise ReportError(
            f"no saved run below {' or '.join(str(place) + '/' for place in places)}: run "
            "`make bench`, or name a file"
        )
    return sorted(newest.values(), key=lambda run: run.when, reverse=True)


def write_json(path: Path, data: dict[str, Any]) -> Path:
    """Write `data` whole or not at all: a full disk leaves the old file as it was."""
    return write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ReportError(
            f"{path} cannot be written ({error.strerror}): free some space or name another place"
        ) from None
    return path
