"""Nsight Compute without a GPU: what is asked of it, what its words mean, what is made of them."""

import contextlib
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from impl.core import StudyError
from ncu import command, metrics, report
from tests.ncu_input import as_csv, kernel
from tests.plugins import ncu as plugin

DATA = Path(__file__).parent / "data"
CHIPS = {"gh100": (9, 0), "ga100": (8, 0), "ad102": (8, 9)}
NODE = "tests/test_kernels.py::test_speed[rms_norm-triton-bf16-4096x8192]"


# ---- what is asked ---------------------------------------------------------------------------


def test_command_line():
    argv = command.argv("/x/ncu", NODE, Path("/o/raw/n.ncu-rep"), metrics.SECTIONS, ["a.sum", "b"],
                        ["--device", "cuda"])  # fmt: skip
    assert argv == command.argv("/x/ncu", NODE, Path("/o/raw/n.ncu-rep"), metrics.SECTIONS,
                                ["a.sum", "b"], ["--device", "cuda"])  # fmt: skip
    cut = argv.index(sys.executable)
    ours, test = argv[:cut], argv[cut:]
    value = dict(itertools.pairwise(ours))
    assert value["--nvtx-include"] == plugin.RANGE + "/", "the slash makes it a push/pop range"
    assert value["--profile-from-start"] == value["--config-file"] == "off"
    assert value["--metrics"] == "a.sum,b"
    assert value["-o"] == "/o/raw/n.ncu-rep"
    assert value["--log-file"] == "/o/raw/n.log"
    assert ours.count("--section") == len(metrics.SECTIONS)
    assert test[:4] == [sys.executable, "-m", "pytest", NODE], "a node id is one word, unquoted"
    assert {"--benchmark-disable", "no:xdist"} <= set(test)
    assert test[-2:] == ["--device", "cuda"]
    assert NODE not in ours, "its brackets are operators of ncu's filter"


def test_without_sections_the_full_set():
    argv = command.argv("ncu", NODE, Path("x.ncu-rep"), (), [])
    assert argv[argv.index("--set") + 1] == "full"
    assert "--section" not in argv
    assert "--metrics" not in argv


def test_the_child_measures_nothing_else():
    given = {"PATH": "/bin", "PYTEST_XDIST_WORKER": "gw1", "REQUIRE_NCU": "1", "NCU_COLLECT": "x"}
    made = command.environment(given, Path("/f"))
    assert made == {"PATH": "/bin", "NCU_CHILD": "1", "NCU_FACTS": "/f", "PYTHONUNBUFFERED": "1"}
    assert command.environment(given, Path("/f"), Path("/t"))["NCU_TRACE"] == "/t"


def listed(chip):
    lines = (DATA / f"ncu_metrics_{chip}.txt").read_text().splitlines()
    return {line.split()[1]: line.split()[0] for line in lines if not line.startswith("#")}


def is_listed(name, chip):
    """Whether NVIDIA's list for a chip has this name, with suffixes that its kind takes."""
    base, _, suffix = name.partition(".")
    share = r"pct_of_peak_sustained_(active|elapsed)"
    most = r"peak_sustained|per_second|per_cycle_(active|elapsed)"
    taken = {
        "counter": rf"(sum|avg|min|max)(\.({most}|{share}))?",
        "ratio": "pct|ratio|max_rate",
        "throughput": rf"(sum|avg|min|max)\.{share}",
    }
    kind = listed(chip).get(base)
    return kind is not None and re.fullmatch(taken[kind], suffix) is not None


@pytest.mark.parametrize("chip", CHIPS)
def test_every_name_asked_for_exists_on_the_chip(chip):
    asked = metrics.names(CHIPS[chip])
    assert len(asked) >= len(metrics.COMMON) + 8
    assert [name for name in asked if not is_listed(name, chip)] == []
    kinds = [roof.kind for roof in metrics.roofs(CHIPS[chip])]
    assert len(kinds) == len(set(kinds)), "one roof per kind"


@pytest.mark.parametrize("name", ["dram__byte.sum", "dram__bytes.total", "dram__bytes",
                                  "lts__t_sector_hit_rate.sum", "sm__throughput.sum"])  # fmt: skip
def test_the_list_finds_a_wrong_name(name):
    assert not is_listed(name, "gh100")


def test_names_are_gated_by_capability():
    hopper, ampere = set(metrics.names((9, 0))), set(metrics.names((8, 0)))
    assert any("hgmma" in name for name in hopper)
    assert not any("hgmma" in name or "fp8" in name for name in ampere)
    assert any("fp8" in name for name in metrics.names((8, 9)))
    assert set(metrics.names(None)) == set(metrics.COMMON)
    assert not any("tensor" in name for name in metrics.names((12, 0)))


def test_peaks_of_tensor_cores_are_the_dense_ones():
    tensor = [roof for roof in metrics.ROOFS if "tensor" in roof.kind]
    assert tensor
    assert all("sparsity_off" in roof.peak for roof in tensor)


