"""Reports: what they say follows from the runs, and bad input gets one sentence.

Every run here is constructed by a formula (tests/constructed_runs.py); none was measured.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reports import compare as comparing
from reports import findings, merge, page, recommend, schema, study
from reports.__main__ import COMMANDS, main
from reports.load import Interval, ReportError, load_run, newest_runs
from tests import chromium
from tests.constructed_runs import changed, constructed_run, record, save, slowed

ROOT = Path(__file__).resolve().parents[1]
STACK = "int8_weight_only+torch_compile"


@pytest.fixture(scope="module")
def constructed():
    return constructed_run()


@pytest.fixture(scope="module")
def small(constructed):
    """Enough for a page: quick to draw."""
    few = [b for b in constructed["benchmarks"] if b["group"] == "classify"]
    return {**constructed, "benchmarks": few}


@pytest.fixture
def run_of(tmp_path):
    """Save a constructed run and load it again."""
    made = iter(range(100))
    return lambda run: load_run(save(tmp_path / f"run{next(made)}.json", run))


def record_of(run, stack, **where):
    found = [r for r in run.records if r.cell.stack == stack]
    return next(r for r in found if all(getattr(r.cell, k) == v for k, v in where.items()))


# ---- the constructed run is one of ours -----------------------------------------------------


def test_the_constructed_run_is_valid_and_says_that_it_is_constructed(constructed):
    schema.validate_run(constructed)
    assert "no machine" in constructed["machine_info"]["cpu"]["brand_raw"]


# ---- loading ---------------------------------------------------------------------------------

BAD_FILES = {
    "truncated": ('{"benchmarks": [', "not JSON"),
    "not an object": ("[1, 2]", "holds a JSON list"),
    "nan": ('{"benchmarks": [], "machine_info": {"x": NaN}}', "bare NaN"),
    "other program": ('{"results": []}', "no benchmarks and no machine_info"),
    "no list": ('{"benchmarks": 3, "machine_info": {}}', "is not a run of this study"),
    "no cell": ('{"benchmarks": [], "machine_info": {}}', "no measured cell"),
    "foreign": (
        '{"benchmarks": [{"name": "x", "stats": {"median": 1}, "extra_info": {}}], '
        '"machine_info": {}}',
        "missing: extra_info.cell",
    ),
    "not text": ("\udcff\udcfe", "not JSON"),
}


@pytest.mark.parametrize("command", ["build", "compare", "merge", "findings", "recommend", "check"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_get_one_sentence_with_the_remedy(command, kind, tmp_path, capsys):
    text, said = BAD_FILES[kind]
    bad = tmp_path / "bad.json"
    bad.write_bytes(text.encode("utf-8", "surrogateescape"))
    if command == "merge" and kind == "no cell":
        return  # an empty shard is a shard
    assert main(command_line(command, bad, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert str(bad) in error


def command_line(command, path, folder):
    return [command, *{
        "compare": [path, path],
        "merge": [folder / "out.json", path],
        "build": [path, "--out", folder / "out"],
    }.get(command, [path])]  # fmt: skip


@pytest.fixture(autouse=True)
def words_are_paths(monkeypatch):
    """`main` gets strings, as from a shell."""
    import reports.__main__ as entry

    parser = entry.arguments()
    monkeypatch.setattr(entry, "arguments", lambda: parser)
    parse = parser.parse_args
    monkeypatch.setattr(parser, "parse_args", lambda words: parse([str(w) for w in words]))


@pytest.mark.parametrize("command", ["build", "compare", "merge", "recommend", "check"])
def test_a_missing_file_is_named(command, tmp_path, capsys):
    missing = tmp_path / "missing.json"
    assert main(command_line(command, missing, tmp_path)) == 2
    assert f"{missing} does not exist" in capsys.readouterr().err


def test_a_value_of_the_wrong_type_is_named(constructed, run_of):
    with pytest.raises(ReportError, match=r"malformed: benchmarks\.\d+\.extra_info\.speedup"):
        run_of(changed(constructed, "eager", speedup="fast"))


def test_an_old_run_with_fewer_keys_still_loads(constructed, run_of):
    old = changed(constructed, "none")
    for benchmark in old["benchmarks"]:
        del benchmark["extra_info"]["mfu"]
    assert run_of(old).records


def test_other_benchmarks_in_the_file_are_counted_and_left_out(constructed, run_of):
    run = {**constructed, "benchmarks": [*constructed["benchmarks"], {
        "name": "theirs", "fullname": "theirs", "group": None, "extra_info": {},
        "stats": {"median": 1.0}}]}  # fmt: skip
    loaded = run_of(run)
    assert loaded.foreign == 1
    assert len(loaded.records) == len(constructed["benchmarks"])


def test_the_newest_run_of_each_machine_is_taken(constructed, tmp_path):
    save(tmp_path / "old.json", constructed)
    save(tmp_path / "new.json", {**constructed, "datetime": "2000-02-02T00:00:00"})
    other = constructed_run(threads=1)
    save(tmp_path / "deep" / "other.json", other)
    (tmp_path / "junk.json").write_text("{")
    found = newest_runs([tmp_path])
    assert sorted(run.path.name for run in found) == ["new.json", "other.json"]


def test_no_saved_run_says_how_to_make_one(tmp_path):
    with pytest.raises(ReportError, match="make bench"):
        newest_runs([tmp_path])


def test_a_full_disk_keeps_the_old_page(small, tmp_path, monkeypatch, capsys):
    out, source = tmp_path / "out", save(tmp_path / "run.json", small)
    assert main(["build", source, "--out", out]) == 0
    before = (out / "report.html").read_bytes()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["build", source, "--out", out]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (out / "report.html").read_bytes() == before
    assert not list(out.glob("*.part"))


def test_an_output_folder_that_is_a_file_is_refused(small, tmp_path, capsys):
    source = save(tmp_path / "run.json", small)
    assert main(["build", source, "--out", source]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- compare ---------------------------------------------------------------------------------


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


# ---- merge and headline ----------------------------------------------------------------------


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
        merge.merge([run_of(constructed), run_of(constructed_run(isa="AVX2"))])


def three(constructed, run_of, factors=(1.0, 1.02, 1.01), stack=STACK):
    return [
        run_of({**slowed(constructed, stack, f), "datetime": f"2000-01-0{i}T00:00:00"})
        for i, f in enumerate(factors, 1)
    ]


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


# ---- what the page says ----------------------------------------------------------------------


def test_a_workload_where_nothing_is_faster_has_no_winner(constructed, run_of):
    run = json.loads(json.dumps(constructed))
    assert study.winners(run_of(run))
    for benchmark in run["benchmarks"]:
        benchmark["extra_info"]["verdict"] = "ambiguous"
    assert not study.winners(run_of(run))


def test_a_run_is_named_after_its_cpu(constructed, run_of):
    run = json.loads(json.dumps(constructed))
    run["machine_info"]["cpu"] = {"brand": "Constructed CPU", "arch": "X86_64", "count": 2}
    run["machine_info"]["gpu"] = None
    assert run_of(run).slug == "constructed-cpu"


def test_winners_lose_nothing_or_stay_in_budget(constructed, run_of):
    rows = study.winners(run_of(constructed))
    by_claim = {(w.claim, w.record.cell.workload): w.record.cell.stack for w in rows}
    assert by_claim["no quality lost", "generate"] == "static_kv_cache+torch_compile"
    assert by_claim["within budget", "generate"] == f"{STACK}+prompt_lookup"


def test_a_dominated_point_names_one_that_is_faster_and_as_good(constructed, run_of):
    records = [r for r in run_of(constructed).records if r.cell.workload == "generate"]
    points = study.pareto(records)
    assert any(p.dominated_by for p in points)
    for p in points:
        better = p.dominated_by
        if better:
            value, other = p.metric["value"], study.metric_of(better)["value"]
            assert better.seconds <= p.record.seconds
            assert other <= value + p.metric["stderr"]
        else:
            slack = p.metric["stderr"]
            assert not [r for r in records if r.seconds < p.record.seconds
                        and study.metric_of(r)["value"] <= p.metric["value"] + slack]  # fmt: skip


def test_the_ladder_adds_techniques_one_by_one(constructed, run_of):
    records = [r for r in run_of(constructed).records
               if r.cell.workload == "generate" and r.cell.precision == "fp32"]  # fmt: skip
    rungs = study.ladder(records)
    added = ["+".join(rung.added) for rung in rungs]
    assert added == ["", "lean_decoder", "torch_compile", "int8_weight_only", "prompt_lookup"]
    assert rungs[-1].step == pytest.approx(
        rungs[-1].record.speedup.value / rungs[-2].record.speedup.value
    )


def test_interaction_is_measured_over_the_product_of_singles(constructed, run_of):
    """Constructed stacks cost 8 % per technique beyond the first: the terms are 1/1.08, 1/1.08²."""
    records = [r for r in run_of(constructed).records
               if r.cell.workload == "generate" and r.cell.precision == "fp32"]  # fmt: skip
    terms = {i.record.cell.stack: i.term for i in study.interactions(records)}
    assert terms[STACK].value == pytest.approx(1 / 1.08)
    assert terms[f"{STACK}+prompt_lookup"].value == pytest.approx(1 / 1.08**2)
    assert terms[STACK].low < 1 / 1.08 < terms[STACK].high < 1


def test_every_number_format_has_a_row_or_a_reason(constructed, run_of):
    run = run_of(constructed)
    records = [r for r in run.records if r.cell.workload == "generate"]
    rows = study.format_table(records, run.not_run)
    assert [*dict.fromkeys(row.format for row in rows)] == [
        "FP32", "FP16", "BF16", "INT8", "INT4", "FP8", "mixed"]  # fmt: skip
    assert all(row.record or row.reason for row in rows)
    assert [row.reason for row in rows if row.format == "FP8"] == [run.not_run[0].reason]


def test_reasons_are_grouped_and_counted(constructed, run_of):
    run = run_of(constructed)
    grouped = study.reasons(run.not_run)
    assert sum(len(entries) for _, entries in grouped) == len(run.not_run)
    assert [len(entries) for _, entries in grouped] == [2, 2]


@pytest.fixture(scope="module")
def report(constructed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return page.build([load_run(save(folder / "run.json", constructed))], folder)


def test_the_page_has_every_section_and_every_cell(report, constructed):
    text = report.read_text(encoding="utf-8")
    for name in ("headline", "speedups", "pareto", "memory", "limits", "formats", "ladder",
                 "combinations", "speculation", "serving", "bottlenecks", "not-run", "cells",
                 "trust", "machine", "reading"):  # fmt: skip
        assert f'<section id="{name}">' in text
    assert text.count('<details class="cell"') == len(constructed["benchmarks"])
    for benchmark in constructed["benchmarks"]:
        assert benchmark["extra_info"]["effect"] in text
        assert benchmark["fullname"] in text


def test_a_cell_with_every_null_is_shown(constructed, run_of, tmp_path):
    """Unpaired, no quality, no limit, no memory: a record may hold nothing but a time."""
    empty = schema.empty_record()
    full = record(("eager",))["extra_info"]
    keep = {key: full[key] for key in ("cell", "timing", "baseline", "stop")}
    bare = {**empty, **keep, "pairs": 0, "verdict": "ambiguous", "quality": []}
    run = {**constructed, "benchmarks": [{**record(("eager",)), "extra_info": bare}],
           "ceilings": {"first": None, "last": None, "drift": None}, "not_run": [],
           "conditions": {**constructed["conditions"], "before": None, "after": None},
           "aa": {"trials": 0, "misses": 0, "noise_floor": None}}  # fmt: skip
    schema.validate_run(run)
    text = page.build([run_of(run)], tmp_path).read_text(encoding="utf-8")
    assert '<details class="cell"' in text
    assert "nan" not in text.lower().replace("nanum", "")


def test_text_from_a_run_is_escaped(small, run_of, tmp_path):
    evil = changed(small, "torch_compile", effect="<script>alert(1)</script>")
    text = page.build([run_of(evil)], tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in text


def test_two_machines_stand_on_one_page(small, run_of, tmp_path):
    runs = [
        run_of(small),
        run_of({**small, "machine_info": {**small["machine_info"], "isa": "AVX2"}}),
    ]
    text = page.build(runs, tmp_path).read_text(encoding="utf-8")
    assert text.count("<article") == 2
    names = re.findall(r'<(?:section|details class="cell"|article) id="(.*?)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'<a[^>]*href="#(.*?)"', text)) <= set(names)


def test_the_path_of_the_page_is_printed_last(small, tmp_path, capsys):
    source = save(tmp_path / "run.json", small)
    assert main(["build", source, "--out", tmp_path / "out"]) == 0
    printed = Path(capsys.readouterr().out.splitlines()[-1])
    assert printed.is_file()


def test_headline_runs_join_the_page_of_their_machine(constructed, run_of, tmp_path):
    repeated = run_of(merge.headline(three(constructed, run_of)))
    text = page.build([run_of(constructed)], tmp_path, [repeated]).read_text(encoding="utf-8")
    assert "3 fresh processes" in text


# ---- in a real browser -----------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(
    chromium.executable() is None, reason="needs Chromium; apt-get install chromium brings it"
)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium.browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_from_a_file_without_errors_or_requests(tab, report, width):
    tab.open(report, width)
    assert tab.complaints() == []
    assert tab.requests() == [report.as_uri()]


@needs_chromium
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_overflows_sideways_but_tables_in_their_box(tab, report, width):
    tab.open(report, width)
    assert tab.run("document.documentElement.scrollWidth") <= width
    wide = tab.run(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


@needs_chromium
def test_an_overflow_would_be_seen(tab, tmp_path):
    """The check above can fail: a table outside its box."""
    broken = tmp_path / "broken.html"
    broken.write_text('<main><table style="width: 900px"><tr><td>x</table></main>')
    tab.open(broken, 390)
    assert tab.run("document.documentElement.scrollWidth") > 390


@needs_chromium
def test_the_headline_table_is_visible(tab, report):
    tab.open(report, 390)
    box = tab.run(
        "(r => [r.width, r.height])(document.querySelector('#headline table')"
        ".getBoundingClientRect())"
    )
    assert min(box) > 100
    assert "×" in tab.run("document.querySelector('#headline tbody').innerText")


@needs_chromium
def test_plots_are_drawn_at_a_readable_size(tab, report):
    """On a phone the text of a plot is 7 CSS pixels or more, in both colour schemes."""
    for dark in (False, True):
        tab.open(report, 390, dark=dark)
        heights = tab.run(
            "[...document.querySelectorAll('svg text')].map(t => parseFloat(getComputedStyle(t)"
            ".fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b))"
        )
        assert heights
        assert min(heights) >= 7
        ink, paper = tab.run(
            "[getComputedStyle(document.querySelector('svg text')).fill,"
            " getComputedStyle(document.body).backgroundColor]"
        )
        assert contrast(ink, paper) > 4.5


def contrast(one, other):
    """WCAG contrast of two 'rgb(r, g, b)' colours."""

    def light(color):
        parts = [int(x) / 255 for x in color[color.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@needs_chromium
def test_links_lead_somewhere_and_a_cell_opens(tab, report):
    tab.open(report, 1280)
    dead = tab.run(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href'))"
        ".filter(h => !document.getElementById(h.slice(1)))"
    )
    assert dead == []
    opened = tab.run(
        "(a => { a.click(); openTarget(); return document.getElementById(a.hash.slice(1)).open })"
        "(document.querySelector('#headline a.stack'))"
    )
    assert opened is True


@needs_chromium
def test_ids_are_unique(tab, report):
    tab.open(report, 1280)
    twice = tab.run(
        "(ids => ids.filter((x, i) => ids.indexOf(x) !== i))"
        "([...document.querySelectorAll('section, details, article')].map(e => e.id)"
        ".filter(Boolean))"
    )
    assert twice == []


@needs_chromium
def test_the_page_prints(tab, report):
    tab.open(report, 1280)
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000


# ---- findings and advice ---------------------------------------------------------------------


@pytest.fixture
def family_page(tmp_path):
    path = tmp_path / "findings" / "quantization.md"
    path.parent.mkdir()
    path.write_text(
        "# Q\n\nby hand\n\n<!-- numbers:begin -->\nlast-time\n<!-- numbers:end -->\n\nend\n"
    )
    return path


def written(run, folder, **options):
    return findings.regenerate([run], [], folder=folder / "findings",
                               readme=folder / "README.md", source=ROOT / "impl",
                               **options)  # fmt: skip


def test_findings_replace_the_numbers_and_keep_the_rest(constructed, run_of, family_page, tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- headline:begin --><!-- headline:end -->\nb\n")
    run = run_of(constructed)
    changed_files = written(run, tmp_path)
    text = family_page.read_text()
    assert text.startswith("# Q\n\nby hand\n")
    assert text.endswith("\n\nend\n")
    assert "last-time" not in text
    ratio = record_of(run, "int8_dynamic", precision="fp32").speedup.value
    assert f"{ratio:.2f}×" in text
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("a\n<!-- headline:begin -->\nOn Constructed CPU")
    assert readme.endswith("b\n")
    assert tmp_path / "README.md" in changed_files
    assert written(run, tmp_path) == []  # and again: nothing changes


def test_stale_findings_are_noticed_and_not_touched(constructed, run_of, family_page, tmp_path):
    before = family_page.read_text()
    assert family_page in written(run_of(constructed), tmp_path, check=True)
    assert family_page.read_text() == before


def test_lost_markers_are_said(constructed, run_of, family_page, tmp_path):
    family_page.write_text("# Q\n")
    with pytest.raises(ReportError, match="numbers:begin"):
        written(run_of(constructed), tmp_path)


def test_bottlenecks_come_from_the_traces(constructed, run_of, tmp_path):
    (tmp_path / "findings").mkdir()
    written(run_of(constructed), tmp_path)
    text = (tmp_path / "findings" / "bottlenecks.md").read_text()
    assert "| `aten::mm` | 812 |" in text


def test_every_page_of_findings_has_its_markers():
    for path in (ROOT / "reports" / "findings").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert findings.replaced(text, "numbers", "x", path)


def test_advice_keeps_every_limit_and_costs_it(constructed, run_of):
    run = run_of(constructed)
    needs = recommend.Needs(max_quality_loss=0.0005, max_memory=2**40, cost_per_hour=2.0)
    advice = recommend.recommend(run, needs)
    rate = advice.record.number("tokens_per_s")
    assert advice.cost_per_million == pytest.approx(2.0 / 3600 / rate * 1e6)
    better = [r for r in run.records if (r.number("tokens_per_s") or 0) > rate]
    assert all(recommend.refusal(r, needs) for r in better)


def test_advice_never_promises_what_was_not_measured(constructed, run_of):
    run = run_of(constructed)
    advice = recommend.recommend(run, recommend.Needs(p99_ms=1e9))
    assert advice.record.number("p99_ms") is not None
    assert "p99 latency not measured (it needs 459 requests)" in advice.refused


def test_advice_without_a_fitting_cell_says_why(constructed, tmp_path, capsys):
    source = save(tmp_path / "run.json", constructed)
    assert main(["recommend", source, "--max-memory", "0.0001"]) == 2
    assert "needs too much memory" in capsys.readouterr().err
    assert main(["recommend", source, "--model", "nope"]) == 2
    assert "lm_small" in capsys.readouterr().err
    assert main(["recommend", source, "--cost-per-hour", "2"]) == 0
    assert "cost per million tokens" in capsys.readouterr().out


# ---- what the Makefile calls -----------------------------------------------------------------


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
    assert fake_pytest == [["-k", "quant"]]
    lines = capsys.readouterr().out.splitlines()
    assert Path(lines[-1]).is_file()
    kept = list((tmp_path / "reports" / "results").rglob("*.json"))
    assert [path.name for path in kept] == ["2000-01-01-0000-000000000000.json"]
    assert newest_runs()[0].path.resolve() == kept[0].resolve()


def test_headline_measures_three_fresh_processes(fake_pytest, capsys):
    from reports import measure

    assert main(["headline", "--measure"]) == 0
    assert fake_pytest == [["--profile", "headline"]] * 3
    written_to = Path(capsys.readouterr().out.splitlines()[-1])
    assert len(load_run(written_to).headline["runs"]) == 3
    assert not list(measure.SCRATCH.glob("*"))
    with pytest.raises(ReportError):  # a headline is no run of the whole profile
        newest_runs()
    assert newest_runs(headline=True)


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
