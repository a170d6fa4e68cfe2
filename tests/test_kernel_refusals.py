"""What a kernel refuses, it refuses in one sentence: bad input, no compiler, another's choice."""

import pytest
import torch

from kernels import build
from kernels.op import OPS, KernelError
from tests.kernel_cases import BAD, CASES


@pytest.mark.parametrize(("op", "args", "sentence"), BAD)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_bad_input_is_one_sentence(op, args, sentence, impl):
    with pytest.raises(KernelError, match=sentence):
        OPS[op](*args(), impl=impl)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_explicit_choice_never_falls_back(case):
    args = case.make(case.shapes[0], torch.float32)
    with pytest.raises(KernelError, match="no implementation 'fastest'; it has reference"):
        OPS[case.op](*args, impl="fastest")
    if "cuda" in OPS[case.op].functions:
        with pytest.raises(KernelError, match="impl='cuda' runs on cuda tensors, not on cpu"):
            OPS[case.op](*args, impl="cuda")


def test_no_compiler_is_a_sentence(monkeypatch):
    case = CASES["rms_norm"]
    args = case.make(case.shapes[0], torch.float32)
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(build, "_function", build._function.__wrapped__)
    monkeypatch.setattr(build, "_library", build._library.__wrapped__)
    build.let_go_of_addresses()
    with pytest.raises(KernelError, match="needs a C\\+\\+ compiler; install g\\+\\+ or set CXX"):
        OPS["rms_norm"](*args, impl="cpu")
    assert OPS["rms_norm"].fastest("cpu") == "reference"


def test_a_kernel_argument_without_a_c_type_is_refused():
    with pytest.raises(TypeError, match="wrap it in ctypes"):
        build.typed((1e-6,))


def test_unknown_instruction_set_is_a_sentence():
    with pytest.raises(KernelError, match="unknown instruction set 'avx1024'; known: "), \
            build.isa("avx1024"):  # fmt: skip
        pass
