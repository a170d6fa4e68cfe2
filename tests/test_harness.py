"""The measuring tools measured: every way to a wrong number must end without a number."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.inner import INNER, Run

# ---- cheats ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cheats(tmp_path_factory):
    return Run(
        tmp_path_factory.mktemp("cheats"), "cheats.py", "--bench-budget=119", INNER_PROBE="1"
    )


CAUGHT = {
    "test_work_on_another_stream": "another stream",
    "test_cached_output": "not close",
    "test_zeros": "not close",
    "test_constants": "not close",
    "test_unwritten_buffer": "not close",
    "test_unwritten_memory": "not close",
    "test_fewer_tokens": "returned 6 new tokens, not 8",
    "test_tokens_moved_between_requests": "request 0 got 3 tokens, not 4",
    "test_fewer_tokens_on_the_other_side": "baseline returned 6 new tokens, not 8",
    "test_kl_over_budget": "kl moved by 0.9",
    "test_top1_agreement_over_budget": "top1_agreement moved by -0.3",
    "test_claimed_but_off": "no weight is stored as int8",
    "test_impossible_speed": "memory limit",
    "test_failed_after_it_was_filed": "too late",
    "test_nan_in_the_record": "surprise",
}


@pytest.mark.parametrize(("cheat", "says"), CAUGHT.items(), ids=CAUGHT)
def test_a_cheat_gets_no_number(cheats, cheat, says):
    assert cheat not in cheats.records()
    assert says in cheats.not_run()[cheat]
    assert f"FAILED test_it.py::{cheat}" in cheats.text


def test_every_cheat_of_the_file_is_expected(cheats):
    source = (INNER / "cheats.py").read_text(encoding="utf-8")
    written = set(re.findall(r"^def (test_\w+)", source, re.M))
    honest = {name for name in written if "honest" in name}
    assert written - honest == set(CAUGHT)
    assert set(cheats.records()) == honest


@pytest.mark.parametrize("timing", ["wall", "event"])
def test_a_launch_is_timed_in_full(cheats, timing):
    """Kernels of 1.5 ms against 3 ms that return at once."""
    benchmark = cheats.records()[f"test_honest_launches_in_{timing}_time"]
    assert benchmark["extra_info"]["timing"] == timing
    assert min(benchmark["stats"]["data"]) > 1.5e-3
    assert 1.4 < benchmark["extra_info"]["speedup"] < 2.2


def test_samples_are_saved_bit_for_bit(cheats):
    lines = (cheats.folder / "samples.jsonl").read_text().splitlines()
    taken = dict(map(json.loads, lines))
    for benchmark in cheats.records().values():
        assert benchmark["stats"]["data"] == taken[benchmark["fullname"]]


def test_a_stack_paired_with_itself_is_a_trial(cheats):
    run = cheats.load()
    assert run["aa"]["trials"] == 2
    assert run["conditions"]["threads"] == 1
    assert run["ceilings"]["first"]["read"]
    assert run["ceilings"]["last"]["gemm"]["fp32"]


def test_progress_and_table_without_a_terminal(cheats):
    assert re.search(r"^\.?F?\[\d+/19, \d+:\d\d left\] test_\w+: ", cheats.text, re.M)
    assert re.search(r"^eager \(A/A\) +\d\.\d\dx \(\d", cheats.text, re.M)
    assert "plan: 19 cells within 1:59" in cheats.text


def test_machine_info_names_nobody_and_repeats(cheats):
    info = cheats.load()["machine_info"]
    assert not {"node", "release", "python_build"} & set(info)
    assert not any(key.startswith("hz") for key in info["cpu"])
    assert info["torch"]
    assert info["fingerprint"]


# ---- the host's own tools ----------------------------------------------------------------


def test_pytest_benchmark_reads_our_files(cheats, tmp_path):
    again = tmp_path / "again.json"
    shutil.copy(cheats.json, again)
    table = tmp_path / "table"
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(cheats.json), str(again),
               f"--csv={table}"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "test_honest_a_a" in done.stdout
    assert "test_honest_a_a" in table.with_suffix(".csv").read_text()


def test_benchmark_compare_runs_on_our_files(cheats, tmp_path):
    shutil.copy(cheats.json, tmp_path / "old.json")
    run = Run(tmp_path, "ends.py", "--benchmark-compare=old.json", "-k", "third")
    assert run.code == 0, run.text
    assert "Comparing against benchmarks from: old.json" in run.text


# ---- interruptions -----------------------------------------------------------------------


def test_ctrl_c_keeps_and_resume_merges(tmp_path):
    run = Run(tmp_path, "ends.py", INNER_ENDS="ctrl-c")
    assert run.code == 2, run.text
    first = run.records()
    assert set(first) == {"test_first"}
    assert set(run.not_run()) == {"test_second", "test_third"}
    run = Run(tmp_path, "ends.py", "--resume")
    assert run.code == 0, run.text
    assert "resuming: 1 cells" in run.text
    assert set(run.records()) == {"test_first", "test_second", "test_third"}
    assert run.not_run() == {}
    for kept in ("stats", "group", "fullname"):
        assert run.records()["test_first"][kept] == first["test_first"][kept]
    assert not list(tmp_path.rglob("journal-*.jsonl")), "a saved run needs no journal"


def test_a_crash_keeps_and_resume_merges(tmp_path):
    run = Run(tmp_path, "ends.py", INNER_ENDS="crash")
    assert run.code == 9
    assert not run.json.exists()
    run = Run(tmp_path, "ends.py", "--resume")
    assert set(run.records()) == {"test_first", "test_second", "test_third"}


FULL_DISK = """
import errno, pathlib
real = pathlib.Path.open
def full(path, mode="r", *rest, **options):
    if "r" not in mode and ("out.json" in path.name or ".benchmarks" in path.parts):
        raise OSError(errno.ENOSPC, "No space left on device")
    return real(path, mode, *rest, **options)
