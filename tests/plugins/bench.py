"""The ``bench`` fixture and its session: options, budget, journal, saving; see measure.Bench.

pytest-benchmark keeps its table, JSON, storage and compare: it is only ever handed finished
samples, through its public timer and ``pedantic``.
"""

import contextlib
import gc
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from impl.core import TECHNIQUES
from tests.plugins import budget as budgets
from tests.plugins import journal as journals
from tests.plugins import machine, trace
from tests.plugins.ceilings import Ceilings
from tests.plugins.measure import Bench
from tests.plugins.sampler import clock
from tests.plugins.study import STUDY, Study
from tests.plugins.turns import turns

PRECISION = {"cuda": 0.01, "cpu": 0.03}
FAST_BELOW = 120  # s of budget: then the ceilings are probed quickly
COMPILING_S = 12.0  # before earlier runs tell: what a stack that compiles takes longer to build


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this plugin."""
    group = parser.getgroup("study: measuring")
    group.addoption("--bench-budget", type=float, default=600.0, metavar="SECONDS",
                    help="seconds for the whole selection (default %(default)s)")  # fmt: skip
    group.addoption("--bench-precision", type=float, default=None, metavar="FRACTION",
                    help="half-width of a speed-up's interval at which a cell stops "
                    "(default 0.01 on cuda, 0.03 on cpu)")  # fmt: skip
    group.addoption("--resume", action="store_true",
                    help="skip what the newest interrupted run on this machine and code measured, "
                    "and merge its records")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Set the replay clock; refuse what would spoil every number."""
    option = config.option
    if option.bench_budget <= 0 or not 0 < (option.bench_precision or 0.01) < 1:
        raise pytest.UsageError(
            f"--bench-budget {option.bench_budget:g} and --bench-precision "
            f"{option.bench_precision} must be positive, the precision below 1"
        )
    if option.benchmark_cprofile:
        raise pytest.UsageError(
            "--benchmark-cprofile would profile the replay of samples; take --save-trace"
        )
    off = option.benchmark_disable and not option.benchmark_enable
    spread = getattr(option, "numprocesses", None) or getattr(option, "dist", "no") != "no"
    if spread and not off and not option.benchmark_skip and not hasattr(config, "workerinput"):
        raise pytest.UsageError(
            "-n runs tests side by side, which no timing survives; add --benchmark-disable"
        )
    option.benchmark_timer = "tests.plugins.sampler.clock"


def study_of(config: pytest.Config) -> Study:
    """The session's state, made on first use."""
    if STUDY not in config.stash:
        device = machine.device_of(config)
        folder = config.rootpath / ".benchmarks" / machine.slug(config)
        session = config.pluginmanager.getplugin("pytest-benchmark")
        seconds = config.option.bench_budget
        precision = config.option.bench_precision or PRECISION[device.split(":")[0]]
        version = machine.code_version(config.rootpath)
        config.stash[STUDY] = Study(
            precision=precision,
            budget=budgets.Budget(
                seconds, turns.clock, known=budgets.load_costs(folder / "costs.json")
            ),
            ceilings=Ceilings(device, fast=seconds < FAST_BELOW),
            journal=journals.Journal(folder, machine.fingerprint(config), version),
            device=device,
            enabled=session is not None and not session.disabled and not session.skip,
            trace_folder=trace.folder_of(config, folder / "traces"),
        )
    return config.stash[STUDY]


def needs_compiler(techniques: Iterable[str]) -> bool:
    """Whether building the stack compiles something."""
    known = [TECHNIQUES[name] for name in techniques if name in TECHNIQUES]
    return any(t.requires & {"compiler", "kernels"} for t in known)