def test_metric_sets():
    sections, names = metrics.chosen("launch", (9, 0))
    assert "WarpStateStats" not in sections
    assert names == []
    sections, names = metrics.chosen("dram__bytes_read.sum, lts__t_sectors.sum", (9, 0))
    assert sections == metrics.SECTIONS
    assert {"dram__bytes_read.sum", "lts__t_sectors.sum", metrics.TIME} <= set(names)
    with pytest.raises(StudyError, match="--metrics everything is neither a set"):
        metrics.chosen("everything", None)


def test_find_prefers_what_is_given(tmp_path, monkeypatch):
    mine = tmp_path / "ncu"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("NCU", str(mine))
    assert command.find() == str(mine)
    monkeypatch.setenv("NCU", str(tmp_path / "absent"))
    assert command.find() is None
    monkeypatch.delenv("NCU")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.find() == str(mine)


@pytest.mark.parametrize(("visible", "expected"), [("", (9, 0)), ("1", (8, 9)), ("GPU-b", (8, 9))])
def test_capability_is_that_of_the_visible_gpu(visible, expected, monkeypatch):
    monkeypatch.setattr(command, "asked", lambda *_: "0, GPU-aa, 9.0\n1, GPU-bb, 8.9\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert command.capability.__wrapped__() == expected


# ---- what it answers -------------------------------------------------------------------------

PROF = '==PROF== Profiling "k" - 0: 0%....50%....100% - 40 passes\n'
CANNED = [
    ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"
     "==WARNING== No kernels were profiled.", "not permitted", "NVreg_RestrictProfiling"),
    ("==ERROR== Nsight Compute failed to connect to the CUDA driver (stub libcuda.so[.1] on path?)."
     "\n==ERROR== The application returned an error code (1).", "no driver", "libcuda.so"),
    ("==ERROR== Failed to initialize the profiler: LibraryNotLoaded.", "no driver", "driver"),
    ("==ERROR== Profiling failed because a driver resource was unavailable. Ensure that no other "
     "tool\n==ERROR== Failed to profile \"k\" in process 1\n"
     "==ERROR== The application returned an error code (9).", "counters busy", "DCGM"),
    ("==ERROR== unrecognised option '--graph-profilling'. Use --help for further details.",
     "bad option", "its log"),
    ("==ERROR== Option 'section' did not match any section.", "bad option", "ncu/metrics.py"),
    ("==ERROR== Failed to find metric regex:^a__b\\.(sum|min|max)$", "bad option", "metric"),
    ("==ERROR== Error: Failed to prepare kernel for profiling\n==WARNING== No kernels were "
     "profiled.", "ncu failed", "log"),
    ("==ERROR== The application returned an error code (1).\n==WARNING== No kernels were profiled.",
     "test failed", "fails"),
    ("==PROF== Disconnected from process 1\n==WARNING== No kernels were profiled.", "no kernels",
     "no kernel"),
    ("", "unknown", "log"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "word", "way_out"), CANNED)
def test_outcome_of_a_text(text, word, way_out):
    outcome = command.judge(text, actions=0)
    assert outcome.word == word
    assert way_out in outcome.why
    assert not outcome.profiled


def test_success_needs_as_many_kernels_as_were_announced():
    assert command.judge(PROF * 2, 2).profiled
    assert command.judge(PROF * 2, 1).word == "truncated"
    assert command.judge(PROF * 2, 0).word == "no kernels"
    assert command.judge(PROF, 2).word == "unknown"
    assert command.judge("", 0).word == "unknown"
    assert command.judge(PROF, 1, timed_out=True, seconds=9).word == "timeout"


def test_refused_names_are_found():
    asked = ["sm__ops_path_tensor_src_fp8.sum", "flop_count_sp.sum", "dram__bytes.sum"]
    said = ("==ERROR== Failed to find metric sm__ops_path_tensor_src_fp8.sum\n"
            "==ERROR== Failed to find metric regex:^flop_count_sp\\.(sum|min|max)$\n")  # fmt: skip
    assert command.refused(said, asked) == asked[:2]
    assert command.refused("all is well", asked) == []


# ---- reading ---------------------------------------------------------------------------------


class Metric:
    def __init__(self, value, unit=""):
        self._value, self._unit = value, unit

    def value(self):
        return self._value

    def unit(self):
        return self._unit


class Action:
    def __init__(self, name, **found):
        self._name, self._found = name, found

    def name(self):
        return self._name

    def metric_names(self):
        return (*self._found, "gone__from_the_report.sum")

    def metric_by_name(self, name):
        return self._found.get(name)


def reader_of(*ranges):
    return SimpleNamespace(load_report=lambda _: ranges)


