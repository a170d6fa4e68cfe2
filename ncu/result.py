"""What is kept of a profiled test: one JSON file each, and an index for the report.

``<fullname, spelled for a file>.json``::

    schema    1
    fullname  the test's node id, as in the benchmark's record; ``cell`` its cell object or null
    outcome   ``profiled``, or the word of ncu/command.py's table; ``why`` one sentence
    counters  true: read by ncu; false: from the profiler's kernel events, without counters
    verdict   one sentence for the whole call, from the kernel that takes most of its time
    device    {name, capability}; ``tool`` version of ncu; ``reader`` ncu_report, csv or kineto
    when      UTC; ``seconds`` the whole took; ``launches`` kernels profiled; ``most`` the limit
    bytes_moved, flops, traffic   least work of one call, if the test knows it, and DRAM bytes
              counted over ``bytes_moved``
    kernels   [{name, grid, block, launches, share, ms, verdict, bound, dram, compute, roof,
              intensity, top_stall, complaints, metrics}], most time first: launches of one shape
              together, the numbers those of the one with the median time; ``ms`` the sum

``index.json``: {schema, results: [{fullname, file, outcome, why, counters, verdict, device, gpu}]},
``device`` of the cell (``cuda``), ``gpu`` its name.

Times are those of a profiled kernel: caches flushed, clocks as they were.  They rank kernels and
are never compared with a benchmark's.  Nothing kept names the host, a path or a command line.
"""

import datetime
import getpass
import hashlib
import json
import platform
import re
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from impl.core import StudyError
from ncu import metrics as m
from ncu import verdict
from ncu.report import Row

SCHEMA = 1
LONGEST_NAME = 150
INDEXED = ("fullname", "outcome", "why", "counters", "verdict")


def slug(fullname: str) -> str:
    """A file name for a test; long ones end in a hash."""
    name = re.sub(r"[^\w+-]+", "_", fullname).strip("_")  # no dot: some take it for a suffix
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}_{hashlib.sha256(fullname.encode()).hexdigest()[:8]}"


def scrubbed(text: str) -> str:
    """Text without host, user, addresses, absolute paths and the commands of processes."""
    about = r"(Connected to|Disconnected from) process \d+( \([^)]*\))?"
    text = re.sub(about, r"\1 a process", text)
    for prefix, name in ((sys.prefix, "env"), (sys.base_prefix, "env"), (str(Path.cwd()), "."),
                         (str(Path.home()), "~")):  # fmt: skip
        if len(prefix) > 3:
            text = text.replace(prefix, name)
    hosts = {platform.node(), socket.gethostname(), platform.node().partition(".")[0]}
    for host in sorted(hosts, key=len, reverse=True):
        if len(host) > 2:
            text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "host", text)
    if len(user := _user()) > 2 and user != "root":
        text = re.sub(rf"(?<![\w-]){re.escape(user)}(?![\w-])", "user", text)
    text = re.sub(r"\b\d{1,3}(\.\d{1,3}){3}\b(?!\.\d)", "address", text)
    return re.sub(r"(?<![\w.:~/])/(?:[\w.+@-]+/)+([\w.+@-]+)", r"\1", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def kept(
    found: Mapping[str, Any], capability: m.Capability | None, asked: Iterable[str] = ()
) -> dict[str, Any]:
    """The metrics worth a place in the file: those of the verdict, and those asked for."""
    named = {*m.KEPT, *asked, *(name for roof in m.roofs(capability) for name in roof.names())}
    return {
        name: value
        for name, value in found.items()
        if name in named or name.startswith((m.STALL_PREFIX, m.LIMIT_PREFIX))
    }


def kernels(
    rows: Sequence[Row], capability: m.Capability | None, asked: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Launches grouped by kernel and shape, most time first, each group with its verdict."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["name"], row["metrics"].get(m.GRID), row["metrics"].get(m.BLOCK)].append(row)
    total = sum(row["metrics"].get(m.TIME, 0.0) for row in rows) or 1.0
    found = []
    for (name, grid, block), launches in groups.items():
        launches = sorted(launches, key=lambda row: row["metrics"].get(m.TIME, 0.0))
        middle = launches[(len(launches) - 1) // 2]["metrics"]
        spent = sum(row["metrics"].get(m.TIME, 0.0) for row in launches)
        judged = asdict(verdict.judge(middle, capability))
        judged["verdict"] = judged.pop("sentence")
        found.append({
            "name": scrubbed(name), "grid": grid, "block": block, "launches": len(launches),
            "share": spent / total, "ms": spent / 1e6, **judged,
            "metrics": kept(middle, capability, asked),
        })  # fmt: skip
    return sorted(found, key=lambda kernel: -kernel["ms"])


def traffic(rows: Sequence[Row], bytes_moved: float | None) -> float | None:
    """DRAM bytes counted over the least that the call must move; None where either is unknown."""
    counted = [
        row["metrics"][m.DRAM_RATE] * row["metrics"][m.TIME] * 1e-9
        for row in rows
        if m.DRAM_RATE in row["metrics"] and m.TIME in row["metrics"]
    ]
    return sum(counted) / bytes_moved if counted and bytes_moved else None


def sentence(found: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on a whole call: that of the kernel with most of its time."""
    if not found:
        return ""
    top = found[0]
    if len(found) == 1:
        return str(top["verdict"])
    return f"{top['name']} takes {100 * top['share']:.0f} %: {top['verdict']}"


def result(node: Mapping[str, Any], outcome: Any, **facts: Any) -> dict[str, Any]:
    """The file of one test; ``facts`` override what is empty here."""
    now = datetime.datetime.now(datetime.UTC)
    empty: dict[str, Any] = {
        "schema": SCHEMA, "fullname": node["nodeid"], "cell": node.get("cell"),
        "outcome": outcome.word, "why": scrubbed(outcome.why), "counters": False, "verdict": "",
        "device": None, "tool": None, "reader": None,
        "when": now.isoformat(timespec="seconds"), "seconds": None, "launches": 0, "most": None,
        "bytes_moved": None, "flops": None, "traffic": None, "kernels": [],
    }  # fmt: skip
    unknown = set(facts) - set(empty)
    assert not unknown, f"not in the schema: {unknown}"
    return empty | facts


class Shelf:
    """The folder of results; every write leaves a whole file and an index that knows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        try:
            (folder / "raw").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StudyError(f"--out {folder} cannot be made ({error.strerror})") from None
        for entry in read_index(folder):  # of earlier runs
            self.entries[entry["fullname"]] = entry

    def add(self, kept_result: dict[str, Any]) -> Path:
        """Keep one result, taking the place of an older one of the same test."""
        path = self.folder / f"{slug(kept_result['fullname'])}.json"
        self._write(path, kept_result)
        entry = {key: kept_result[key] for key in INDEXED}
        entry["file"] = path.name
        entry["device"] = (kept_result["cell"] or {}).get("device")
        entry["gpu"] = (kept_result["device"] or {}).get("name")
        self.entries[kept_result["fullname"]] = entry
        index = {"schema": SCHEMA, "results": list(self.entries.values())}
        self._write(self.folder / "index.json", index)
        return path

    def _write(self, path: Path, data: dict[str, Any]) -> None:
        part = path.with_name(path.name + ".part")
        try:
            part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise StudyError(
                f"{path} cannot be written ({error.strerror}): free some space or change --out"
            ) from None


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Entries of a folder's index whose files are there; none where there is no index."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        entries = [e for e in index["results"] if (folder / e["file"]).is_file() and e["fullname"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return entries
