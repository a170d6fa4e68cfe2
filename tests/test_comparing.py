"""Is one run better than another?"""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from reports import compare as comparing
from reports.load import ReportError
from tests.constructed_runs import (
    STACK,
    changed,
    constructed_run,
    main,
    save,
    slowed,
)


def test_a_run_against_itself_is_all_same(constructed, run_of):
    run = run_of(constructed)
    found = comparing.compare(run, run)
    assert {change.verdict for change in found.changes} == {"same"}
    assert found.exit_code == 0
    assert not found.lost
    assert not found.added


def test_a_run_with_wide_intervals_against_itself_is_all_same(constructed, run_of):
    wide = constructed
    for b in constructed["benchmarks"]:
        wide = changed(wide, "+".join(b["extra_info"]["cell"]["techniques"]),
                       speedup_low=0.01, speedup_high=100.0)  # fmt: skip
        break
    run = run_of(wide)
    assert {change.verdict for change in comparing.compare(run, run).changes} == {"same"}


@pytest.mark.parametrize(("factor", "exit_code"), [(1.05, 0), (1.09, 0), (1.2, 1), (2.0, 1)])
def test_a_slowdown_over_ten_percent_is_gated(constructed, run_of, factor, exit_code):
    found = comparing.compare(run_of(constructed), run_of(slowed(constructed, STACK, factor)))
    assert found.exit_code == exit_code
    assert {c.new.cell.stack for c in found.regressed} == ({STACK} if exit_code else set())
    touched = {c.verdict for c in found.changes if c.new.cell.stack == STACK}
    assert touched == {"ambiguous" if factor < 1.06 else "slower"} or factor == 1.05


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_are_antisymmetric(constructed, run_of, seed):
    """What is slower from A to B is faster from B to A, whatever the numbers."""
    rng = random.Random(seed)
    other = constructed
    for stack in ("eager", "torch_compile", STACK, "int8_dynamic"):
        other = slowed(other, stack, math.exp(rng.uniform(-0.3, 0.3)))
    a, b = run_of(constructed), run_of(other)
    there = {c.new.key: c.verdict for c in comparing.compare(a, b).changes}
    back = {c.new.key: c.verdict for c in comparing.compare(b, a).changes}
    opposite = {"faster": "slower", "slower": "faster", "same": "same", "ambiguous": "ambiguous"}
    assert {key: opposite[word] for key, word in there.items()} == back


@pytest.mark.parametrize("seed", range(5))
def test_slower_by_more_is_never_judged_better(constructed, run_of, seed):
    rank = ["slower", "ambiguous", "same", "faster"]
    rng, a = random.Random(seed), run_of(constructed)
    factors = sorted(rng.uniform(1, 1.5) for _ in range(4))
    words = []
    for factor in factors:
        found = comparing.compare(a, run_of(slowed(constructed, STACK, factor)))
        words.append(next(c.verdict for c in found.changes if c.new.cell.stack == STACK))
    assert words == sorted(words, key=rank.index, reverse=True)


def test_overlapping_intervals_are_never_gated(constructed, run_of):
    wide = changed(constructed, STACK, speedup_low=0.5, speedup_high=50.0)
    found = comparing.compare(run_of(wide), run_of(slowed(wide, STACK, 1.5)))
    assert found.exit_code == 0
    assert {c.verdict for c in found.changes if c.new.cell.stack == STACK} == {"ambiguous"}


def test_fewer_than_six_pairs_is_ambiguous(constructed, run_of):
    few = {"pairs": 3, "speedup_low": None, "speedup_high": None, "verdict": "ambiguous"}
    found = comparing.compare(
        run_of(changed(constructed, STACK, **few)),
        run_of(changed(slowed(constructed, STACK, 2), STACK, **few)),
    )
    assert found.exit_code == 0
    assert {c.verdict for c in found.changes if c.new.cell.stack == STACK} == {"ambiguous"}


def test_a_slowdown_that_the_rerun_does_not_repeat_is_not_gated(constructed, run_of):
    old, slow = run_of(constructed), run_of(slowed(constructed, STACK, 1.3))
    assert comparing.compare(old, slow, run_of(constructed)).exit_code == 0
    assert comparing.compare(old, slow, run_of(slowed(constructed, STACK, 1.25))).exit_code == 1


@pytest.mark.parametrize("key", ["peak_bytes", "weight_bytes", "kv_bytes"])
@pytest.mark.parametrize(("factor", "exit_code"), [(1.02, 1), (1.005, 0), (0.5, 0)])
def test_memory_growth_over_one_percent_is_gated(constructed, run_of, key, factor, exit_code):
    grown = changed(constructed, STACK, **{key: lambda old: int(old * factor)})
    found = comparing.compare(run_of(constructed), run_of(grown))
    assert found.exit_code == exit_code
    assert all(key in text for change in found.regressed for text in change.regressions)


def test_a_lost_effect_is_gated(constructed, run_of):
    found = comparing.compare(run_of(constructed), run_of(changed(constructed, STACK, effect=None)))
    assert found.exit_code == 1
    assert "effect lost, it was: constructed" in found.regressed[0].regressions[0]


