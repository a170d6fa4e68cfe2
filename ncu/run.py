"""Runs tests under ncu, one at a time, and keeps what each gave before the next starts."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from impl.core import StudyError
from ncu import command, fallback, metrics, report
from ncu.command import Outcome
from ncu.result import Shelf, kernels, result, scrubbed, sentence, slug, traffic

Node = dict[str, Any]
GRACE = 10.0  # s between asking a process group to end and killing it
TAIL = 12  # lines of pytest's output that are shown
NO_NCU = Outcome("no ncu", "no ncu here: install Nsight Compute (it comes with the CUDA toolkit), "
                 "or set NCU to its path")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One invocation: what is asked of ncu, and how long a test may take."""

    ncu: str | None
    which: str
    out: Path
    timeout: float
    extra: Sequence[str] = ()


def collect(expression: str, tests: Sequence[str], extra: Sequence[str] = ()) -> list[Node]:
    """The measuring tests that pytest's ``-k`` selects: nodeid, cell, device, skip reason or None.

    ``tests`` are files or node ids to choose from, ``extra`` further arguments of pytest.

    Raises ``StudyError`` where it selects none, or pytest refuses the arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "nodes.json"
        argv = [sys.executable, "-m", "pytest", "--collect-only", "-k", expression,
                *command.PYTEST, *extra, *tests]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, check=False,
                              env=os.environ | {"NCU_COLLECT": str(listing)})  # fmt: skip
        if not listing.exists():
            said = tail(done.stdout + done.stderr)
            raise StudyError(f"pytest cannot collect -k {expression!r}: {said}")
        found = json.loads(listing.read_text())
    if not found["nodes"]:
        what = f"-k {expression!r}" if expression else " ".join(tests)
        if others := found["others"]:
            why = f"{others} tests, none of which measures (they lack the bench fixture)"
        else:
            why = "no test; pytest --collect-only -q lists them"
        raise StudyError(f"{what} selects {why}")
    return list(found["nodes"])


def tail(output: str) -> str:
    """Why pytest failed or skipped, in a line: its own short summary, else its last lines."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("==")]
    telling = r"(FAILED|ERROR|SKIPPED|E  )(?!: usage)|.*error: "
    summary = [line for line in lines if re.match(telling, line)]
    return scrubbed(" | ".join(summary[-3:] or lines[-TAIL:]))[-600:] or "it printed nothing"


