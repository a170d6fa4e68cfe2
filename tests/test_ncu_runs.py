"""Whole runs of ``python -m ncu`` with a stand-in for ncu."""

import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from impl.core import StudyError
from ncu import __main__ as cli
from ncu import command, fallback, result, run
from tests.inner import ROOT
from tests.ncu_input import FFMA, as_csv, kernel, node

# ---- whole runs ------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A plan whose ncu is tests/fake_ncu.py; ``fake(mode)`` chooses what it does."""
    binary = tmp_path / "ncu"
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/fake_ncu.py"} "$@"\n')
    binary.chmod(0o755)
    (tmp_path / "report.csv").write_text(as_csv(kernel(**{FFMA: 12_000.0})))
    monkeypatch.setenv("FAKE_CSV", str(tmp_path / "report.csv"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(command, "capability", lambda: None)

    def plan(mode="profiled", timeout=30.0, which="roofline"):
        monkeypatch.setenv("FAKE_NCU", mode)
        return run.Plan(str(binary), which, tmp_path / "out", timeout)

    return plan


def calls(tmp_path):
    path = tmp_path / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(tmp_path):
    entries = result.read_index(tmp_path / "out")
    return [json.loads((tmp_path / "out" / e["file"]).read_text()) for e in entries]


def test_a_profiled_test_is_kept_with_its_verdict(fake, tmp_path):
    said = []
    assert run.run([node("a"), node("b")], fake(), said.append) == 0
    first, second = results(tmp_path)
    assert (first["outcome"], first["counters"], first["reader"]) == ("profiled", True, "csv")
    assert first["verdict"].startswith("compute-bound: 75 % of fp32")
    assert first["device"] == {"name": "Made-up GPU", "capability": "9.0"}
    assert first["tool"] == "2025.3.1.0"
    assert (first["bytes_moved"], first["flops"]) == (1e6, 2e6)
    assert first["traffic"] == pytest.approx(100.0)
    assert first["cell"] == node("a")["cell"]
    assert second["fullname"].endswith("test_b")
    assert any("compute-bound" in line for line in said)
    kept = (tmp_path / "out" / "index.json").read_text() + json.dumps(first)
    assert all(secret not in kept for secret in (str(tmp_path), "4242", "build-7"))


def test_the_report_of_an_earlier_run_is_not_read_again(fake, tmp_path):
    assert run.run([node()], fake(), print) == 0
    assert run.run([node()], fake("nothing"), print) == 1
    (kept,) = results(tmp_path)
    assert (kept["outcome"], kept["kernels"]) == ("no kernels", [])


@pytest.mark.parametrize(("mode", "word", "why"), [
    ("failing", "test failed", "AssertionError: output is 12.1 dB from eager's"),
    ("nothing", "no kernels", "did not reach its measured call: SKIPPED [1] tests/test_x.py:3: n"),
])  # fmt: skip
def test_what_pytest_said_is_in_the_outcome(mode, word, why, fake, tmp_path):
    assert run.run([node()], fake(mode), print) == 1
    (kept,) = results(tmp_path)
    assert kept["outcome"] == word
    assert why in kept["why"]
    assert kept["verdict"] == ""


def test_a_counter_this_ncu_does_not_know_is_left_out_and_said(fake, tmp_path):
    assert run.run([node()], fake("choosy"), print) == 0
    (kept,) = results(tmp_path)
    assert "does not know lts__t_sector_hit_rate.pct" in kept["why"]
    first, second = calls(tmp_path)
    assert ",".join(first).count("lts__t_sector_hit_rate.pct") == 1
    assert "lts__t_sector_hit_rate.pct" not in ",".join(second)


def test_a_real_test_reaches_its_region_under_the_command_line(fake, tmp_path):
    """On a CPU, so that no kernel is launched: everything but the counters."""
    chosen = {"nodeid": "tests/test_latency.py::test_prefill[eager-lm_small-fp32-batch1]"}
    plan = replace(fake("runs", timeout=120.0), extra=["--device", "cpu", "--profile", "smoke"])
    assert run.run([node() | chosen], plan, print) == 1
    (kept,) = results(tmp_path)
    output = next((tmp_path / "out" / "raw").glob("*.out")).read_text()
    assert "1 passed" in output, output
    assert kept["why"] == "the measured call ran on cpu: nothing to profile"
    assert kept["bytes_moved"] > 1e6
    assert len(calls(tmp_path)) == 1


def test_a_long_call_says_what_was_left_out(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "MOST_LAUNCHES", 1)
    assert run.run([node()], fake(), print) == 0
    (kept,) = results(tmp_path)
    assert kept["why"] == "only the first 1 launches were profiled"
    assert kept["traffic"] is None


def test_launches_of_other_threads_are_found_too(fake, tmp_path):
    assert run.run([node()], fake("threads"), print) == 0
    (kept,) = results(tmp_path)
    assert "threads other than the caller's" in kept["why"]
    first, second = calls(tmp_path)
    assert "--nvtx-include" in first
    assert "--nvtx-include" not in second
    assert second[second.index("--profile-from-start") + 1] == "off", "start and stop bound it"


def test_what_the_machine_was_is_on_disk(fake, tmp_path):
    run.run([node()], fake(), print)
    raw = tmp_path / "out" / "raw"
    said = (raw / "machine.txt").read_text()
    assert "2025.3.1.0" in said
    assert f"torch: {importlib.metadata.version('torch')}" in said
    assert json.loads(next(raw.glob("*.rows.json")).read_text())[0]["name"] == "rms_norm_kernel"


def test_a_truncated_report_is_not_a_pass(fake, tmp_path):
    plan = fake()
    (tmp_path / "report.csv").write_text(as_csv())
    assert run.run([node()], plan, print) == 1
    assert results(tmp_path)[0]["outcome"] == "no kernels"


def test_a_test_that_hangs_is_ended_and_the_next_one_runs(fake, tmp_path):
    start = time.monotonic()
    assert run.run([node("a"), node("b")], fake("hangs", timeout=1.0), print) == 1
    assert time.monotonic() - start < 20
    assert [kept["outcome"] for kept in results(tmp_path)] == ["timeout", "timeout"]
    assert "not done after 1 s: raise --timeout" in results(tmp_path)[0]["why"]


def test_a_process_that_ignores_the_end_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 0.5)
    code = ("import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
            "print(p.pid, flush=True); time.sleep(60)")  # fmt: skip
    assert run.call([sys.executable, "-c", code], os.environ, 3.0, tmp_path / "out")
    child = int((tmp_path / "out").read_text())
    time.sleep(0.2)
    assert not alive(child)


def alive(pid):
    """Whether a process runs; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where pytest was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_finished(fake, tmp_path, monkeypatch, capsys):
    plan = fake("second hangs")
    (tmp_path / "calls").touch()
    monkeypatch.setattr(cli, "collect", lambda *_: [node("a"), node("b")])
    monkeypatch.setenv("NCU", plan.ncu)

    def interrupt():
        while (tmp_path / "calls").read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert cli.main(["-k", "x", "--out", str(tmp_path / "out")]) == 130
    assert "finished results are kept in" in capsys.readouterr().err
    (kept,) = results(tmp_path)
    assert kept["fullname"].endswith("test_a")
    assert kept["outcome"] == "profiled"


def test_a_skipped_test_is_not_started(fake, tmp_path):
    skipped = node(skip="needs sm89 for fp8; this is sm80")
    assert run.run([skipped], fake(), print) == 1, "nothing was profiled"
    assert calls(tmp_path) == []
    assert results(tmp_path)[0]["why"] == "needs sm89 for fp8; this is sm80"
    assert run.run([skipped, node("b")], fake(), print) == 0


# ---- without counters ------------------------------------------------------------------------

TRACE = {"traceEvents": [
    {"cat": "kernel", "name": "norm", "dur": 20.0, "args": {
        "registers per thread": 40, "shared memory": 2048, "grid": [4096, 1, 1],
        "block": [256, 1, 1], "est. achieved occupancy %": 75}},
    {"cat": "kernel", "name": "norm", "dur": 10.0, "args": {
        "registers per thread": 40, "shared memory": 2048, "grid": [4096, 1, 1],
        "block": [256, 1, 1], "est. achieved occupancy %": 75}},
    {"cat": "kernel", "name": "copy", "dur": 10.0, "args": {}},
    {"cat": "cpu_op", "name": "aten::add", "dur": 99.0},
]}  # fmt: skip


def test_kernel_times_stand_in_for_counters():
    found = fallback.kernels([e for e in TRACE["traceEvents"] if e["cat"] == "kernel"])
    assert [(k["name"], k["launches"], k["share"]) for k in found] == [
        ("norm", 2, 0.75), ("copy", 1, 0.25)]  # fmt: skip
    assert found[0]["verdict"] == ("no counters: 15 us, 40 registers, 2048 bytes of shared memory, "
                                   "at most 75 % occupancy")  # fmt: skip
    assert found[0]["grid"] == 4096
    assert fallback.sentence(found, 4e7) == (
        "no counters: 0.04 ms in 3 kernels, 1000 GB/s of least traffic"
    )


@pytest.fixture
def traced(monkeypatch):
    """The child under torch's profiler leaves TRACE; records what was started."""
    started = []

    def call(argv, env, seconds, output):
        started.append(argv)
        output.write_text("1 passed")
        Path(env["NCU_FACTS"]).write_text(json.dumps({"device": "cuda", "bytes_moved": 4e7}))
        Path(env["NCU_TRACE"]).write_text(json.dumps(TRACE))
        return False

    genuine = run.call
    monkeypatch.setattr(
        run, "call", lambda a, e, s, o: (call if "NCU_TRACE" in e else genuine)(a, e, s, o)
    )
    return started


def test_barred_counters_fall_back_and_ncu_is_not_asked_again(fake, traced, tmp_path):
    said = []
    assert run.run([node("a"), node("b")], fake("barred"), said.append) == 1
    assert len(calls(tmp_path)) == 1
    assert len(traced) == 2
    for kept in results(tmp_path):
        assert (kept["outcome"], kept["counters"], kept["reader"]) == ("not permitted", False,
                                                                      "kineto")  # fmt: skip
        assert kept["verdict"].startswith("no counters: 0.04 ms in 3 kernels, 1000 GB/s")
        assert "CAP_SYS_ADMIN" in kept["why"]
    assert any("no counters" in line for line in said)


def test_no_ncu_falls_back_too(traced, tmp_path):
    plan = run.Plan(None, "roofline", tmp_path / "out", 10.0)
    assert run.run([node()], plan, print) == 1
    (kept,) = results(tmp_path)
    assert kept["outcome"] == "no ncu"
    assert "install Nsight Compute" in kept["why"]
    assert kept["kernels"][0]["name"] == "norm"


@pytest.mark.parametrize("content", ["", "{", '{"traceEvents": 3}', "[]"])
def test_a_bad_trace_is_a_sentence(content, tmp_path):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(StudyError, match=r"t.json is no profiler trace"):
        fallback.events(tmp_path / "t.json")


# ---- the command -----------------------------------------------------------------------------


def test_dry_run_prints_and_starts_nothing(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NCU", fake().ncu)
    monkeypatch.setattr(cli, "collect", lambda *_: [node("a"), node("b", skip="no fp8")])
    assert cli.main(["-k", "x", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"NCU_CHILD=1 {tmp_path}/ncu --config-file off --target-processes")
    assert lines[1].endswith("# skipped: no fp8")
    assert calls(tmp_path) == []
    assert not (tmp_path / "out").exists()


def test_impl_narrows_the_expression(monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "collect", lambda *given: asked.append(given) or [node()])
    cli.main(["-k", "rms or add", "--impl", "triton", "--dry-run", "--", "--profile", "full"])
    cli.main(["tests/a.py", "--impl", "cuda", "--dry-run"])
    assert asked == [("(rms or add) and triton", [], ["--profile", "full"]),
                     ("cuda", ["tests/a.py"], [])]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), [
    (["-k", "x", "--timeout", "0"], "--timeout 0 is not positive"),
    (["-k", "x", "--metrics", "lots"], "--metrics lots is neither a set (roofline, launch, full)"),
    (["-k", "x"], "these tests run on cpu, and ncu profiles GPUs"),
    ([], 'name what to profile: -k "rms_norm and triton"'),
    (["-k", "x", "--", "tests/a.py"], "tests/a.py names a test: write it before the --"),
])  # fmt: skip
def test_bad_arguments_are_a_sentence(words, sentence, monkeypatch, capsys):
    monkeypatch.setattr(cli, "collect", lambda *_: [node() | {"device": "cpu"}])
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith(f"ncu: {sentence}")


def test_collecting_finds_the_tests_that_measure():
    extra = ["--models", "lm_small", "--techniques", "eager", "--device", "cpu"]
    found = run.collect("generation and fp32 and batch1", ["tests/test_latency.py"], extra)
    assert found[0]["nodeid"] == (
        "tests/test_latency.py::test_generation[eager-lm_small-fp32-batch1]"
    )
    assert found[0]["cell"]["techniques"] == ["eager"]
    assert {n["device"] for n in found} == {"cpu"}
    with pytest.raises(StudyError, match=r"-k 'dry_run' selects 1 tests, none of which measures"):
        run.collect("dry_run", ["tests/test_ncu_runs.py"])
    with pytest.raises(StudyError, match=r"cannot collect .*--no-such-option"):
        run.collect("x", [], ["--no-such-option"])
