"""Is an operation that torch calls in C++ the one that its Python route computes?

``kernels/<op>/call.cpp`` repeats in C++ what the operation's module says in Python: which
arguments are taken, what the outputs look like, and which function of ``cpu.cpp`` gets them.
"""

import ctypes
import functools
import itertools
import math
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
               and torch.equal(x[None].view(torch.uint8), y[None].view(torch.uint8))
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
    if accepted(OPS[op].check, args()):  # wrong contents, which C++ finds itself
        found = rf"^{op} .*{sentence}"
    else:
        found = rf"study::{op}.cpu does not take these arguments"
    with pytest.raises(RuntimeError, match=found):
        OPS[op].overloads["cpu"](*args())


OTHERS = {bool: [True, False], float: [0.0, -1.0, math.nan, math.inf, 1e39, 1e-60],
          int: [0, 2**40], str: ["", "tan"]}  # fmt: skip
STEPS = (-16, -1, 1, 16)


def variants(a):
    """An argument in other forms: each differs from ``a`` in its layout, dtype, shape or number."""
    if isinstance(a, torch.Tensor):
        forms = [lambda: a[:-1], lambda: a[:, :-1], lambda: a[..., :-1], lambda: a[:1],
                 lambda: a[:0], lambda: a[:, :0], lambda: a[..., :0], lambda: a[0],
                 lambda: a[None], lambda: a.flatten(), lambda: torch.cat((a, a)),
                 lambda: torch.cat((a, a), 1), lambda: torch.cat((a, a), -1),
                 lambda: a.repeat_interleave(2, -1)[..., ::2], lambda: a.transpose(0, -1),
                 lambda: a.transpose(0, -1).contiguous().transpose(0, -1)]  # fmt: skip
        others = (torch.double, torch.int64, torch.int32, torch.int8, torch.uint8)
        forms += [functools.partial(a.to, dtype) for dtype in (*DTYPES.values(), *others)]
    else:
        numbers = OTHERS[type(a)] + [a + n for n in STEPS if type(a) is int]
        forms = [functools.partial(lambda n: n, n) for n in numbers]
    for form in forms:
        try:
            yield form()
        except (IndexError, RuntimeError):  # a has no such dimension, torch no such form of it
            yield a


def told(call, args):
    """What a call gives, or what it says where it refuses."""
    try:
        return call(*args)
    except (KernelError, RuntimeError) as error:
        return repr(error)


@pytest.mark.parametrize("op", CALLED)
def test_whatever_argument_is_another_the_answer_is_that_of_python(op):
    """One argument in another form, or two tensors in the same: as good, or the same sentence."""
    case, seen = CASES[op], set()

    def checked(*args):
        OPS[op].check(*args)
        return OPS[op].functions["cpu"](*args)

    def compare(args, changes: dict):
        trial = [changes.get(i, a) for i, a in enumerate(args)]
        wanted, got = told(checked, trial), told(OPS[op], trial)
        if isinstance(wanted, str):
            assert got == wanted, changes
        else:
            assert not isinstance(got, str), (got, changes)
            assert same(got, wanted), changes
        seen.update((i, isinstance(wanted, str)) for i in changes)

    for shape in case.shapes:
        args = case.make(shape, torch.float32)
        for i, a in enumerate(args):
            for x in variants(a):
                compare(args, {i: x})
        tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        for pair in itertools.combinations(tensors, 2):
            for both in zip(*(variants(args[i]) for i in pair), strict=True):
                compare(args, dict(zip(pair, both, strict=True)))
    assert {i for i, refused in seen if refused} >= set(range(len(args))) - {FREE.get(op)}
    assert {refused for _, refused in seen} == {True, False}


FREE = {"rms_norm": 2, "add_rms_norm": 3, "layer_norm": 3}  # any eps will do


@pytest.mark.parametrize("op", CALLED)
def test_compiled_graphs_call_it_in_cpp_and_refuse_what_it_refuses(op, monkeypatch):
    args = CASES[op].make(CASES[op].shapes[0], torch.float32)
    expected = outputs(OPS[op](*args, impl="cpu"))[0] * 2
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: outputs(OPS[op](*a, impl="cpu"))[0] * 2, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    assert torch.equal(compiled(*args), expected)

    def python(*_):
        raise AssertionError("a call came through Python")

    monkeypatch.setattr(build, "cpu_function", python)
    assert torch.equal(compiled(*args), expected)
    if op in ("decode_attention", "paged_attention"):
        lengths = CASES[op].row_numbers[-1]
        args[lengths] = args[lengths] + 100
        with pytest.raises(RuntimeError, match=rf"^{op} got length \d+ in row 0; its cache has"):
            compiled(*args)


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


class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]  # fmt: skip


@pytest.mark.parametrize("op", CALLED)
def test_a_call_keeps_no_memory(op):
    allocator = ctypes.CDLL(None)
    if not hasattr(allocator, "mallinfo2"):
        pytest.skip("needs glibc 2.33, which counts what is allocated")
    allocator.mallinfo2.restype = Mallinfo2
    args, overload = CASES[op].make((CASES[op].shapes[0]), torch.float32), OPS[op].overloads["cpu"]
    OPS[op](*args, impl="cpu")
    wrong = [a.double() if a is args[0] else a for a in args]

    def grown(calls) -> int:
        before = allocator.mallinfo2().uordblks
        for _ in range(calls):
            overload(*args)
            accepted(overload, wrong)
        return allocator.mallinfo2().uordblks - before

    grown(10)
    assert grown(1000) < 1000 * 16, "the smallest piece that malloc gives takes 32 bytes"


@pytest.mark.parametrize("op", CALLED)
def test_another_instruction_set_is_another_function(op, monkeypatch):
    if len(build.isas()) < 2:
        pytest.skip("this processor has one instruction set")
    args = CASES[op].make(CASES[op].shapes[0], torch.float32)
    OPS[op](*args, impl="cpu")
    asked = []
    before = build.cpu_address
    monkeypatch.setattr(build, "cpu_address", lambda name, symbol: (
        asked.append((build.current_isa(), symbol)), before(name, symbol))[1])  # fmt: skip
    with build.isa("plain"):
        plain = OPS[op](*args, impl="cpu")
        assert same(plain, OPS[op](*args, impl="cpu"))
        assert same(plain, OPS[op].functions["cpu"](*args))
    OPS[op](*args, impl="cpu")
    symbols = calls._CALLS[op].symbols
    levels = ["plain", build.isas()[0]]
    assert asked == [(level, symbol) for level in levels for symbol in symbols]
    assert {symbol.rsplit("_", 1)[1] for symbol in symbols} == {"f32", "bf16", "f16"}


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
