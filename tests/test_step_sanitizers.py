"""The fused decode step under ThreadSanitizer and AddressSanitizer, which must find planted bugs.

A child builds the operator with the sanitizer and runs every kind of weights: single tokens, steps
of speculation's size, prompts through panels and a greedy loop in one call, in three threads.
    pytest -m slow tests/test_step_sanitizers.py
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from kernels import build
from tests import kernel_tools
from tests.inner import ROOT

CHILD = """
import pathlib, sys
import torch
from kernels import build, decode_step
from impl.models.kv_cache import KVCache
from tests.test_decode_step import prompt_model

sanitizer, folder, before, after, *kinds = sys.argv[1:]
build.FLAGS += [f"-fsanitize={sanitizer}", "-O1", "-g"]
if before:
    source = (build.HERE / "decode_step/cpu.cpp").read_text()
    assert before in source, "nothing to plant the bug in"
    build.HERE = pathlib.Path(folder)
    (build.HERE / "decode_step").mkdir()
    (build.HERE / "decode_step/cpu.cpp").write_text(source.replace(before, after))
torch.set_num_threads(1)
torch.get_num_threads = lambda: 3
decode_step.MOST_ROWS = 40  # a prompt of 45 takes several calls
draw = torch.Generator().manual_seed(1)
with torch.inference_mode():
    for kind in kinds:
        model, _ = prompt_model(kind)
        step = decode_step.DecodeStep(model)
        cache = KVCache(model.config, 2, 64, model.norm.weight.dtype)
        ids = torch.randint(0, 300, (2, 64), generator=draw)
        for start, end in ((0, 45), (45, 46), (46, 51), (51, 55)):
            step(ids[:, start:end], start, cache)
        assert step(ids[:, :20], 0, None, last_only=True).isfinite().all()
        together = step.generate(ids[:, :1], 55, 6, cache)
        step.generate(ids[:, :1], 55, 6, cache, lambda token: None)
        step(ids[:1, :3], 0, None)  # fewer heads than threads: queries are shared
        owner = torch.tensor([0] * 20 + [32, 40])  # a prompt beside two single tokens, one row
        at = torch.tensor([*range(20), 3, 5])
        shared = KVCache(model.config, 1, 64, model.norm.weight.dtype)
        step.packed(ids[0, :22], at, owner, torch.tensor([19, 20, 21]), shared)
        print("ran", kind, together.shape)
"""
KINDS = ("fp32", "bf16", "int8", "int8_dynamic", "int4")
FIRST_BARRIER = """team.meet();
        for (int64_t i = 0; i < m.layers; ++i) {"""
PLANTED = {
    "finds_a_race": ("thread", (FIRST_BARRIER, FIRST_BARRIER.removeprefix("team.meet();")),
                     "data race"),
    # beyond the end lies what was freed, or nothing: so large a block is mapped by itself
    "finds_an_overrun": ("address", ("nullptr).used;", "nullptr).used / 2;"),
                         "ERROR: AddressSanitizer"),
}  # fmt: skip


@pytest.fixture
def child(tmp_path, monkeypatch):
    """``child(sanitizer, planted, kinds)``: its CompletedProcess."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)

    def run(sanitizer, planted=("", ""), kinds=KINDS):
        command, env = kernel_tools.sanitized(sanitizer)
        env |= {"KERNELS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, sys.executable, "-c", CHILD, sanitizer, str(tmp_path),
                               *planted, *kinds], env=env, cwd=ROOT, capture_output=True,
                              text=True, timeout=600)  # fmt: skip

    return run


@pytest.mark.slow(on_request=True)
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_no_race_and_in_bounds(sanitizer, child):
    done = child(sanitizer)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[1] for line in done.stdout.splitlines()] == list(KINDS)


@pytest.mark.slow(on_request=True)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug, child):
    sanitizer, planted, finding = PLANTED[bug]
    done = child(sanitizer, planted, ("fp32",))
    assert done.returncode != 0
    assert finding in done.stderr
