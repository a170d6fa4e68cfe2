"""``python -m kernels``: what is built ahead, and what a failure says; an import builds nothing."""

import importlib.metadata
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernels import __main__ as command
from kernels import build
from kernels.op import OPS
from tests.kernel_tools import ROOT


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree of two operations, one of which is no C++."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "HERE", tmp_path)
    build._library.cache_clear()
    sources = {"planted_right": 'extern "C" int seven() { return 7; }', "planted_wrong": "no C++"}
    for name, text in sources.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpu.cpp").write_text(text)
    return tmp_path


def test_every_kernel_is_built_and_a_failure_is_named(tree, capsys):
    assert command.main([]) == 1
    said = capsys.readouterr()
    assert build.current_isa() in said.out
    assert "planted_wrong" in said.err
    assert "take impl='reference'" in said.err
    assert "planted_right" not in said.err
    (library,) = (tree / "cache").glob("*.so")
    assert library.name.startswith("planted_right")
    library.unlink()
    assert build._library("planted_right", build.current_isa()).seven() == 7, "built, not loaded"


def test_lesser_instruction_sets_are_built_when_asked_for(tree):
    assert command.main(["--every-isa"]) == 1
    built = {library.name.rsplit("-", 1)[0] for library in (tree / "cache").glob("*.so")}
    assert built == {f"planted_right-{level}" for level in build.isas()}


def test_processes_wait_for_the_one_that_builds(tree, monkeypatch):
    """Four at once, and the compiler runs once."""
    started = []
    compile_one = build._compile

    def slowly(*args):
        started.append(args)
        time.sleep(0.2)
        compile_one(*args)

    monkeypatch.setattr(build, "_compile", slowly)
    source = tree / "planted_right" / "cpu.cpp"

    def ask(_):
        return build._shared("planted_right", source, ["-shared", "-fPIC"], b"").seven()

    with ThreadPoolExecutor(4) as workers:  # a lock belongs to an open file, not to a process
        assert list(workers.map(ask, range(4))) == [7] * 4
    assert len(started) == 1


def test_a_machine_without_a_compiler_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert command.main([]) == 0
    assert "needs a C++ compiler" in capsys.readouterr().out


def test_importing_compiles_nothing():
    code = ("import sys, subprocess, kernels.build, kernels.op\n"
            "def forbidden(*a, **k): raise AssertionError('a process was started')\n"
            "subprocess.run = subprocess.Popen = forbidden\n"
            f"for name in {sorted(OPS)}: __import__('kernels.' + name)\n"
            "assert 'triton' not in sys.modules or 'kernels.rms_norm.triton' not in sys.modules\n"
            "import torch; assert not torch.cuda.is_initialized()")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_distribution_shadows_this_package():
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
