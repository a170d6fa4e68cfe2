"""What is made of ncu's numbers: verdicts, what is kept of them, what the report shows."""

import json
import platform
from pathlib import Path

import pytest

from impl.core import StudyError
from ncu import metrics, result, verdict
from ncu.command import Outcome
from reports import evidence
from reports.load import load_run
from tests.constructed_runs import constructed_run
from tests.ncu_input import BF16, FFMA, kernel, node

HOPPER = (9, 0)

# ---- verdicts --------------------------------------------------------------------------------

STALLED = f"{metrics.STALL_PREFIX}long_scoreboard{metrics.STALL_SUFFIX}"
BOUNDS = [
    ("memory", {metrics.DRAM_RATE: 3.3e12, metrics.DRAM_BUSY: 82.5},
     "memory-bound: 82 % of DRAM peak, 0 % of fp32, 0 FLOP/byte"),
    ("memory", {metrics.DRAM_RATE: 3.3e12, metrics.DRAM_BUSY: 82.5, FFMA: 640.0},
     "memory-bound: 82 % of DRAM peak, 4 % of fp32, 0.776 FLOP/byte"),
    ("compute", {FFMA: 12_000.0}, "compute-bound: 75 % of fp32, 25 % of DRAM peak, 48 FLOP/byte"),
    ("compute", {BF16: 0.7 * 500_000 * 200_000},
     "compute-bound: 70 % of bf16 tensor, 25 % of DRAM peak, 700 FLOP/byte"),
    ("memory", {metrics.DRAM_RATE: 3.6e12, metrics.DRAM_BUSY: 90.0, FFMA: 10_400.0},
     "memory-bound: 90 % of DRAM peak, 65 % of fp32"),
    ("cache", {metrics.MEMORY_BUSY: 71.0}, "cache-bound: 71 % of the memory path on chip"),
    ("instruction", {metrics.SM_BUSY: 71.0}, "instruction-bound: 71 % of an SM pipe"),
    ("size", {metrics.WAVES: 0.12}, "too small: 0.12 of a wave of blocks, 25 % of DRAM peak"),
    ("memory", {metrics.WAVES: 0.5, metrics.DRAM_RATE: 3.2e12, metrics.DRAM_BUSY: 80.0},
     "memory-bound: 80 %"),
    ("latency", {}, "latency-bound: 25 % of DRAM peak, 0 % of fp32, 0 FLOP/byte, occupancy 45 % of "
     "50 %, warps wait for long scoreboard 75 % of the time"),
    ("unknown", {metrics.DRAM_RATE: None, metrics.DRAM_BUSY: None, metrics.SM_BUSY: None},
     "no verdict: the report holds no throughput"),
]  # fmt: skip


@pytest.mark.parametrize(("bound", "changes", "sentence"), BOUNDS)
def test_verdict(bound, changes, sentence):
    found = verdict.judge(kernel(**changes), HOPPER)
    assert found.bound == bound
    assert found.sentence.startswith(sentence)
    assert found.complaints == []


def test_an_unknown_chip_has_no_arithmetic_roof():
    found = verdict.judge(kernel(**{FFMA: 12_000.0}), None)
    assert (found.bound, found.compute, found.roof) == ("latency", None, None)


def test_a_counter_that_is_missing_is_not_zero():
    found = verdict.judge(kernel(**{BF16: None}), HOPPER)
    assert "bf16 tensor" not in verdict.compute_shares(kernel(**{BF16: None}), HOPPER)
    assert found.compute == 0.0


@pytest.mark.parametrize(("changes", "complaint"), [
    ({STALLED: 20.0}, "the stalls add up to 30, the latency is 40"),
    ({metrics.DRAM_BUSY: 50.0}, "DRAM rate over peak is 25 %, its throughput 50 %"),
    ({metrics.SM_BUSY: 103.0}, "is 103 %"),
    ({FFMA: 17_000.0}, "fp32 is 106.2 %"),
    ({metrics.TIME: None}, "no duration"),
])  # fmt: skip
def test_broken_invariants_make_a_verdict_doubtful(changes, complaint):
    found = verdict.judge(kernel(**changes), HOPPER)
    assert len(found.complaints) == 1
    assert complaint in found.complaints[0]
    assert f"(doubtful: {found.complaints[0]})" in found.sentence


@pytest.mark.parametrize("changes", [{STALLED: 30.5}, {metrics.SM_BUSY: 100.002},
                                     {metrics.DRAM_BUSY: 25.05}])  # fmt: skip
def test_rounding_breaks_no_invariant(changes):
    assert verdict.judge(kernel(**changes), HOPPER).complaints == []


# ---- what is kept ----------------------------------------------------------------------------


def rows(*found):
    return [{"name": name, "metrics": values} for name, values in found]


