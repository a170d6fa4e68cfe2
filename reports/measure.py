"""`make bench` and `make headline`: pytest in processes of its own, and what they saved."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reports.load import SCRATCH, ReportError, Run, load_run, write_json

RESULTS = Path("reports/results")
PROCESSES = 3
BUDGET = "--bench-budget=690"  # s: `make bench` is done within twelve minutes


def run_pytest(arguments: Sequence[str], json: Path) -> int:
    """One fresh pytest process that saves to `json`; its exit status."""
    json.parent.mkdir(parents=True, exist_ok=True)
    json.unlink(missing_ok=True)
    ours = ["--benchmark-only", f"--benchmark-json={json}"]  # last, so that they win
    try:
        command = [sys.executable, "-m", "pytest", *arguments, *ours]
        return subprocess.run(command, check=False).returncode
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
    """The headline profile in fresh processes; ReportError if one saves nothing."""
    runs = []
    for number in range(1, processes + 1):
        print(f"process {number} of {processes}", flush=True)
        json = SCRATCH / f"headline-{os.getpid()}-{number}.json"
        status = run_pytest(["--profile", "headline", *arguments], json)
        runs.append(saved(json, status))
        if status == 130:
            raise ReportError(f"interrupted; {number} of {processes} runs are in {SCRATCH}/")
    return runs