pathlib.Path.open = full
"""


def test_a_full_disk_keeps_every_record(tmp_path):
    (tmp_path / "disk.py").write_text(FULL_DISK)
    (tmp_path / "out.json").write_text("older")
    run = Run(tmp_path, "ends.py", "-p", "disk")
    assert run.code == 1, run.text
    assert "No space left on device" in run.text
    assert "--resume" in run.text
    assert run.json.read_text() == "older", "the file of an earlier run was lost"
    run = Run(tmp_path, "ends.py", "--resume")
    assert "resuming: 3 cells" in run.text
    assert set(run.records()) == {"test_first", "test_second", "test_third"}


# ---- selection and options ---------------------------------------------------------------


def test_cells_without_time_are_listed_with_an_estimate(tmp_path):
    run = Run(tmp_path, "ends.py", "--bench-budget=0.05")
    assert run.code == 0, run.text
    assert set(run.records()) | set(run.not_run()) == {"test_first", "test_second", "test_third"}
    reasons = run.not_run()
    assert reasons
    assert all(re.search(r"needs? (about )?[\d.]+ s", reason) for reason in reasons.values())


def test_a_cell_asked_for_by_name_runs_whatever_the_budget(tmp_path):
    run = Run(tmp_path, "ends.py", "--bench-budget=0.2", "test_it.py::test_first")
    assert set(run.records()) == {"test_first"}


def test_nothing_is_timed_under_xdist(tmp_path):
    run = Run(tmp_path, "ends.py", "-n", "1", "--benchmark-disable", "-k", "first")
    assert run.code == 0, run.text
    assert "1 passed" in run.text
    assert not run.json.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-n", "2"], "add --benchmark-disable"),
        (["--benchmark-cprofile=cumtime"], "take --save-trace"),
        (["--bench-budget=0"], "must be positive"),
        (["--bench-precision=2"], "must be positive"),
        (["--save-trace", "test_it.py"], "write =DIR"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_options_that_spoil_numbers_are_refused(tmp_path, options, says):
    run = Run(tmp_path, "ends.py", *options)
    assert run.code == 4, run.text
    assert says in run.text


def test_tokens_are_judged_once_and_other_tokens_again():
    import torch

    from tests.matrix import Selection
    from tests.plugins.engines import Checks

    judged = []

    def forward(ids):  # the choice after each token is the next number
        judged.append(ids)
        return torch.nn.functional.one_hot(ids + 1, 20).float()

    engine = SimpleNamespace(forward=forward)
    pool = SimpleNamespace(get=lambda *_: SimpleNamespace(engine=engine))
    selection = Selection("smoke")
    checks = Checks(pool, selection, "cpu")
    cell = next(iter(selection.cells().values()))
    right = torch.arange(8)[None]
    for other in (cell, cell.of("lean_decoder")):
        assert checks.agree(other, right[:, :5], 3, right.clone()) == 0
    assert len(judged) == 1, "the same tokens were judged twice"
    wrong = right.clone()
    wrong[0, 6] += 1
    for _ in range(2):
        with pytest.raises(AssertionError, match="2 of 3 tokens are not the choice"):
            checks.agree(cell, right[:, :5], 3, wrong)
