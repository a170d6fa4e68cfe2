"""The kernels' part of the report says what the cells say.  Every run is constructed."""

import re

import pytest

from reports import kernels, page, plots, schema, study
from reports.load import load_run, newest_runs
from tests.constructed_runs import constructed_run, kernel_record, kernel_run, save


@pytest.fixture
def run(tmp_path):
    return load_run(save(tmp_path / "run.json", kernel_run()))


def plain(html):
    """The text of each cell of the table's rows."""
    lines = re.findall(r"<tr>(.*?)</tr>", html)
    return [[re.sub(r"<[^>]+>", " ", c).split() for c in re.findall(r"<td.*?</td>", line)]
            for line in lines[1:]]  # fmt: skip


def test_the_constructed_kernels_are_valid_records():
    schema.validate_run(kernel_run())


def test_a_row_says_operation_implementation_shape_rates_and_ratios(run):
    rows = plain(kernels.kernels(run))
    assert len(rows) == 5
    operation, time, moved, arithmetic, ceiling, eager, compiled, library = rows[0]
    assert operation == ["int8_linear", "cpu", "·", "8x4096x4096", "·", "fp32"]
    assert (time, moved, arithmetic) == (["6.10", "ms"], ["44.0", "GB/s"], ["1.32", "TFLOP/s"])
    assert ceiling == ["90", "%", "compute"]
    assert (eager, compiled) == (["2.00×", "1.90–2.10"], ["1.25×", "1.20–1.30"])
    assert library == ["–"], "no library has it here"
    assert [row[0][:2] for row in rows[1:]] == [
        ["rms_norm", "cpu"], ["rms_norm", "triton"], ["rms_norm", "cpu"], ["rms_norm", "triton"],
    ]  # fmt: skip
    assert rows[1][7] == ["1.50×", "1.40–1.60", "library"]


def test_the_roofline_draws_every_cell_under_every_measured_roof(run):
    html = kernels.kernels(run)
    picture = html[html.index("<svg") : html.index("</svg>")]
    for roof in ("copy 45 GB/s", "read 44 GB/s", "fp32 460 GFLOP/s", "bf16 900 GFLOP/s"):
        assert roof in picture
    numbers = re.findall(r"var\(--card\)[^>]*>(\d)</text>", picture)
    assert sorted(numbers) == ["1", "2", "2", "2", "2"], "a number per cell, the operation's"
    assert re.findall(r"<li>(\w+)</li>", html) == ["int8_linear", "rms_norm"]


def test_roofs_that_nearly_coincide_share_one_name(run):
    """Two names 3 % apart would lie over one another."""
    peaks = {"int16": 271e9, "fp32": 146e9, "int8": 273e9, "fp16": 14e9, "bf16": 12e9}
    near = [[name for name, _ in level] for level in plots.near_levels(peaks)]
    assert near == [["bf16", "fp16"], ["fp32"], ["int16", "int8"]]
    drawn = plots.kernel_roofline([(1, run.records[0])], {"copy": 24e9}, peaks)
    for name in ("bf16 12, fp16 14 GFLOP/s", "fp32 146 GFLOP/s", "int16 271, int8 273 GOP/s"):
        assert drawn.count(name) == 1


def test_a_later_run_of_kernels_joins_the_study_of_its_machine(run, tmp_path):
    """It is no newer study: that one's tables stay, and the kernels stand beside them."""
    studied = load_run(save(tmp_path / "study.json", {**constructed_run(), "datetime": "1999"}))
    assert (run.about, studied.about) == ("kernels", "study")
    assert [found.path for found in newest_runs([tmp_path])] == [studied.path]
    assert [found.path for found in newest_runs([tmp_path], "kernels")] == [run.path]
    text = page.build([studied], tmp_path, [run]).read_text(encoding="utf-8")
    shown = re.findall(r'<section id="([\w-]+)"', text)
    assert {"headline", "kernels", "cells"} <= set(shown)
    for record in (*run.records, *studied.records):
        assert text.count(f'id="{kernels.markup.anchor(record)}"') == 1
    elsewhere = {**kernel_run(), "machine_info": {**run.machine, "threads": 16}}
    other = load_run(save(tmp_path / "other.json", elsewhere))
    text = page.build([studied], tmp_path, [other]).read_text(encoding="utf-8")
    assert "kernels" not in re.findall(r'<section id="([\w-]+)"', text)


def test_a_page_of_kernels_alone_has_no_empty_sections(run, tmp_path):
    text = page.build([run], tmp_path).read_text(encoding="utf-8")
    shown = re.findall(r'<section id="([\w-]+)"', text)
    assert "kernels" in shown
    assert "headline" not in shown
    assert "speedups" not in shown
    for record in run.records:
        assert text.count(f'id="{kernels.markup.anchor(record)}"') == 1, "evidence to link to"


def test_kernels_stand_among_no_stacks(tmp_path):
    both = constructed_run()
    both["benchmarks"] += kernel_run()["benchmarks"]
    run = load_run(save(tmp_path / "run.json", both))
    assert not any(study.is_kernel(winner.record) for winner in study.winners(run))
    text = page.build([run], tmp_path).read_text(encoding="utf-8")
    head = text[text.index('<section id="headline"') : text.index('<section id="kernels"')]
    assert "rms_norm" not in head


def test_without_kernels_there_is_no_section(tmp_path):
    run = load_run(save(tmp_path / "run.json", constructed_run()))
    assert kernels.kernels(run) == ""


def test_a_cell_without_flops_or_ceilings_is_in_the_table_not_in_the_plot(tmp_path):
    made = kernel_run()
    made["benchmarks"] = [kernel_record("rms_norm", "cpu", "8x8", flops=None, limit_fraction=None,
                                        bound=None)]  # fmt: skip
    html = kernels.kernels(load_run(save(tmp_path / "run.json", made)))
    assert "<svg" not in html
    assert plain(html)[0][3:5] == [["–"], ["–"]]
