"""Reads what ncu saved: rows of metrics, one per profiled kernel, through either of two doors.

1. ``ncu_report``: the wheel ``ncu-report`` (extra ``[ncu]``), or the copy beside ncu itself.
2. ``ncu --import ... --csv``, read by column name.

Both give the same rows: ``{"name": kernel, "metrics": {metric: value in base units}}``.  A metric
that is not there is not in the dict: missing is not zero.  Base units: ns, bytes, Hz, percent.
"""

import csv
import importlib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from impl.core import StudyError
from ncu import command
from ncu.metrics import CAPABILITY

Row = dict[str, Any]

# values in a report are in base units; CSV of some versions is not, whatever it is asked for
_SCALE = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIME = re.compile(r"^([num]?)(s|second)$")
_RATE = re.compile(r"^([KMGT]?)(byte|cycle|hz|inst)(?:/([num]?)(?:s|second))?$")
TEXTS = ("device__attribute_display_name",)


def in_base_units(value: float, unit: str) -> float:
    """Time in ns; bytes, cycles and Hz without prefix, per second where a rate."""
    if match := _TIME.match(unit):
        return value * _SCALE[match[1]] / 1e-9
    if match := _RATE.match(unit):
        return value * _SCALE[match[1]] / _SCALE[match[3] or ""]
    return value


def module(ncu: str | None = None) -> Any:
    """``ncu_report``: the wheel, else the one that came with ncu, else None."""
    try:
        return importlib.import_module("ncu_report")
    except ImportError:
        pass
    for folder in _extras(ncu):
        sys.path.insert(0, str(folder))
        try:
            return importlib.import_module("ncu_report")
        except Exception:  # built for another Python, or half an installation
            continue
        finally:
            sys.path.remove(str(folder))
    return None


def _extras(ncu: str | None) -> Iterable[Path]:
    """Folders where an installed ncu keeps its Python reader, newest first."""
    if ncu:
        yield Path(ncu).resolve().parent / "extras/python"
    for pattern in ("usr/local/cuda*/nsight-compute-*", "opt/nvidia/nsight-compute/*"):
        for home in sorted(Path("/").glob(pattern), reverse=True):
            yield home / "extras/python"


def read(path: Path, reader: Any) -> list[Row]:
    """Rows of a ``.ncu-rep`` through ``reader`` (``ncu_report``).

    Raises ``StudyError`` where there is no report; a file that is no report or was cut short
    gives fewer rows, or none: count them.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise StudyError(f"{path.name} is missing or empty: ncu wrote no report")
    try:
        context = reader.load_report(str(path))
        return [_row(action) for kernels in context for action in kernels]
    except Exception as error:  # what the library raises is not documented
        raise StudyError(f"{path.name} is no report that this reader knows ({error})") from None


def _row(action: Any) -> Row:
    metrics: dict[str, Any] = {}
    for name in action.metric_names():
        if ":" in name or not wanted(name):
            continue
        metric = action.metric_by_name(name)
        value = None if metric is None else metric.value()
        if isinstance(value, str):
            if name in TEXTS:
                metrics[name] = value
        elif value is not None:
            metrics[name] = in_base_units(float(value), metric.unit() or "")
    return {"name": str(action.name()), "metrics": metrics}


def wanted(name: str) -> bool:
    """Whether a metric is worth keeping: not one of the many that only fill the UI's charts."""
    return not name.startswith(("profiler__", "derived__", "pmsampling")) and not re.search(
        r"\.(min|max)(\.|$)|__(function_pcs|context_id|stream_id|device_id)$", name
    )


def read_csv(text: str) -> list[Row]:
    """Rows of ``ncu --import ... --csv --page raw``: a header, a line of units, the kernels."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    head, units, found = table[0], table[1] if len(table) > 1 else [], []
    if "Kernel Name" not in head:
        return []
    for cells in table[2:]:
        if len(cells) != len(head):
            continue  # cut short, or a warning
        given = zip(head, units, cells, strict=True)
        values = {name: _number(name, cell, unit) for name, unit, cell in given if "__" in name}
        metrics = {name: v for name, v in values.items() if v is not None and wanted(name)}
        chip = dict(zip(head, cells, strict=True)).get("CC", "").partition(".")
        if chip[0].isdigit() and chip[2].isdigit():  # the attributes are not in every report
            metrics = {CAPABILITY[0]: float(chip[0]), CAPABILITY[1]: float(chip[2]), **metrics}
        found.append({"name": cells[head.index("Kernel Name")], "metrics": metrics})
    return found


def _number(name: str, cell: str, unit: str) -> float | str | None:
    if name in TEXTS:
        return cell if cell not in ("", "n/a", "no data") else None
    try:
        return in_base_units(float(cell.replace(",", "")), unit)
    except ValueError:  # empty, n/a, a text
        return None


def rows(path: Path, ncu: str | None, expected: int) -> tuple[list[Row], str]:
    """Rows of a report and the door they came through; the CSV where the reader finds fewer.

    Raises ``StudyError`` where neither door opens.
    """
    found: list[Row] = []
    problem = "the package ncu-report is not installed (extra [ncu])"
    reader = module(ncu)
    if reader is not None:
        try:
            found, problem = read(path, reader), ""
        except StudyError as error:
            problem = str(error)
        if found and len(found) >= expected:
            return found, "ncu_report"
    if ncu and path.is_file():
        through_csv = read_csv(command.asked(command.import_argv(ncu, path), 120.0))
        if len(through_csv) > len(found):
            return through_csv, "csv"
    if problem and not found:
        raise StudyError(f"{path.name} cannot be read: {problem}")
    return found, "ncu_report"


def capability_of(kernels: Sequence[Row]) -> command.Capability | None:
    """Compute capability that a report names."""
    for kernel in kernels:
        both = [kernel["metrics"].get(name) for name in CAPABILITY]
        if None not in both:
            return int(both[0]), int(both[1])
    return None
