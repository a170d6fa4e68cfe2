"""Do findings and advice follow from the runs?"""

from pathlib import Path

import pytest

from reports import findings, recommend
from reports.load import ReportError
from tests.constructed_runs import main, record_of, save

ROOT = Path(__file__).resolve().parents[1]


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


def test_the_readme_shows_repeated_claims_first_and_then_what_one_process_found(
    constructed, run_of
):
    run = run_of(constructed)
    repeated = run_of({**constructed, "headline": {"runs": ["a", "b", "c"], "cells": []}})
    first, then = findings.headline_block([run], [repeated]).split("\n\nOn Constructed CPU")
    assert "worst bounds of 3 fresh processes" in first
    assert "each cell in one process" in then
    assert first.count("\n| ") == then.count("\n| ") > 2


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
