"""Does the page say what the runs say, in a real browser too?"""

import json
import re
from pathlib import Path

import pytest

from reports import compare as comparing
from reports import merge, page, schema, study
from reports.load import ReportError, load_run, newest_runs
from tests import chromium
from tests.constructed_runs import (
    STACK,
    changed,
    main,
    record,
    save,
    three,
)


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


def test_processors_of_one_name_are_told_apart_by_what_they_can_do(constructed, run_of, tmp_path):
    """Clouds call several generations by one name: neither is compared with or shown as another."""
    run = json.loads(json.dumps(constructed))
    run["machine_info"]["cpu"]["isa"] = ["avx2", "avx512f", "avx512_bf16"]
    old, new = run_of(constructed), run_of(run)
    assert new.slug == f"{old.slug.removesuffix('-avx2')}-avx512-bf16"
    assert "AVX512 BF16" in new.hardware_name
    with pytest.raises(ReportError, match="differ in ISA"):
        comparing.compare(old, new)
    for name, each in (("old", old), ("new", new)):
        save(tmp_path / f"{name}.json", each.raw)
    assert len(newest_runs([tmp_path])) == 2


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
        run_of({**small, "machine_info": {**small["machine_info"], "threads": 1}}),
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