def test_actions_become_rows(tmp_path):
    path = tmp_path / "x.ncu-rep"
    path.write_bytes(b"x")
    actions = [
        Action("k", **{
            metrics.TIME: Metric(1.5, "us"), metrics.DRAM_RATE: Metric(2.0, "Gbyte/second"),
            metrics.CLOCK: Metric(1.2, "cycle/nsecond"), metrics.L2_HITS: Metric(None, "%"),
            metrics.SM_BUSY: Metric(0.0, "%"), metrics.DEVICE_NAME: Metric("GPU"),
            "launch__function_pcs": Metric(3), "nvtx__text": Metric("secret"),
            "breakdown:sm__x.sum": Metric("a,b"), "dram__bytes.max.per_second": Metric(1.0)}),
        Action("l"),
    ]  # fmt: skip
    rows = report.read(path, reader_of([actions[0]], [actions[1]]))
    assert rows == [
        {"name": "k", "metrics": {metrics.TIME: 1500.0, metrics.DRAM_RATE: 2e9,
                                  metrics.CLOCK: pytest.approx(1.2e9), metrics.SM_BUSY: 0.0,
                                  metrics.DEVICE_NAME: "GPU"}},
        {"name": "l", "metrics": {}},
    ]  # fmt: skip


def test_a_missing_report_is_a_sentence(tmp_path):
    with pytest.raises(StudyError, match=r"x.ncu-rep is missing or empty"):
        report.read(tmp_path / "x.ncu-rep", reader_of())
    (tmp_path / "x.ncu-rep").write_bytes(b"")
    with pytest.raises(StudyError, match="missing or empty"):
        report.read(tmp_path / "x.ncu-rep", reader_of())


def test_a_reader_that_fails_is_a_sentence(tmp_path):
    def fails(_):
        raise RuntimeError("bad magic")

    (tmp_path / "x.ncu-rep").write_bytes(b"x")
    with pytest.raises(StudyError, match=r"no report that this reader knows \(bad magic\)"):
        report.read(tmp_path / "x.ncu-rep", SimpleNamespace(load_report=fails))


@pytest.mark.parametrize("content", [b"", b"no report\n" * 40, b"NVR\0" + bytes(5000)])
def test_the_real_reader_finds_no_kernel_in_a_bad_file(content, tmp_path):
    reader = pytest.importorskip("ncu_report", reason="needs the package ncu-report (extra [ncu])")
    path = tmp_path / "x.ncu-rep"
    path.write_bytes(content)
    rows = []
    with contextlib.suppress(StudyError):
        rows = report.read(path, reader)
    assert rows == []
    assert not command.judge(PROF, len(rows)).profiled


def test_csv_names_the_chip():
    text = ('"ID","Kernel Name","CC","gpu__time_duration.sum"\n"","","","second"\n'
            '"0","k","9.0","4.0e-05"')  # fmt: skip
    (row,) = report.read_csv(text)
    assert report.capability_of([row]) == (9, 0)
    assert row["metrics"][metrics.TIME] == pytest.approx(40_000)


def test_csv_gives_the_same_rows():
    found = kernel()
    rows = report.read_csv(as_csv(found, {metrics.TIME: 5.0}))
    assert rows[0] == {"name": "rms_norm_kernel", "metrics": found}
    assert rows[1]["metrics"] == {metrics.TIME: 5.0}, "n/a is missing, not zero"
    assert "build-7" not in json.dumps(rows)


@pytest.mark.parametrize("text", ["", "==ERROR== no such file", '"ID","Kernel Name"',
                                  '"ID","Something"\n"",""\n"1","2"',
                                  as_csv(kernel())[:-400]])  # fmt: skip
def test_csv_that_holds_no_whole_kernel_gives_none(text):
    assert report.read_csv(text) == []


@pytest.mark.parametrize(("value", "unit", "expected"), [
    (2, "ms", 2e6), (2, "second", 2e9), (2, "nsecond", 2.0), (3, "Gbyte/s", 3e9),
    (1.5, "GHz", 1.5), (1.5, "Ghz", 1.5e9), (4, "byte/cycle", 4), (7, "%", 7), (1, "byte/ns", 1e9),
])  # fmt: skip
def test_base_units(value, unit, expected):
    assert report.in_base_units(value, unit) == pytest.approx(expected)


def test_the_csv_is_taken_where_the_reader_finds_less(tmp_path, monkeypatch):
    path = tmp_path / "x.ncu-rep"
    path.write_bytes(b"x")
    monkeypatch.setattr(report, "module", lambda *_: reader_of([Action("k")]))
    monkeypatch.setattr(command, "asked", lambda *_: as_csv(kernel(), kernel()))
    assert report.rows(path, "ncu", 1)[1] == "ncu_report"
    rows, door = report.rows(path, "ncu", 2)
    assert (len(rows), door) == (2, "csv")
    monkeypatch.setattr(report, "module", lambda *_: None)
    assert report.rows(path, "ncu", 2)[1] == "csv"
    monkeypatch.setattr(command, "asked", lambda *_: "")
    with pytest.raises(StudyError, match="cannot be read: the package ncu-report is not installed"):
        report.rows(path, "ncu", 2)
