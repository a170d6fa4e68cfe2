"""How ncu is called, and what its words mean.  Nothing here starts a process but ``asked``."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ncu.metrics import Capability

RANGE = "measured"  # the NVTX range of tests/plugins/ncu.py; node ids are full of ncu's operators
MOST_LAUNCHES = 200
PLACES = (
    "/usr/local/cuda/bin/ncu",
    "/opt/nvidia/nsight-compute/*/ncu",
    "/usr/local/cuda-*/bin/ncu",
    "/usr/local/NVIDIA-Nsight-Compute*/ncu",
)
PYTEST = ("-p", "no:xdist", "-p", "no:cacheprovider", "--benchmark-disable", "-q", "-rfEs")


@dataclass(frozen=True)
class Outcome:
    """What became of one test under ncu: a word, and one sentence with the way out."""

    word: str
    why: str = ""

    @property
    def profiled(self) -> bool:
        """Whether counters were read."""
        return self.word == "profiled"

    @property
    def lasting(self) -> bool:
        """Whether the next test would meet the same."""
        return self.word in ("no ncu", "not permitted", "no driver", "counters busy")


PERMISSION = (
    "the driver keeps its counters to administrators: run as root, give the container "
    "CAP_SYS_ADMIN, or load the module with NVreg_RestrictProfilingToAdminUsers=0"
)
TABLE = (  # first match on ncu's own output and the test's wins
    (r"ERR_NVGPUCTRPERM", "not permitted", PERMISSION),
    (r"failed to connect to the CUDA driver|Driver could not be loaded|LibraryNotLoaded",
     "no driver", "ncu found no usable driver: run outside the sandbox, with libcuda.so of a "
     "driver at least as new as this ncu"),
    (r"driver resource was unavailable", "counters busy", "another profiler holds the counters: "
     "stop DCGM (dcgmi profile --pause) or the other ncu"),
    (r"[Uu]nrecogni[sz]ed option|did not match any section|No metrics to collect|"
     r"Failed to find metric", "bad option", "this ncu does not know an option, section or "
     "metric: see its log, and ncu/metrics.py for what is asked"),
    (r"nsight-compute-lock", "locked", "another user's ncu holds the lock file in TMPDIR: wait "
     "for it, or set TMPDIR to a folder of your own"),
    (r"Failed to (profile|prepare) |reported by the counter measurement library", "ncu failed",
     "ncu could not profile a kernel: see its log in raw/"),
    (r"application returned an error code", "test failed", "the test fails under ncu"),
    (r"No kernels were profiled", "no kernels", "the measured call launched no kernel from the "
     "thread that called it"),
)  # fmt: skip


def find() -> str | None:
    """ncu of ``$NCU``, of the path, or of the usual places; None without one."""
    if given := os.environ.get("NCU"):
        return shutil.which(given)
    if found := shutil.which("ncu"):
        return found
    homes = [f"{home}/bin/ncu" for home in (os.environ.get("CUDA_HOME"),) if home]
    for pattern in (*homes, *PLACES):
        for path in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True):
            if os.access(path, os.X_OK):
                return str(path)
    return None


def child_argv(node: str, extra: Sequence[str] = ()) -> list[str]:
    """pytest on one test, its call made once and not timed."""
    return [sys.executable, "-m", "pytest", node, *PYTEST, *extra]


def argv(
    ncu: str,
    node: str,
    report: Path,
    sections: Sequence[str],
    metrics: Sequence[str],
    extra: Sequence[str] = (),
    any_thread: bool = False,
) -> list[str]:
    """ncu around one test; writes ``report`` (.ncu-rep) and a log beside it.

    ``sections`` empty means ncu's full set; ``extra`` are pytest's arguments.  A push/pop range
    holds the launches of its own thread: ``any_thread`` takes all between profiler start and stop.
    """
    where = [] if any_thread else ["--nvtx", "--nvtx-include", f"{RANGE}/"]  # /: a push/pop range
    what = [word for section in sections for word in ("--section", section)] or ["--set", "full"]
    if metrics:
        what += ["--metrics", ",".join(metrics)]
    return [
        ncu,
        *("--config-file", "off"),  # a user's own config.ncu-cfg must not add to what is asked
        *("--target-processes", "application-only"),
        *where,
        *("--profile-from-start", "off"),
        *("--replay-mode", "kernel", "--graph-profiling", "node"),
        *("--clock-control", "none", "--cache-control", "all"),
        *what,
        "--disable-extra-suffixes",
        *("-c", str(MOST_LAUNCHES)),
        *("-f", "-o", str(report), "--log-file", str(report.with_suffix(".log"))),
        *child_argv(node, extra),
    ]  # fmt: skip


def import_argv(ncu: str, report: Path) -> list[str]:
    """A saved report as CSV, in base units, on standard output."""
    return [ncu, "--import", str(report), "--csv", "--page", "raw", "--print-units", "base",
            "--print-kernel-base", "function"]  # fmt: skip


def environment(base: Mapping[str, str], facts: Path, trace: Path | None = None) -> dict[str, str]:
    """Of the child: it measures nothing, marks its region, and leaves what it knows in ``facts``.

    With ``trace`` the region runs under torch's profiler instead, for want of counters.
    """
    added = {"NCU_CHILD": "1", "NCU_FACTS": str(facts), "PYTHONUNBUFFERED": "1"}
    if trace is not None:
        added["NCU_TRACE"] = str(trace)
    removed = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "REQUIRE_NCU", "NCU_COLLECT")
    return {k: v for k, v in base.items() if k not in removed} | added


def launches(output: str) -> int:
    """Kernels that ncu says it profiled."""
    return len(re.findall(r"^==PROF== Profiling ", output, re.M))


def refused(output: str, asked_for: Sequence[str]) -> list[str]:
    """Names among those asked for that this ncu says it does not know."""
    found = " ".join(re.findall(r"Failed to find metric (\S+)", output)).replace("\\", "")
    return [m for m in asked_for if m in found or f"regex:^{m.rsplit('.', 1)[0]}" in found]


def judge(output: str, actions: int, timed_out: bool = False, seconds: float = 0.0) -> Outcome:
    """The outcome of one call from what it printed and what its report holds.

    ncu's exit status says little: it is mostly 1, and 0 with nothing profiled.
    """
    if timed_out:
        why = f"not done after {seconds:.0f} s: raise --timeout, take a smaller cell, or "
        return Outcome("timeout", why + "--metrics launch")
    for pattern, word, why in TABLE:
        if re.search(pattern, output):
            return Outcome(word, why)
    said = launches(output)
    if said == 0 and actions == 0:
        return Outcome("unknown", "ncu ended without profiling anything; its log is in raw/")
    if actions == 0:
        return Outcome("no kernels", f"ncu profiled {said} kernels, and the report holds none")
    if actions < said:
        return Outcome("truncated", f"the report holds {actions} kernels of the {said} that ncu "
                       "profiled: is the disk full?")  # fmt: skip
    if actions > said:
        return Outcome("unknown", f"the report holds {actions} kernels where ncu announced {said}")
    return Outcome("profiled")


def asked(command: Sequence[str], seconds: float = 20.0) -> str:
    """What a short command prints, or nothing where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


@functools.cache
def version(ncu: str) -> str:
    """ncu's version, such as 2025.3.1.0."""
    found = re.search(r"Version (\S+)", asked([ncu, "--version"]))
    return found.group(1) if found else "unknown"


@functools.cache
def capability() -> Capability | None:
    """Compute capability of the GPU that tests will use, without a CUDA context here."""
    lines = asked(["nvidia-smi", "--query-gpu=index,uuid,compute_cap", "--format=csv,noheader"])
    rows = [[word.strip() for word in line.split(",")] for line in lines.splitlines()]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    for row in rows:
        if len(row) == 3 and re.fullmatch(r"\d+\.\d+", row[2]) and (
            not first or first == row[0] or row[1].startswith(first)
        ):  # fmt: skip
            major, minor = row[2].split(".")
            return int(major), int(minor)
    return None


def restricted() -> str:
    """What the driver says about who may read counters; empty where it says nothing."""
    try:
        text = Path("/proc/driver/nvidia/params").read_text()
    except OSError:
        return ""
    found = re.search(r"RmProfilingAdminOnly: *(\d)", text)
    return f"RmProfilingAdminOnly: {found.group(1)}" if found else ""
