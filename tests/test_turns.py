"""Do processes that measure side by side run one at a time?"""

import subprocess
import sys

import pytest

from reports.turns import in_turns
from tests.emulated import Ticker
from tests.inner import ROOT
from tests.plugins.sampler import Limits, WallWatch, sample_rounds
from tests.plugins.turns import Turns

CHILD = """
import os, sys, time
from tests.plugins.turns import turns
name, rounds, end, diary = sys.argv[1:]
turns.wait()
for i in range(int(rounds)):
    with open(diary, "a") as file:
        file.write(name)
        file.flush()
        time.sleep(0.02)  # who did not wait would write here
        file.write(name)
    turns.pass_on()
if end == "crash":
    os._exit(9)
turns.leave()
sys.exit(int(end))
"""


def run(diary, *children):
    commands = [[sys.executable, "-c", CHILD, *child, str(diary)] for child in children]
    return in_turns(commands, [diary.with_suffix(f".{i}") for i in range(len(children))])


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_one_runs_at_a_time_and_all_come_round(tmp_path):
    assert run(tmp_path / "diary", ("a", "3", "0"), ("b", "3", "0"), ("c", "3", "0")) == [0, 0, 0]
    assert (tmp_path / "diary").read_text() == "aabbcc" * 3


def test_who_ends_early_or_dies_holds_nobody_up(tmp_path):
    statuses = run(tmp_path / "diary", ("a", "4", "0"), ("b", "1", "crash"), ("c", "2", "3"))
    assert statuses == [0, 9, 3]
    assert (tmp_path / "diary").read_text() == "aabbccaaccaaaa"


def test_a_process_whose_parent_is_gone_goes_on_alone(tmp_path):
    code = (
        "import os; from reports.turns import Child; "
        f"Child([{sys.executable!r}, '-c', {CHILD!r}, 'a', '2', '0', {str(tmp_path / 'diary')!r}],"
        " None).process"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    for _ in range(600):
        if (tmp_path / "diary").exists() and (tmp_path / "diary").read_text() == "aaaa":
            return
        subprocess.run(["sleep", "0.05"], check=True)
    pytest.fail("it still waits for its turn")


def test_alone_there_is_nothing_to_wait_for():
    turns = Turns()
    assert turns.wait() == turns.pass_on() == turns.waited == 0
    turns.leave()


def test_waiting_is_on_no_clock(monkeypatch):
    ticker, waits = Ticker(), []
    monkeypatch.setattr("time.perf_counter", ticker)

    def call(_):
        ticker.now += 1.0

    def pause():
        ticker.now += 50.0
        waits.append(50.0)
        return 50.0

    limits = Limits(seconds=40.0, precision=1e-9, pause=pause)
    rounds = sample_rounds({"variant": call, "baseline": call}, range(4), WallWatch(), limits)
    assert len(rounds) > 10
    assert len(waits) == len(rounds)