@pytest.mark.parametrize(
    ("metric", "delta", "budget", "exit_code"),
    [("perplexity", 0.5, 0.3, 1), ("perplexity", -0.5, 0.3, 0), ("accuracy", -0.05, -0.01, 1),
     ("accuracy", 0.05, -0.01, 0), ("kl", 0.1, None, 0)],
)  # fmt: skip
def test_quality_over_its_budget_is_gated(constructed, run_of, metric, delta, budget, exit_code):
    quality = [{"metric": metric, "value": 1 + delta, "baseline": 1.0, "delta": delta,
                "stderr": 0.001, "budget": budget, "data": None}]  # fmt: skip
    worse = changed(constructed, STACK, quality=quality)
    assert comparing.compare(run_of(constructed), run_of(worse)).exit_code == exit_code


def test_quality_on_other_data_is_not_compared(constructed, run_of):
    def other_data(quality):
        return [{**metric, "data": "sha256:other"} for metric in quality]

    moved = changed(slowed(constructed, STACK, 2), STACK, quality=other_data)
    found = comparing.compare(run_of(constructed), run_of(moved))
    assert found.exit_code == 0
    notes = [c.notes for c in found.changes if c.new.cell.stack == STACK]
    assert all("different data" in note[0] for note in notes)


def test_lost_cells_are_listed_with_their_reason(constructed, run_of):
    gone = [b for b in constructed["benchmarks"] if b["extra_info"]["cell"]["techniques"]
            == ["int8_dynamic"]]  # fmt: skip
    lost = {
        **constructed,
        "benchmarks": [b for b in constructed["benchmarks"] if b not in gone],
        "not_run": [{"fullname": gone[0]["fullname"], "cell": gone[0]["extra_info"]["cell"],
                     "reason": "the budget was spent"}],
    }  # fmt: skip
    found = comparing.compare(run_of(constructed), run_of(lost))
    reasons = [reason for _, reason in found.lost]
    assert len(reasons) == len(gone)
    assert reasons.count("the budget was spent") == 1
    assert reasons.count("no record and no reason given") == len(gone) - 1
    assert found.exit_code == 0


def test_lost_cells_can_be_made_to_fail(constructed, tmp_path):
    a = save(tmp_path / "a.json", constructed)
    b = save(tmp_path / "b.json", {**constructed, "benchmarks": constructed["benchmarks"][:-1]})
    assert main(["compare", a, b]) == 0
    assert main(["compare", a, b, "--fail-on-lost"]) == 1


def test_different_hardware_is_refused_and_both_are_named(constructed, tmp_path, capsys):
    a = save(tmp_path / "a.json", constructed)
    cpu = {"brand_raw": "Another Constructed CPU", "count": 2, "arch": "X86_64"}
    b = save(tmp_path / "b.json", constructed_run(cpu=cpu))
    assert main(["compare", a, b]) == 2
    error = capsys.readouterr().err
    assert "no machine" in error
    assert "Another Constructed CPU" in error


def test_different_threads_name_the_option(constructed, run_of):
    with pytest.raises(ReportError, match="--threads"):
        comparing.compare(run_of(constructed), run_of(constructed_run(threads=1)))


def test_times_are_shown_only_where_ceilings_agree(constructed, run_of):
    def with_copy(scale):
        ceilings = json.loads(json.dumps(constructed["ceilings"]))
        ceilings["first"]["copy"]["bytes_per_s"] *= scale
        return run_of({**constructed, "ceilings": ceilings})

    near = comparing.compare(run_of(constructed), with_copy(1.02))
    far = comparing.compare(run_of(constructed), with_copy(1.1))
    assert all(change.time for change in near.changes)
    assert not any(change.time for change in far.changes)
    assert any("copy ceiling moved +10.0 %" in note for note in far.notes)


def test_cells_match_whatever_their_node_id_and_order(constructed, run_of):
    renamed = changed(constructed, "none")
    for b in renamed["benchmarks"]:
        b["fullname"] = b["name"] = "moved/" + b["name"]
        b["extra_info"]["cell"]["techniques"].reverse()
    found = comparing.compare(run_of(constructed), run_of(renamed))
    assert not found.lost
    assert {change.verdict for change in found.changes} == {"same"}


def test_timing_is_part_of_the_match(constructed, run_of):
    found = comparing.compare(
        run_of(constructed), run_of(changed(constructed, STACK, timing="event"))
    )
    assert {r.cell.stack for r, _ in found.lost} == {STACK}


def test_compare_prints_json(constructed, tmp_path, capsys):
    a = save(tmp_path / "a.json", constructed)
    b = save(tmp_path / "b.json", slowed(constructed, STACK, 1.2))
    assert main(["compare", a, b, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["regressed"]
    assert len(said["cells"]) == len(constructed["benchmarks"])


def test_pytest_benchmark_compares_the_same_files(constructed, tmp_path):
    for name in ("0001_a", "0002_b"):
        save(tmp_path / f"{name}.json", constructed)
    tool = Path(sys.executable).with_name("pytest-benchmark")
    command = [tool, "compare", tmp_path / "0001_a.json", tmp_path / "0002_b.json",
               f"--csv={tmp_path / 'table.csv'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(constructed["benchmarks"])
