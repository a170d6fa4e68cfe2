"""What a person sees: the plan, a line per cell with the time left, and the study's own table."""

import os
from collections.abc import Iterable
from typing import Any

import pytest

from tests.plugins.study import STUDY, Study, is_self_paired

STYLES = {"faster": "green", "slower": "red", "same": "", "ambiguous": "dim"}
KEPT_PER_CELL = 20e3  # bytes of a record with its samples, about


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """The plan: cells, seconds, disk."""
    study = config.stash.get(STUDY, None)
    if study is None or not study.enabled:
        return []
    cells, budget = len(study.budget.plans), study.budget
    known = [budget.known[name] for name in budget.plans if name in budget.known]
    lines = [
        f"plan: {cells} cells within {clock_time(budget.seconds)} "
        f"({clock_time(sum(known))} of it building {len(known)} known cells), "
        f"intervals to {study.precision:.0%}, about {max(1, cells * KEPT_PER_CELL / 1e6):.0f} MB"
    ]
    if study.resumed:
        lines.append(f"resuming: {len(study.resumed)} cells from {study.journal.path.name}")
    return lines


class Progress:
    """Writes one line per finished cell, with or without a terminal, ``-q`` or not."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.told = 0

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Say what came of a cell and how long the rest will take."""
        study = self.config.stash.get(STUDY, None)
        writer = self.config.pluginmanager.getplugin("terminalreporter")
        if study is None or not study.enabled or nodeid not in study.cells or writer is None:
            return
        self.told += 1
        left = clock_time(study.budget.seconds_to_go())
        head = f"[{self.told}/{len(study.cells)}, {left} left] {short(nodeid)}"
        writer.ensure_newline()
        writer.write_line(f"{head}: {outcome(study, nodeid)}")


def pytest_configure(config: pytest.Config) -> None:
    """Progress is written by the process that measures."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config), "study-progress")


def outcome(study: Study, nodeid: str) -> str:
    """A cell's result in a few words."""
    record = study.records.get(nodeid)
    if record is None:
        return study.not_run.get(nodeid, "no result")
    return f"{speedup(record)} {record['verdict']}, {milliseconds(study.medians[nodeid])}"


def speedup(record: dict[str, Any]) -> str:
    """``1.82x (1.79..1.85)``."""
    if record["speedup"] is None:
        return "unpaired"
    text = f"{record['speedup']:.2f}x"
    if record["speedup_low"] is None:
        return f"{text} ({record['pairs']} pairs)"
    return f"{text} ({record['speedup_low']:.2f}..{record['speedup_high']:.2f})"


def milliseconds(seconds: float) -> str:
    """Three digits of ms."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 10 else f"{seconds:.1f} s"


def clock_time(seconds: float) -> str:
    """``4:05``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def short(nodeid: str) -> str:
    """A node id without its file."""
    return nodeid.rpartition("/")[2].rpartition(".py::")[2]


def size(bytes_: float | None) -> str:
    """Bytes in MB."""
    return "" if bytes_ is None else f"{bytes_ / 1e6:.4g} MB"


def quality(record: dict[str, Any]) -> str:
    """The metrics and how far they moved."""
    told = []
    for metric in record["quality"]:
        value, delta = metric["value"], metric["delta"]
        moved = "" if not delta else f" ({delta:+.2g})"
        told.append(f"{metric['metric']} {'?' if value is None else format(value, '.4g')}{moved}")
    return ", ".join(told)


COLUMNS = (
    "stack", "speed-up (95 %)", "verdict", "without", "peer", "time", "of limit", "peak memory",
    "quality",
)  # fmt: skip


def row(study: Study, name: str, record: dict[str, Any]) -> list[str]:
    """One line of the table, in the order of ``COLUMNS``."""
    fraction = record["limit_fraction"]
    stack = "+".join(record["cell"]["techniques"])
    return [
        f"{stack} (A/A)" if is_self_paired(record) else stack,
        speedup(record),
        record["verdict"],
        *(f"{v['speedup']:.2f}x" if (v := record[k]) else "" for k in ("without", "peer")),
        milliseconds(study.medians[name]) + ("" if record["timing"] == "wall" else " device"),
        "" if fraction is None else f"{fraction:.0%} {record['bound']}",
        size(record["peak_bytes"]),
        quality(record),
    ]


def grouped(study: Study) -> dict[str, list[str]]:
    """Names of the measured cells by workload; the title names the baseline."""
    groups: dict[str, list[str]] = {}
    for name, record in study.records.items():
        cell = record["cell"]
        title = (
            f"{cell['workload']}: {cell['model']} {cell['precision']} batch {cell['batch']} on "
            f"{cell['device']}, against {record['baseline']}"
        )
        groups.setdefault(title, []).append(name)
    return groups


def tables(study: Study) -> Iterable[Any]:
    """One rich table per workload."""
    from rich.table import Table
    from rich.text import Text

    for title, names in grouped(study).items():
        rows = [row(study, name, study.records[name]) for name in names]
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        shown = [i for i, _ in enumerate(COLUMNS) if any(r[i] for r in rows)]
        for i in shown:
            table.add_column(COLUMNS[i], no_wrap=COLUMNS[i] != "quality")
        for cells in rows:
            style = STYLES[cells[2]]
            table.add_row(
                *(Text(cells[i], style if COLUMNS[i] == "verdict" else "") for i in shown)
            )
        yield table


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The study's table, effects, what did not run, and how far to trust it all."""
    study = config.stash.get(STUDY, None)
    if study is None or not study.enabled:
        return
    write = terminalreporter.write_line
    if study.records:
        from rich.console import Console

        terminalreporter.section("study")
        width = max(terminalreporter._tw.fullwidth, 160) if not os.isatty(1) else None
        console = Console(width=width, highlight=False, force_terminal=None)
        for table in tables(study):
            with console.capture() as captured:
                console.print(table)
            for line in captured.get().rstrip().splitlines():
                write(line.rstrip())
            write("")
        for name, record in study.records.items():
            if record["effect"] and config.get_verbosity() > 0:
                write(f"effect {short(name)}: {record['effect']}")
    _tell_not_run(study, write, config.get_verbosity())
    _tell_trust(study, write)
    for complaint in study.journal.complaints:
        terminalreporter.write_line(complaint, red=True)


def _tell_not_run(study: Study, write: Any, verbosity: int) -> None:
    reasons: dict[str, list[str]] = {}
    for name, reason in study.not_run.items():
        if name not in study.records:
            reasons.setdefault(reason, []).append(short(name))
    for reason, names in reasons.items():
        shown = names if verbosity > 0 else names[:3]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        write(f"not run: {', '.join(shown)}{more}: {reason}")


def _tell_trust(study: Study, write: Any) -> None:
    if not study.records:
        return
    run = study.as_json()
    aa = run["aa"]
    floor = "unknown" if aa["noise_floor"] is None else f"{aa['noise_floor']:.1%}"
    write(
        f"A/A: {aa['misses']} of {aa['trials']} intervals miss 1; noise floor {floor}; "
        f"the same means within {study.margin():.1%}"
    )
    for mark in run["conditions"]["marks"]:
        write(f"mark: {mark}")
