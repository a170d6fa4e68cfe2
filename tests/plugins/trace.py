"""``--save-trace``: a pass of its own after the timed ones, and what its events say.

Profiling slows a call by 1.1 to 5 times, so its times only ever show shares.  The functions
below read Chrome trace events (``load_events``) and stand alone.
"""

import gzip
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from impl.core import StudyError
from tests.plugins.memory import running_peak

Event = dict[str, Any]
SPAN = "measured call"
WAIT, WARMUP, ACTIVE = 1, 1, 2
MODULE = "nn.Module: "
SYNCS = re.compile(
    r"aten::(item|_local_scalar_dense|is_nonzero|nonzero|_to_cpu)$"
    r"|cuda(Stream|Device|Event)Synchronize$|Memcpy DtoH.*Pageable"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this plugin."""
    parser.getgroup("study: measuring").addoption(
        "--save-trace",
        nargs="?",
        const="",
        metavar="=DIR",
        help="record a profiler trace of every timed cell (write the = before DIR)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """``--save-trace tests/x.py`` would take the test for a folder."""
    given = config.getoption("save_trace", None) or ""
    if given.endswith(".py") or "::" in given:
        raise pytest.UsageError(f"--save-trace took the test {given} for a folder; write =DIR")


def folder_of(config: pytest.Config, default: Path) -> Path | None:
    """Where traces go, or None when they are off (always under ncu)."""
    given = config.getoption("save_trace", None)
    if given is None or os.environ.get("NCU_CHILD") == "1":
        return None
    return config.rootpath / given if given else default


# ---- recording ---------------------------------------------------------------------------


def record(call: Callable[[], Any], path: Path, device: str = "cpu", stack: bool = False) -> Path:
    """Profile ``call`` (two recorded calls after two unrecorded) into a ``.json.gz`` trace.

    ``stack`` adds nn.Module spans and makes the trace many times larger.  Refused inside another
    profiler, which it would silently end.
    """
    import torch

    if torch.autograd._profiler_enabled():
        raise StudyError("a profiler is already running; record traces outside of it")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_cuda := device.startswith("cuda"):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)
    with torch.profiler.profile(
        activities=activities, schedule=schedule, with_stack=stack, acc_events=True
    ) as profiler:
        for _ in range(WAIT + WARMUP + ACTIVE):
            with torch.profiler.record_function(SPAN):
                call()
            if on_cuda:
                torch.cuda.synchronize()  # outside the span: not one of the call's own
            profiler.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(raw))
        text = scrubbed(raw.read_text(encoding="utf-8", errors="replace"))
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=6) as file:
        file.write(text)
    if on_cuda and not any(e.get("cat") == "kernel" for e in load_events(path)):
        raise StudyError(f"{path} holds no kernel: the call did not use {device}")
    return path


def record_cell(
    call: Callable[[], Any], folder: Path, name: str, cell: Mapping[str, Any]
) -> dict[str, Any]:
    """Trace one cell twice, for operations and for layers; returns the record's ``trace``."""
    path = folder / (re.sub(r"[^\w.+-]+", "_", name).strip("_") + ".json.gz")
    events = load_events(record(call, path, cell["device"]))
    layered = path.with_name(path.name.replace(".json.gz", ".layers.json.gz"))
    with_layers = load_events(record(call, layered, cell["device"], stack=True))
    layered.unlink()  # many times larger, and its times are distorted
    try:
        shown = path.relative_to(Path.cwd())
    except ValueError:
        shown = path
    return {
        "path": str(shown),
        "calls": ACTIVE,
        "top_ops": top_operations(events)[:20],
        "layers": layers(with_layers)[:20],
        "syncs": hidden_syncs(events)[:20],
        "idle_share": idle_share(events),
    }


def scrubbed(text: str) -> str:
    """A trace without the host's name and without absolute paths."""
    text = text.replace(platform.node(), "host") if platform.node() else text
    for prefix, name in ((sys.prefix, "env"), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(prefix) > 3:
            text = text.replace(prefix, name)
    return text


def load_events(path: str | Path) -> list[Event]:
    """The events of a Chrome trace, ``.json`` or ``.json.gz``; times in us."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        loaded = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        events = loaded["traceEvents"] if isinstance(loaded, dict) else loaded
        return [e for e in events if isinstance(e, dict)]
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise StudyError(f"{path} is not a Chrome trace ({error}); record it again") from None


# ---- reading -----------------------------------------------------------------------------


def calls_in(events: Iterable[Event]) -> int:
    """Recorded calls, at least 1."""
    return max(1, sum(e.get("name") == SPAN and e.get("cat") == "user_annotation" for e in events))


def top_operations(events: list[Event]) -> list[dict[str, Any]]:
    """Where one call's time goes: GPU kernels, or CPU operators by self time; largest first.

    [{name, calls, self_ms, share}], per call; shares add up to 1.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    kernels = [e for e in events if e.get("cat") == "kernel"]
    if kernels:
        for e in kernels:
            spent[e["name"]].append(e["dur"])
    else:
        for e, own, _ in _self_times(events, {"cpu_op"}):
            if e["cat"] == "cpu_op":
                spent[e["name"]].append(own)
    return _table(spent, calls_in(events))


def layers(events: list[Event]) -> list[dict[str, Any]]:
    """One call's time by the class of the innermost nn.Module: [{name, calls, self_ms, share,
    top_op}].  Needs a trace with ``stack=True``; time outside any module is ``(no module)``.

    GPU kernels count for the module that launched them (correlation id); CUDA graphs and
    torch.compile break that link.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    ops: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    kernels = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") == "kernel" and "correlation" in e.get("args", {})
    }
    counted = {"cuda_runtime", "cuda_driver"} if kernels else {"cpu_op"}
    for e, own, path in _self_times(events, counted | {"python_function"}):
        if e["cat"] not in counted:
            continue
        what, ms = e, own
        if kernels:
            if (kernel := kernels.get(e.get("args", {}).get("correlation"))) is None:
                continue
            what, ms = kernel, kernel["dur"]
        inside = [p["name"] for p in path if p["name"].startswith(MODULE)]
        module = re.sub(r"_\d+$", "", inside[-1].removeprefix(MODULE)) if inside else "(no module)"
        spent[module].append(ms)
        ops[module][what["name"]] += ms
    rows = _table(spent, calls_in(events))
    return [{**row, "top_op": max(ops[row["name"]].items(), key=lambda x: x[1])[0]} for row in rows]


def hidden_syncs(events: list[Event]) -> list[dict[str, Any]]:
    """Places inside a call where the host waits for the device: [{name, calls, ms, after}].

    ``.item()``, ``.nonzero()``, blocking copies and explicit synchronizations; of nested ones
    only the outermost.  ``after``: the operator before it on the same thread.  On a CPU the wait
    is short, but the same code stalls a GPU.
    """
    found: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    before: dict[Any, str] = {}
    for e, _, path in _self_times(
        events, {"cpu_op", "cuda_runtime", "cuda_driver", "user_annotation"}
    ):
        if e["cat"] == "user_annotation":
            continue
        inside = any(p["name"] == SPAN for p in path)
        if SYNCS.search(e["name"]):
            if inside and not any(SYNCS.search(p["name"]) for p in path):
                found[e["name"], before.get(e["tid"])].append(e["dur"])
        elif e["cat"] == "cpu_op" and not any(p["cat"] == "cpu_op" for p in path):
            before[e["tid"]] = e["name"]
    calls = calls_in(events)
    rows = [
        {"name": name, "calls": len(us) / calls, "ms": sum(us) / 1e3 / calls, "after": after}
        for (name, after), us in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["calls"], row["name"]))


def idle_share(events: list[Event]) -> float | None:
    """Share of the time between its first and last kernel in which the GPU ran none."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
    if not spans:
        return None
    busy, (start, end) = 0.0, spans[0]
    for left, right in spans[1:]:
        if left > end:
            busy, start = busy + end - start, left
        end = max(end, right)
    busy += end - start
    total = max(right for _, right in spans) - spans[0][0]
    return max(0.0, 1 - busy / total) if total else 0.0


def peak_of(events: list[Event]) -> int:
    """Peak of allocated bytes above the start, from the trace's ``[memory]`` events."""
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return running_peak(change for _, change in changes)


def pipeline_breakdown(
    stages: Mapping[str, Callable[[Any], Any]],
    first: Any,
    synchronize: Callable[[], None] = lambda: None,
    rounds: int = 5,
) -> dict[str, dict[str, float]]:
    """End to end, stage by stage: {'tokenize': {'ms', 'share'}, 'transfer': ..., ...}.

    Each stage gets the output of the one before, ``first`` feeds the first; every stage is
    synchronized, so their sum is an upper bound of the pipeline.  Medians over ``rounds``.
    """
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(rounds + 1):  # the first round warms up
        value = first
        for name, stage in stages.items():
            synchronize()
            start = time.perf_counter()
            value = stage(value)
            synchronize()
            taken[name].append((time.perf_counter() - start) * 1e3)
    ms = {name: statistics.median(times[1:]) for name, times in taken.items()}
    total = sum(ms.values())
    return {name: {"ms": t, "share": t / total if total else 0.0} for name, t in ms.items()}


def _table(spent: Mapping[str, list[float]], calls: int) -> list[dict[str, Any]]:
    total = sum(map(sum, spent.values())) or 1.0
    rows = [
        {
            "name": name,
            "calls": len(us) / calls,
            "self_ms": sum(us) / 1e3 / calls,
            "share": min(1.0, sum(us) / total),
        }
        for name, us in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["self_ms"])


def _self_times(events: list[Event], kinds: set[str]) -> Iterator[tuple[Event, float, list[Event]]]:
    """(event, us not spent in events of its kinds inside it, enclosing events) per thread.

    Python spans are containers only: they take no time from the operators' account.
    """
    threads: dict[tuple[Any, Any], list[Event]] = defaultdict(list)
    for e in events:
        if e.get("ph") == "X" and e.get("cat") in kinds and "dur" in e:
            threads[e.get("pid"), e.get("tid")].append(e)
    for mine in threads.values():
        mine.sort(key=lambda e: (e["ts"], -e["dur"]))
        inner: dict[int, float] = defaultdict(float)
        open_: list[Event] = []
        paths: list[tuple[Event, list[Event]]] = []
        for e in mine:
            while open_ and open_[-1]["ts"] + open_[-1]["dur"] <= e["ts"]:
                open_.pop()
            parent = next((p for p in reversed(open_) if p["cat"] == e["cat"]), None)
            if parent is not None:
                inner[id(parent)] += e["dur"]
            paths.append((e, list(open_)))
            open_.append(e)
        for e, path in paths:
            yield e, max(0.0, e["dur"] - inner[id(e)]), path
