"""Do shards and repeated processes make one run?"""

import json

import pytest

from reports import merge, schema
from reports.load import ReportError
from tests.constructed_runs import (
    STACK,
    changed,
    constructed_run,
    main,
    record_of,
    save,
    slowed,
    three,
)


def shard(run, which, of=2):
    return {**run, "benchmarks": run["benchmarks"][which::of]}


def test_shards_merge_to_the_whole(constructed, run_of):
    merged = merge.merge([run_of(shard(constructed, 0)), run_of(shard(constructed, 1))])
    schema.validate_run(merged)
    names = [b["fullname"] for b in merged["benchmarks"]]
    assert sorted(names) == sorted(b["fullname"] for b in constructed["benchmarks"])
    assert merged["aa"]["trials"] == 2 * constructed["aa"]["trials"]


def test_a_cell_measured_in_one_shard_is_not_among_the_not_run(constructed, run_of):
    done = constructed["benchmarks"][3]
    first = {**shard(constructed, 0), "not_run": [
        {"fullname": done["fullname"], "cell": done["extra_info"]["cell"],
         "reason": "in another shard"}]}  # fmt: skip
    merged = merge.merge([run_of(first), run_of(shard(constructed, 1))])
    assert done["fullname"] not in [n["fullname"] for n in merged["not_run"]]


def test_overlapping_shards_need_worst(constructed, run_of):
    a, b = run_of(constructed), run_of(slowed(constructed, STACK, 1.1))
    with pytest.raises(ReportError, match="--worst"):
        merge.merge([a, b])
    for order in ([a, b], [b, a]):
        merged = run_of(merge.merge(order, worst=True))
        kept, slow = record_of(merged, STACK).speedup, record_of(b, STACK).speedup
        assert kept == slow


def test_equal_duplicates_merge(constructed, run_of):
    a = run_of(constructed)
    assert len(merge.merge([a, run_of(constructed)])["benchmarks"]) == len(a.records)


def test_shards_of_another_commit_or_machine_are_refused(constructed, run_of):
    other = {**constructed, "commit_info": {"id": "1" * 40, "dirty": False}}
    with pytest.raises(ReportError, match="one commit"):
        merge.merge([run_of(constructed), run_of(other)])
    with pytest.raises(ReportError, match="differ in"):
        merge.merge([run_of(constructed), run_of(constructed_run(threads=16))])


def test_headline_keeps_the_worst_bounds(constructed, run_of):
    runs = three(constructed, run_of)
    data = merge.headline(runs)
    schema.validate_run(data)
    worst = record_of(run_of(data), STACK).speedup
    every = [record_of(run, STACK).speedup for run in runs]
    assert worst.low == min(x.low for x in every)
    assert worst.high == max(x.high for x in every)
    assert worst.value == sorted(x.value for x in every)[1]


def test_headline_does_not_change_the_runs_it_reads(constructed, run_of):
    runs = three(constructed, run_of)
    before = json.dumps([run.raw for run in runs])
    merge.headline(runs)
    assert json.dumps([run.raw for run in runs]) == before


def test_headline_needs_one_verdict(constructed, run_of):
    runs = three(constructed, run_of)
    runs[1] = run_of({**changed(runs[1].raw, STACK, verdict="same"), "datetime": "2000-01-02"})
    assert record_of(run_of(merge.headline(runs)), STACK).verdict == "ambiguous"


def test_headline_marks_what_does_not_repeat(constructed, run_of):
    data = merge.headline(three(constructed, run_of, (1.0, 1.15, 1.0)))
    unstable = {"+".join(c["cell"]["techniques"]) for c in data["headline"]["cells"]
                if c["unstable"]}  # fmt: skip
    assert unstable == {STACK}
    cells = data["headline"]["claimed_cells"]
    assert cells == len(constructed["benchmarks"])
    shaky = sum(b["extra_info"]["cell"]["techniques"] == STACK.split("+")
                for b in constructed["benchmarks"])  # fmt: skip
    assert data["headline"]["within_10_percent"] == pytest.approx(1 - shaky / cells)
    assert data["headline"]["median_spread"] == 0


def test_headline_refuses_the_same_run_twice(constructed, tmp_path, capsys):
    a = save(tmp_path / "a.json", constructed)
    assert main(["headline", a, a]) == 2
    assert "same run" in capsys.readouterr().err
    assert main(["headline", a]) == 2