def test_launches_of_one_shape_are_one_row():
    launches = [("norm", kernel(**{metrics.TIME: t})) for t in (3e6, 1e6, 2e6)]
    found = result.kernels(rows(*launches, ("copy", kernel(**{metrics.TIME: 2e6}))), HOPPER)
    assert [(k["name"], k["launches"], k["ms"]) for k in found] == [("norm", 3, 6.0),
                                                                   ("copy", 1, 2.0)]  # fmt: skip
    assert found[0]["metrics"][metrics.TIME] == 2e6, "the median launch stands for them"
    assert found[0]["share"] == pytest.approx(0.75)
    assert result.sentence(found).startswith("norm takes 75 %: latency-bound")
    other = ("norm", kernel(**{metrics.GRID: 8.0}))
    assert len(result.kernels(rows(*launches, other), HOPPER)) == 2


def test_traffic_is_what_dram_moved_over_the_least():
    found = rows(("a", kernel()), ("b", kernel()))  # 1e12 B/s for 100 us each
    assert result.traffic(found, 1e8) == pytest.approx(2.0)
    assert result.traffic(found, None) is None
    assert result.traffic(rows(("a", {})), 1e8) is None


def test_only_metrics_that_are_read_are_kept():
    found = kernel(**{"l1tex__cycles_elapsed.avg": 1.0, "asked__for.sum": 2.0})
    kept = result.kept(found, HOPPER, ["asked__for.sum"])
    assert "l1tex__cycles_elapsed.avg" not in kept
    assert {"asked__for.sum", STALLED, FFMA, metrics.WAVES} <= set(kept)


@pytest.mark.parametrize(("text", "clean"), [
    ("on build-7.lan and build-7, not rebuild-7", "on host and host, not rebuild-7"),
    (f"python {Path.cwd()}/ncu/x.py", "python ./ncu/x.py"),
    ("==PROF== Connected to process 41 (/a/b/python -m secret)", "==PROF== Connected to a process"),
    ("from 10.1.22.3 port 4", "from address port 4"),
    ("File /somewhere/else/deep/model.py, line 3", "File model.py, line 3"),
    ("ncu 2025.3.1.0, 12/16 GB/s, tests/test_x.py::test_y[a/b]",
     "ncu 2025.3.1.0, 12/16 GB/s, tests/test_x.py::test_y[a/b]"),
])  # fmt: skip
def test_scrubbing(text, clean, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "build-7.lan")
    assert result.scrubbed(text) == clean


def test_file_names_are_short_and_differ():
    long = "tests/test_latency.py::test_generation[" + "int8_weight_only+" * 20
    assert len(result.slug(long + "a]")) <= result.LONGEST_NAME
    assert result.slug(long + "a]") != result.slug(long + "b]")
    assert result.slug("tests/test_x.py::test_y[a-b+c]") == "tests_test_x_py_test_y_a-b+c"


def test_a_broken_index_is_begun_anew(tmp_path):
    shelf = result.Shelf(tmp_path)
    shelf.add(result.result(node(), Outcome("profiled")))
    assert [e["fullname"] for e in result.read_index(tmp_path)] == [node()["nodeid"]]
    (tmp_path / result.read_index(tmp_path)[0]["file"]).unlink()
    assert result.read_index(tmp_path) == []
    (tmp_path / "index.json").write_text('{"schema": 1, "results": [')
    assert result.read_index(tmp_path) == []
    assert result.Shelf(tmp_path).entries == {}


def test_an_out_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"--out .*file/x cannot be made"):
        result.Shelf(tmp_path / "file" / "x")


# ---- the report ------------------------------------------------------------------------------


def test_the_report_links_results_of_the_same_device(tmp_path, monkeypatch):
    folder = tmp_path / "ncu"
    monkeypatch.setattr(evidence, "NCU_FOLDERS", (folder,))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(constructed_run()))
    record = load_run(path).records[0]
    shelf = result.Shelf(folder)
    cell = {"device": record.cell.device}
    found = result.kernels(rows(("norm", kernel(**{FFMA: 12_000.0}))), HOPPER)
    shelf.add(result.result({"nodeid": record.fullname, "cell": cell}, Outcome("profiled"),
                            kernels=found, verdict=result.sentence(found),
                            device={"name": "Made-up GPU", "capability": "9.0"}))  # fmt: skip
    page = evidence.evidence(record, tmp_path, evidence.profiles())
    assert "compute-bound: 75 % of fp32" in page
    assert "Made-up GPU" in page
    assert f'href="ncu/{result.slug(record.fullname)}.json"' in page
    cell["device"] = "another"
    shelf.add(result.result({"nodeid": record.fullname, "cell": cell}, Outcome("profiled")))
    assert "NCU" not in evidence.evidence(record, tmp_path, evidence.profiles())