def call(argv: Sequence[str], env: Mapping[str, str], seconds: float, output: Path) -> bool:
    """Run a process group with its output in a file; whether it was ended for taking too long."""
    with output.open("w") as file:
        process = subprocess.Popen(argv, env=dict(env), stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            return True
        finally:
            end(process)


def end(process: Any) -> None:
    """End a process and whatever it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def text_of(path: Path) -> str:
    """What a file holds, or nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def facts_of(path: Path) -> dict[str, Any] | None:
    """What the region left: proof that the test reached its measured call."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


@dataclass
class Attempt:
    """What the last call of ncu on a test left, and what had to be changed to get there."""

    raw: Path
    names: list[str]
    dropped: list[str] = field(default_factory=list)
    any_thread: bool = False
    late: bool = False
    said: str = ""  # ncu's log, then what the test printed
    reached: dict[str, Any] | None = None

    @property
    def output(self) -> Path:
        """Where the test's own words are."""
        return self.raw.with_suffix(".out")

    def call(self, node: Node, plan: Plan, sections: Sequence[str]) -> None:
        """Run ncu once; nothing of an earlier call is left to be taken for this one's."""
        facts, log = self.raw.with_suffix(".facts.json"), self.raw.with_suffix(".log")
        for old in (self.raw, log, facts, self.output):
            old.unlink(missing_ok=True)
        argv = command.argv(str(plan.ncu), node["nodeid"], self.raw, sections, self.names,
                            plan.extra, any_thread=self.any_thread)  # fmt: skip
        self.raw.with_suffix(".cmd").write_text("\n".join(argv) + "\n")
        env = command.environment(os.environ, facts)
        self.late = call(argv, env, plan.timeout, self.output)
        self.said = text_of(log) + "\n" + text_of(self.output)
        self.reached = facts_of(facts)

    def mended(self) -> bool:
        """Whether there is something to change before another call: unknown counters go, then the
        range, which holds only the launches of its own thread."""
        if self.late or command.launches(self.said):
            return False
        if not self.dropped and (unknown := command.refused(self.said, self.names)):
            self.dropped = unknown
            self.names = [name for name in self.names if name not in unknown]
            return True
        if self.any_thread or command.judge(self.said, 0).word != "no kernels":
            return False
        self.any_thread = on_gpu(self.reached)
        return self.any_thread


def profile(node: Node, plan: Plan, capability: metrics.Capability | None) -> dict[str, Any]:
    """One test under ncu; its result, whatever the outcome."""
    start = time.monotonic()
    sections, names = metrics.chosen(plan.which, capability)
    attempt = Attempt(plan.out / "raw" / f"{slug(node['nodeid'])}.ncu-rep", names)
    attempt.call(node, plan, sections)
    while attempt.mended():
        attempt.call(node, plan, sections)
    rows: list[report.Row] = []
    reader, problem = None, ""
    try:
        rows, reader = report.rows(attempt.raw, plan.ncu, command.launches(attempt.said))
    except StudyError as error:
        problem = str(error)
    attempt.raw.with_suffix(".rows.json").write_text(json.dumps(rows, indent=1))
    outcome = command.judge(attempt.said, len(rows), attempt.late, plan.timeout)
    chip = report.capability_of(rows) or capability
    found, facts = kernels(rows, chip, attempt.names), attempt.reached or {}
    whole = len(rows) < command.MOST_LAUNCHES
    return result(
        node, explained(outcome, attempt, problem, whole), counters=bool(rows),
        verdict=sentence(found) if outcome.profiled else "", device=device_of(rows, chip),
        tool=command.version(str(plan.ncu)), reader=reader,
        seconds=round(time.monotonic() - start, 1), launches=len(rows),
        most=command.MOST_LAUNCHES, bytes_moved=facts.get("bytes_moved"), flops=facts.get("flops"),
        traffic=traffic(rows, facts.get("bytes_moved")) if whole else None, kernels=found,
    )  # fmt: skip


def on_gpu(reached: Mapping[str, Any] | None) -> bool:
    """Whether a test came to its measured call, on a GPU."""
    return str((reached or {}).get("device", "")).startswith("cuda")


def explained(outcome: Outcome, attempt: Attempt, problem: str, whole: bool) -> Outcome:
    """The outcome with what only this run knows: pytest's words, an unreadable file."""
    why, reached = outcome.why, attempt.reached
    if outcome.word == "test failed":
        why = f"the test fails under ncu: {tail(text_of(attempt.output))}"
    elif outcome.word == "no kernels" and reached is None:
        why = f"the test did not reach its measured call: {tail(text_of(attempt.output))}"
    elif outcome.word == "no kernels" and not on_gpu(reached):
        why = f"the measured call ran on {(reached or {}).get('device')}: nothing to profile"
    elif outcome.word == "not permitted" and (said := command.restricted()):
        why += f" ({said})"
    elif not outcome.profiled and problem:
        why += f"; {problem}"
    elif outcome.profiled and attempt.any_thread:
        why = "launched by threads other than the caller's"
    elif outcome.profiled and not whole:
        why = f"only the first {command.MOST_LAUNCHES} launches were profiled"
    if attempt.dropped:
        why = f"{why}; " if why else ""
        why += f"this ncu does not know {', '.join(attempt.dropped)}, which were left out"
    return Outcome(outcome.word, why)


def device_of(rows: Sequence[report.Row], chip: metrics.Capability | None) -> dict[str, Any] | None:
    """Name and compute capability, as the report has them."""
    if not rows:
        return None
    name = rows[0]["metrics"].get(metrics.DEVICE_NAME)
    return {"name": name, "capability": ".".join(map(str, chip)) if chip else None}


def without_counters(node: Node, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """One test under torch's profiler, for want of counters; keeps the outcome that barred them."""
    start, base = time.monotonic(), plan.out / "raw" / slug(node["nodeid"])
    trace, facts = base.with_suffix(".trace.json"), base.with_suffix(".facts.json")
    trace.unlink(missing_ok=True)
    facts.unlink(missing_ok=True)
    output, argv = base.with_suffix(".out"), command.child_argv(node["nodeid"], plan.extra)
    late = call(argv, command.environment(os.environ, facts, trace), plan.timeout, output)
    reached = facts_of(facts) or {}
    try:
        found = fallback.kernels(fallback.events(trace))
        why = outcome.why if found else f"{outcome.why}; the profiler saw no kernel either"
    except StudyError:
        how = f"not done after {plan.timeout:.0f} s" if late else tail(text_of(output))
        found, why = [], f"{outcome.why}; no kernel times either: {how}"
    moved = reached.get("bytes_moved")
    return result(
        node, Outcome(outcome.word, why), verdict=fallback.sentence(found, moved) if found else "",
        reader="kineto", seconds=round(time.monotonic() - start, 1),
        launches=sum(row["launches"] for row in found), bytes_moved=moved,
        flops=reached.get("flops"), kernels=found,
    )  # fmt: skip


def describe_machine(plan: Plan) -> None:
    """What one needs to know when a run far away went wrong, in raw/machine.txt."""
    reader = report.module(plan.ncu)
    words = {
        "ncu": f"{plan.ncu} {command.version(plan.ncu) if plan.ncu else ''}",
        "reader": getattr(reader, "__file__", "none: CSV"),
        "counters": command.restricted() or "the driver says nothing of who may read them",
        "torch": version("torch"),
        "capabilities": "".join(re.findall(r"CapEff.*", text_of(Path("/proc/self/status")))),
        "nvidia-smi": "\n" + command.asked(["nvidia-smi"]),
    }
    text = "\n".join(f"{key}: {value}" for key, value in words.items())
    (plan.out / "raw" / "machine.txt").write_text(text + "\n")


def run(nodes: Sequence[Node], plan: Plan, say: Callable[[str], None] = print) -> int:
    """Profile every test; 0 when every one that could run was, and there was one, else 1.

    Each result is on disk before the next test starts.

    Once counters are barred for good, the rest go to torch's profiler without asking ncu again.
    """
    shelf, failed, done = Shelf(plan.out), 0, 0
    describe_machine(plan)
    capability = command.capability() if plan.ncu else None
    barred = None if plan.ncu else NO_NCU
    say(f"{command.version(plan.ncu) if plan.ncu else 'no ncu'}, compute capability "
        f"{capability or 'unknown'}, {len(nodes)} tests, results in {plan.out}")  # fmt: skip
    for i, node in enumerate(nodes, 1):
        say(f"[{i}/{len(nodes)}] {node['nodeid']}")
        if node["skip"]:
            say(f"    not run: {node['skip']}")
            shelf.add(result(node, Outcome("not run", node["skip"])))
            continue
        if barred is None:
            kept = profile(node, plan, capability)
            found = Outcome(kept["outcome"], kept["why"])
            barred = found if found.lasting else None
        if barred is not None:
            kept = without_counters(node, plan, barred)
        shelf.add(kept)
        done += kept["outcome"] == "profiled"
        failed += kept["outcome"] != "profiled"
        for line in described(kept):
            say(f"    {line}")
    return 0 if done and not failed else 1


def described(kept: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: the outcome, and the kernels that take most of the time."""
    lines = [f"{kept['outcome']}" + (f": {kept['why']}" if kept["why"] else "")
             + f" ({kept['launches']} kernels, {kept['seconds']} s)"]  # fmt: skip
    for kernel in kept["kernels"][:8]:
        lines.append(f"{kernel['launches']}x {kernel['name'][:60]} {kernel['ms']:.4g} ms: "
                     f"{kernel['verdict']}")  # fmt: skip
    if kept["traffic"]:
        lines.append(f"{kept['traffic']:.2f} times the least traffic went through DRAM")
    return lines
