"""Kernel times without counters: torch's profiler, which needs no permission.

Its kernel events carry registers, shared memory, grid, block and *theoretical* occupancy; with the
bytes a cell declares they give a rate.  Marked "no counters" wherever they are shown.
"""

import gzip
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from impl.core import StudyError


def events(path: Path) -> list[dict[str, Any]]:
    """Kernel events of a Chrome trace."""
    try:
        raw = path.read_bytes()
        loaded = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        found = [e for e in loaded["traceEvents"] if isinstance(e, dict)]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise StudyError(f"{path.name} is no profiler trace ({error})") from None
    return [e for e in found if e.get("cat") == "kernel"]


def kernels(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches grouped by kernel and shape, most time first, as in a result's ``kernels``."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for event in found:
        about = event.get("args", {})
        groups[event["name"], *(_volume(about.get(key)) for key in ("grid", "block"))].append(event)
    total = sum(event["dur"] for event in found) or 1.0
    rows = []
    for (name, grid, block), launches in groups.items():
        about, spent = launches[0].get("args", {}), sum(e["dur"] for e in launches)
        occupancy = about.get("est. achieved occupancy %")
        rows.append({
            "name": name, "grid": grid, "block": block, "launches": len(launches),
            "share": spent / total, "ms": spent / 1e3, "bound": "unknown",
            "verdict": "no counters: " + ", ".join(_said(about, spent / len(launches), occupancy)),
            "dram": None, "compute": None, "roof": None, "intensity": None, "top_stall": None,
            "complaints": [],
            "metrics": {key: value for key, value in (
                ("registers per thread", about.get("registers per thread")),
                ("shared memory", about.get("shared memory")),
                ("theoretical occupancy %", occupancy),
            ) if value is not None},
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["ms"])


def _said(about: dict[str, Any], us: float, occupancy: Any) -> list[str]:
    said = [f"{us:.4g} us"]
    if (registers := about.get("registers per thread")) is not None:
        said.append(f"{registers} registers")
    if shared := about.get("shared memory"):
        said.append(f"{shared} bytes of shared memory")
    return said + ([f"at most {occupancy} % occupancy"] if occupancy is not None else [])


def _volume(sizes: Any) -> int | None:
    return math.prod(sizes) if isinstance(sizes, list) else None


def sentence(rows: list[dict[str, Any]], bytes_moved: float | None) -> str:
    """The whole call: time in kernels, and the rate at which it moved its least bytes."""
    ms = sum(row["ms"] for row in rows)
    said = f"no counters: {ms:.4g} ms in {sum(row['launches'] for row in rows)} kernels"
    if bytes_moved and ms:
        said += f", {bytes_moved / ms / 1e6:.4g} GB/s of least traffic"
    return said