def is_cell(item: pytest.Item) -> bool:
    """Whether a test measures."""
    return "bench" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Plan the cells; with ``--resume`` skip those an interrupted run has measured.

    ``--benchmark-only`` leaves out what does not measure, where pytest-benchmark would skip each.
    """
    if config.option.benchmark_only:
        timed: list[pytest.Item] = []
        others: list[pytest.Item] = []
        for item in items:
            measures = "benchmark" in getattr(item, "fixturenames", ())
            (timed if measures else others).append(item)
        if timed and others:
            config.hook.pytest_deselected(items=others)
            items[:] = timed
    cells = [item for item in items if is_cell(item)]
    if not cells or config.option.collectonly:
        return
    study = study_of(config)
    study.cells = {item.nodeid: cell_object(item, study.device) for item in cells}
    if not study.enabled:
        return
    folder = config.rootpath / ".benchmarks" / machine.slug(config)
    if config.option.resume and study.journal.resume(folder):
        for item in cells:
            if entry := study.journal.entries.get(item.nodeid):
                study.keep(item.nodeid, entry["extra_info"], entry["seconds"])
                study.resumed.add(item.nodeid)
                reason = f"measured already, in {study.journal.path.name} (--resume)"
                item.add_marker(pytest.mark.skip(reason=reason), append=False)
    named = set(config.args)
    study.budget.plan(
        budgets.Plan(item.nodeid, cell["model"], tuple(cell["techniques"]),
                     by_name=bool(config.getoption("techniques", ""))
                     or any(item.nodeid == arg or arg.endswith(f"/{item.nodeid}")
                            for arg in named),
                     extra_s=COMPILING_S * needs_compiler(cell["techniques"]))
        for item in cells
        if (cell := study.cells[item.nodeid]) and not item.get_closest_marker("skip")
    )  # fmt: skip


def cell_object(item: pytest.Item, device: str) -> dict[str, Any]:
    """The record's cell object of a test, from its ``cell`` mark."""
    mark = item.get_closest_marker("cell")
    about: dict[str, Any] = dict(mark.kwargs) if mark else {}
    techniques = about.get("techniques", item.name)
    function = getattr(item, "originalname", item.name)
    return {
        "techniques": techniques.split("+") if isinstance(techniques, str) else list(techniques),
        "families": list(about.get("families", ())),
        "model": about.get("model", "none"),
        "precision": about.get("precision", "fp32"),
        "batch": about.get("batch", 1),
        "device": device,
        "workload": about.get("workload", function.removeprefix("test_")),
    }


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is loaded by now stays: later collections need not look at it (195 ms each)."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What stays frozen at exit looks leaked to the libraries that count their objects."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    """The budget begins."""
    if STUDY in session.config.stash:
        session.config.stash[STUDY].budget.start()
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Do not build what there is no time to measure."""
    study = item.config.stash.get(STUDY, None)
    measures = study is not None and study.enabled and is_cell(item)
    if measures and item.get_closest_marker("skip") is None:
        assert study is not None
        if why := study.budget.begin(item.nodeid):
            pytest.skip(why)


@pytest.fixture
def bench(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Measure this test's cell: ``bench(sides, inputs, agree, cell, names=...)``."""
    study = study_of(request.config)
    measuring = Bench(benchmark, study, request.node)
    yield measuring
    sampling = measuring.sampling
    study.budget.done(request.node.nodeid, sampling.seconds, sampling.pairs)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A cell that did not pass is never saved, and owes no excuse for an unused fixture."""
    report = yield
    study = item.config.stash.get(STUDY, None)
    fixture = getattr(item, "funcargs", {}).get("benchmark")
    if report.when == "setup" and fixture is not None and is_cell(item):
        fixture.skipped = True  # until the call ends: Ctrl-C owes no excuse either
    if report.outcome != "passed":
        if fixture is not None:
            fixture.has_error = fixture.skipped = True
        if study is not None and is_cell(item) and item.nodeid not in study.resumed:
            study.not_run.setdefault(item.nodeid, reason_of(report))
            if study.records.pop(item.nodeid, None) is not None:  # failed after filing
                study.journal.retract(item.nodeid)
            study.budget.done(item.nodeid, 0.0)
    return report


def reason_of(report: pytest.TestReport) -> str:
    """One line: why a test was skipped, or how it failed."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    if hasattr(report, "wasxfail"):
        return f"known broken: {report.wasxfail}"
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash else str(report.longrepr)
    return f"failed in {report.when}: {message.splitlines()[0] if message else 'no message'}"


