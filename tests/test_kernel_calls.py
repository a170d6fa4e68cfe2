"""Is an operation that torch calls in C++ the one that its Python route computes?

``kernels/<op>/call.cpp`` repeats in C++ what the operation's module says in Python: which
arguments are taken, what the outputs look like, and which function of ``cpu.cpp`` gets them.
"""

import subprocess
import sys

import pytest
import torch

from kernels import build, calls
from kernels.op import OPS, KernelError
from tests.kernel_cases import BAD, CASES, DTYPES, outputs
from tests.kernel_tools import ROOT

CALLED = sorted(path.parent.name for path in build.HERE.glob("*/call.cpp"))


@pytest.fixture(autouse=True)
def _compiler():
    if reason := build.lacks_compiler():
        pytest.skip(reason)


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and x.stride() == y.stride()
               and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
               for x, y in zip(outputs(a), outputs(b), strict=True))  # fmt: skip


@pytest.mark.parametrize("op", CALLED)
def test_a_call_passes_no_python(op, monkeypatch):
    args = CASES[op].make(CASES[op].shapes[0], torch.float32)
    expected = OPS[op](*args, impl="cpu")

    def python(*_):
        raise AssertionError("a call came through Python")

    monkeypatch.setattr(build, "cpu_function", python)
    assert calls.is_installed(op)
    assert same(OPS[op](*args, impl="cpu"), expected)
    with torch.inference_mode():
        assert same(OPS[op](*args, impl="cpu"), expected)
    with pytest.raises(AssertionError, match="came through Python"):
        OPS[op].functions["cpu"](*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CALLED)
def test_same_bits_and_layout_as_through_python(op, dtype):
    case = CASES[op]
    for shape in case.shapes:
        args = case.make(shape, DTYPES[dtype])
        assert same(OPS[op](*args, impl="cpu"), OPS[op].functions["cpu"](*args)), shape


def layouts(x: torch.Tensor):
    """x's numbers in other layouts: some have evenly spaced dense rows, some have not."""
    yield x
    yield torch.cat((x, x), -1)[..., : x.shape[-1]]
    yield torch.cat((x, x), 0)[::2]
    yield x.repeat_interleave(2, -1)[..., ::2]
    yield x.unsqueeze(0).expand(3, *x.shape)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    if x.dim() > 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
        yield torch.cat((x, x), 1)[:, : x.shape[1]]


def accepted(call, args) -> bool:
    try:
        call(*args)
    except (KernelError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("op", CALLED)
def test_takes_the_layouts_that_the_checks_take_and_no_other(op):
    case, seen = CASES[op], set()
    for shape in case.shapes:
        args = case.make(shape, torch.float32)
        for i in case.row_args:
            for x in layouts(args[i]):
                alike = case.row_args if x.dim() > args[i].dim() else (i,)
                trial = [x if j in alike else a for j, a in enumerate(args)]
                fine = accepted(OPS[op].check, trial)
                assert accepted(OPS[op].overloads["cpu"], trial) == fine, (shape, x.stride())
                if fine:
                    assert same(OPS[op](*trial, impl="cpu"), OPS[op].functions["cpu"](*trial))
                seen.add(fine)
    assert seen == {True, False}


@pytest.mark.parametrize(("op", "args", "sentence"), [b for b in BAD if b.values[0] in CALLED])
def test_what_the_checks_refuse_is_refused_without_them(op, args, sentence):
    OPS[op](*CASES[op].make(CASES[op].shapes[0], torch.float32), impl="cpu")  # installed
    with pytest.raises(RuntimeError, match=rf"study::{op}.cpu does not take these arguments"):
        OPS[op].overloads["cpu"](*args())


@pytest.mark.parametrize("op", CALLED)
def test_a_call_keeps_no_tensor(op):
    args = CASES[op].make(CASES[op].shapes[0], torch.float32)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    for wrong in (False, True):
        before = [t._use_count() for t in tensors]
        for _ in range(3):
            given = [a.double() if wrong and a is tensors[0] else a for a in args]
            assert accepted(OPS[op].overloads["cpu"], given) != wrong
        assert [t._use_count() for t in tensors] == before


def test_another_instruction_set_is_another_function(monkeypatch):
    if len(build.isas()) < 2:
        pytest.skip("this processor has one instruction set")
    args = CASES["softmax"].make((3, 301), torch.float32)
    OPS["softmax"](*args, impl="cpu")
    asked = []
    before = build.cpu_address
    monkeypatch.setattr(build, "cpu_address", lambda name, symbol: (
        asked.append((build.current_isa(), symbol)), before(name, symbol))[1])  # fmt: skip
    with build.isa("plain"):
        OPS["softmax"](*args, impl="cpu")
        OPS["softmax"](*args, impl="cpu")
    OPS["softmax"](*args, impl="cpu")
    symbols = [f"softmax_{suffix}" for suffix in ("f32", "bf16", "f16")]
    levels = ["plain", build.isas()[0]]
    assert asked == [(level, symbol) for level in levels for symbol in symbols]


def test_a_failed_build_is_raised_by_the_call_that_needed_it(monkeypatch):
    args = CASES["softmax"].make((3, 301), torch.float32)
    OPS["softmax"](*args, impl="cpu")

    def broken(name, symbol):
        raise KernelError("the compiler is out")

    monkeypatch.setattr(build, "cpu_address", broken)
    build.let_go_of_addresses()
    with pytest.raises(KernelError, match="the compiler is out"):
        OPS["softmax"](*args, impl="cpu")
    monkeypatch.undo()
    OPS["softmax"](*args, impl="cpu")


def test_without_torch_s_headers_the_python_route_stays():
    code = ("import torch, pathlib\n"
            "from kernels import build, calls\n"
            "from kernels.rms_norm import rms_norm\n"
            "build.TORCH_HOME = pathlib.Path('/nowhere')\n"
            "x = torch.ones(2, 8)\n"
            "assert torch.allclose(rms_norm(x, x[0], impl='cpu'), x)\n"
            "assert not calls.is_installed('rms_norm')")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
