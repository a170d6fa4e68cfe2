"""Do the commands behind make do what it says?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reports.__main__ import COMMANDS
from reports.load import Interval, ReportError, load_run, newest_runs
from reports.measure import BUDGET
from tests.constructed_runs import STACK, changed, main, save, slowed

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fake_pytest(constructed, monkeypatch, tmp_path):
    """pytest as a process that saves a constructed run, each a little slower, and its arguments."""
    from reports import measure

    called = []

    def run(arguments, json):
        called.append(list(arguments))
        run = slowed(constructed, STACK, 1 + 0.01 * len(called))
        save(json, {**run, "datetime": f"2000-01-0{len(called)}T00:00:00"})
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "run_pytest", run)
    return called


def test_bench_keeps_the_run_and_prints_the_page_last(fake_pytest, tmp_path, capsys):
    assert main(["bench", "--", "-k", "quant"]) == 0
    assert fake_pytest == [[BUDGET, "-k", "quant"]]
    lines = capsys.readouterr().out.splitlines()
    assert Path(lines[-1]).is_file()
    kept = list((tmp_path / "reports" / "results").rglob("*.json"))
    assert [path.name for path in kept] == ["2000-01-01-0000-000000000000.json"]
    assert newest_runs()[0].path.resolve() == kept[0].resolve()


def test_headline_measures_three_fresh_processes(fake_pytest, monkeypatch, capsys):
    from reports import measure

    def in_turns(commands, logs):
        assert logs[0] is None, "the first one's output is shown"
        return [measure.run_pytest(c[3:-2], Path(c[-1].partition("=")[2])) for c in commands]

    monkeypatch.setattr(measure, "in_turns", in_turns)
    assert main(["headline", "--measure"]) == 0
    assert fake_pytest == [["--profile", "headline", *measure.NARROW]] * 3
    written_to = Path(capsys.readouterr().out.splitlines()[-1])
    assert len(load_run(written_to).headline["runs"]) == 3
    assert not list(measure.SCRATCH.glob("*"))
    with pytest.raises(ReportError):  # a headline is no run of the whole profile
        newest_runs()
    assert newest_runs(about="headline")


def test_a_run_that_saved_nothing_is_said(monkeypatch, tmp_path, capsys):
    from reports import measure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "run_pytest", lambda arguments, json: 4)
    assert main(["bench"]) == 2
    assert "status 4" in capsys.readouterr().err


def test_check_accepts_a_valid_run_and_names_a_missing_key(constructed, tmp_path, capsys):
    assert main(["check", save(tmp_path / "good.json", constructed)]) == 0
    assert "4 not run" in capsys.readouterr().out
    bad = changed(constructed, "none")
    del bad["benchmarks"][0]["extra_info"]["effect"]
    assert main(["check", save(tmp_path / "bad.json", bad)]) == 2
    assert "effect" in capsys.readouterr().err


def test_python_dash_m_reports_lists_its_commands():
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-m", "reports", "--help"], cwd=ROOT, check=True,
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert all(command in done.stdout for command in COMMANDS)


def test_an_interval_without_bounds_is_not_known():
    assert not Interval(1.0, None, None).known
