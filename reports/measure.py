"""`make bench` and `make headline`: pytest in processes of its own, and what they saved."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reports.load import SCRATCH, ReportError, Run, load_run, write_json
from reports.turns import in_turns

RESULTS = Path("reports/results")
PROCESSES = 3
NARROW = ["--bench-precision=0.01"]  # narrow enough to tell 3 % between processes
BUDGET = "--bench-budget=690"  # s: `make bench` is done within twelve minutes


def command(arguments: Sequence[str], json: Path) -> list[str]:
    """pytest over the tests that measure, saving to `json`."""
    ours = ["--benchmark-only", f"--benchmark-json={json}"]  # last, so that they win
    return [sys.executable, "-m", "pytest", *arguments, *ours]


def run_pytest(arguments: Sequence[str], json: Path) -> int:
    """One fresh pytest process that saves to `json`; its exit status."""
    json.parent.mkdir(parents=True, exist_ok=True)
    json.unlink(missing_ok=True)
    try:
        return subprocess.run(command(arguments, json), check=False).returncode
    except KeyboardInterrupt:  # pytest got it too, and has saved what was measured
        return 130


def saved(json: Path, status: int) -> Run:
    if not json.exists():
        raise ReportError(
            f"pytest ended with status {status} and saved no run: its output above says why"
        )
    return load_run(json)


def keep(run: Run, suffix: str = "", folder: Path = RESULTS) -> Path:
    """Copy a run to results/<machine>/<date>-<commit>.json, where `reports build` finds it."""
    return write_json(folder / run.slug / f"{stamp(run)}{suffix}.json", run.raw)


def stamp(run: Run) -> str:
    """'2026-01-31-1405-0123456789ab': when and of which commit, sortable."""
    return f"{run.when[:16].replace('T', '-').replace(':', '')}-{run.commit_short}"


def bench(arguments: Sequence[str]) -> tuple[int, Path]:
    """Measure the default profile, keep the run; pytest's exit status and the file."""
    json = SCRATCH / f"bench-{os.getpid()}.json"
    status = run_pytest([BUDGET, *arguments], json)
    path = keep(saved(json, status))
    json.unlink(missing_ok=True)
    return status, path


def repeat(arguments: Sequence[str], processes: int = PROCESSES) -> list[Run]:
    """The headline profile in fresh processes, which pass the turn on after every round of samples.

    So all of them meet the same machine: one after another they would differ by how busy its
    neighbours were.  The first one's output is shown, the others' is in files beside their runs.
    Raises ReportError if one saves nothing.
    """
    files = [SCRATCH / f"headline-{os.getpid()}-{n}.json" for n in range(1, processes + 1)]
    logs = [None, *(file.with_suffix(".log") for file in files[1:])]
    print(f"{processes} processes in turns; {', '.join(map(str, logs[1:]))} log the others")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    options = ["--profile", "headline", *NARROW, *arguments]
    statuses = in_turns([command(options, file) for file in files], logs)
    if 130 in statuses:
        raise ReportError(f"interrupted; what was measured is in {SCRATCH}/")
    for file, log, status in zip(files, logs, statuses, strict=True):
        if log and not file.exists():
            raise ReportError(f"a process ended with status {status}, saved no run: {log} says why")
    runs = [saved(file, status) for file, status in zip(files, statuses, strict=True)]
    for log in filter(None, logs):
        log.unlink(missing_ok=True)
    return runs
