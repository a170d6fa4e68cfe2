"""The region that ncu profiles: which call it holds, when it is reached, what it leaves."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from ncu import command, fallback
from tests.inner import Run
from tests.plugins import ncu as plugin


class Cuda:
    """Stands in for ``torch.cuda``: remembers what was called, in order."""

    def __init__(self, seen):
        def note(word):
            return lambda *args: seen.append((word, *args))

        self.synchronize = note("synchronize")
        self.profiler = type("Profiler", (), {"start": note("start"), "stop": note("stop")})
        self.nvtx = type("Nvtx", (), {"range_push": note("push"), "range_pop": note("pop")})


@pytest.fixture
def region(monkeypatch, tmp_path):
    """What the region did around a call; the child of ncu, with a stand-in for torch.cuda."""
    seen = []
    monkeypatch.setenv("NCU_CHILD", "1")
    monkeypatch.setenv("NCU_FACTS", str(tmp_path / "facts"))
    monkeypatch.delenv("NCU_TRACE", raising=False)
    monkeypatch.setattr(torch, "cuda", Cuda(seen))
    return seen


def words(seen):
    return [entry if isinstance(entry, str) else entry[0] for entry in seen]


def test_only_the_warm_call_is_profiled(region, tmp_path):
    plugin.measured(lambda: region.append("call"), "cuda", bytes_moved=5)
    assert words(region) == ["call", "synchronize", "start", "push", "call", "synchronize", "pop",
                             "stop"]  # fmt: skip
    assert ("push", command.RANGE) in region, "the range that ncu is told to include"
    assert json.loads((tmp_path / "facts").read_text()) == {"device": "cuda", "bytes_moved": 5}


def test_a_call_that_fails_leaves_the_profiler_off(region):
    made = []

    def call():
        made.append(1)
        if len(made) == 2:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        plugin.measured(call, "cuda")
    assert words(region)[-2:] == ["pop", "stop"]


def test_without_cuda_only_the_facts_are_left(region, tmp_path):
    plugin.measured(lambda: region.append("call"), "cpu", flops=7)
    assert region == []
    assert json.loads((tmp_path / "facts").read_text()) == {"device": "cpu", "flops": 7}


def test_without_ncu_nothing_happens(region, tmp_path, monkeypatch):
    monkeypatch.delenv("NCU_CHILD")
    plugin.measured(lambda: region.append("call"), "cuda")
    assert region == []
    assert not (tmp_path / "facts").exists()


def test_the_profiler_of_torch_writes_a_trace(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a GPU the trace holds kernels; this is about a machine without one")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CUDA is not available")
        plugin._traced(lambda: torch.ones(3).add(1), tmp_path / "t.json")
    assert "aten::add" in (tmp_path / "t.json").read_text()
    assert fallback.events(tmp_path / "t.json") == []


def test_a_cell_reaches_the_region_only_when_it_is_right(tmp_path):
    facts = tmp_path / "facts"
    environment = {"NCU_CHILD": "1", "NCU_FACTS": str(facts)}
    ran = Run(tmp_path, "cheats.py", "--benchmark-disable", "-k", "zeros", **environment)
    assert ran.code == 1
    assert not facts.exists(), "a wrong cell was profiled"
    ran = Run(tmp_path, "cheats.py", "--benchmark-disable", "-k", "honest_a_a", **environment)
    assert ran.code == 0, ran.text
    assert json.loads(facts.read_text())["device"] == "cpu"


def test_a_job_that_requires_ncu_fails_without_it(tmp_path, monkeypatch):
    config = SimpleNamespace(option=SimpleNamespace(help=False))
    monkeypatch.setenv("NCU", str(tmp_path / "ncu"))
    plugin.pytest_configure(config)
    monkeypatch.setenv("REQUIRE_NCU", "1")
    with pytest.raises(pytest.UsageError, match="REQUIRE_NCU is set and this machine lacks ncu"):
        plugin.pytest_configure(config)
    (tmp_path / "ncu").touch(mode=0o755)
    plugin.pytest_configure(config)