# ---- saving ------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """Before pytest-benchmark saves: last probes, final verdicts, resumed records."""
    config = session.config
    study = config.stash.get(STUDY, None)
    host = config.pluginmanager.getplugin("pytest-benchmark")
    if study is None or not study.enabled or host is None:
        return (yield)
    if session.shouldstop or session.exitstatus == pytest.ExitCode.INTERRUPTED:
        study.marks.append("the run was interrupted; go on with --resume")
        study.settle_verdicts()
    else:
        study.end_timing()
    for name in study.cells:
        if name not in study.records:
            study.not_run.setdefault(name, "the run ended before its turn")
    for name in sorted(study.resumed):
        host.benchmarks.append(journals.metadata_of(study.journal.entries[name], clock))
    study.saved = guard_saving(host, study)
    if not study.records:
        save_without_records(host)
    result = yield
    unfinished = session.exitstatus == pytest.ExitCode.INTERRUPTED or study.journal.complaints
    if study.records and not unfinished:
        study.journal.end(study.saved)
    folder = config.rootpath / ".benchmarks" / machine.slug(config)
    budgets.save_costs(folder / "costs.json", study.budget.fixed)
    if study.journal.complaints:
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
    return result


def guard_saving(host: Any, study: Study) -> bool:
    """Make the host save whole files or none, and never lose a run to a full disk.

    Returns whether anything will be saved.
    """
    store = host.storage.save

    def complain(where: object, error: OSError) -> None:
        study.saved = False
        study.journal.complaints.append(
            f"{where} cannot be written ({error.strerror or error}); the {len(study.records)} "
            f"records of this run are in {study.journal.path}: free some space, then run the "
            "same command with --resume"
        )

    def save_json(run: dict[str, Any]) -> None:
        try:
            write_whole(host.json, run)
        except OSError as error:
            complain(host.json, error)
        else:
            host.logger.info(f"Wrote benchmark data in: {host.json}", purple=True)

    def save(run: dict[str, Any], name: str) -> None:
        before = set(host.storage.path.rglob("*.json"))
        try:
            store(run, name)
        except OSError as error:
            for half in set(host.storage.path.rglob("*.json")) - before:
                half.unlink(missing_ok=True)
            complain(host.storage.path, error)

    host.save_json, host.storage.save = save_json, save
    return bool(host.json or host.save or host.autosave)


def write_whole(path: Path, run: dict[str, Any]) -> None:
    """Write beside the target, then take its place: an older file survives a failure."""
    from pytest_benchmark.utils import safe_dumps

    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(safe_dumps(run, ensure_ascii=True, indent=4))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def save_without_records(host: Any) -> None:
    """pytest-benchmark saves nothing without a measurement; ``not_run`` is worth a file."""
    if host.json or host.save or host.autosave:
        hook, config = host.config.hook, host.config
        commit = hook.pytest_benchmark_generate_commit_info(config=config)
        hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
        run = hook.pytest_benchmark_generate_json(
            config=config, benchmarks=[], include_data=True,
            machine_info=host.get_machine_info(), commit_info=commit,
        )  # fmt: skip
        hook.pytest_benchmark_update_json(config=config, benchmarks=[], output_json=run)
        if host.json:
            host.save_json(run)
        if name := host.save or host.autosave:
            host.storage.save(run, name)
    host.json = host.save = host.autosave = None


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add ``not_run``, ``ceilings``, ``aa`` and ``conditions``; safe to run twice."""
    study = config.stash.get(STUDY, None)
    if study is None:
        return
    output_json.update(study.as_json())
