"""Are the kernels right?  Every operation, implementation, dtype and shape against fp64.

By default: reference and CPU C++ at every instruction set of this processor, CUDA through the
host shim (as for sm_80 and, where sm_90a has a path of its own, as for that), Triton under its
interpreter, both compiled for sm_80 and sm_90a with their registers held to
``tests/data/kernel_limits``.  On a GPU the same cases run there too.
With ``--benchmark-only`` they are timed instead, at real shapes.

    pytest tests/test_kernels.py                            everything but what is marked slow
    pytest tests/test_kernels.py -m slow                    those: sanitizers, under the host shim
    pytest --benchmark-only tests/test_kernels.py [-k rms_norm] [--profile full]      how fast
    KERNEL_LIMITS=record pytest tests/test_kernels.py -k compiles    a new record of registers
"""

from __future__ import annotations

import contextlib
import re

import pytest
import torch

from kernels import build
from kernels.op import OPS, unavailable
from tests import kernel_tools, triton_tools
from tests.inner import fresh_pytest
from tests.kernel_cases import CASES, DTYPES, excess, outputs

if build.interpreting():
    triton_tools.mend_interpreter()

CPU_ROUTES = ["cpu", "cpu_avx512_vnni", "cpu_avx2", "cpu_plain"]
ROUTES = [*CPU_ROUTES, "triton", "cuda", *kernel_tools.ON_HOST]


@contextlib.contextmanager
def route_open(op: str, route: str, monkeypatch):
    """Inside, ``run(*args)`` computes ``op`` by ``route``; skips with a sentence if it cannot."""
    impl = "cuda" if route in kernel_tools.ON_HOST else route.split("_")[0]
    if impl not in OPS[op].functions:
        pytest.skip(f"{op} has no {impl} implementation")
    if route in kernel_tools.ON_HOST:
        if reason := kernel_tools.lacks_shim():
            pytest.skip(reason)
        with kernel_tools.host_shim(monkeypatch, None, *kernel_tools.ON_HOST[route]):
            yield OPS[op].functions["cuda"]
        return
    if impl in ("triton", "cuda"):
        device = "cpu" if impl == "triton" and build.interpreting() else "cuda"
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip(f"impl={impl!r} needs a GPU; this machine has none")
        if reason := unavailable(impl, device):
            pytest.skip(reason)
        yield lambda *args: on_cpu(OPS[op](*on_device(args, device), impl=impl))
        return
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    level = route.removeprefix("cpu").lstrip("_") or build.isas()[0]
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    with build.isa(level):
        yield lambda *args: OPS[op](*args, impl="cpu")


def on_device(args, device):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def on_cpu(out):
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def same_bits(a, b) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8))
               for x, y in zip(outputs(a), outputs(b), strict=True))  # fmt: skip


def cases(routes=ROUTES):
    for case in CASES.values():
        for route in routes:
            for dtype in case.dtypes:
                for shape in case.shapes:
                    small = route not in kernel_tools.ON_HOST or case.fits_shim(shape)
                    if route == "hopper_on_host":
                        small = case.on_hopper and (small or shape in case.hopper_shapes)
                    if not small:
                        continue
                    name = "x".join(map(str, shape))
                    yield pytest.param(case, route, dtype, shape,
                                       id=f"{case.op}-{route}-{dtype}-{name}")  # fmt: skip


def first_cases(routes):
    """One parameter per operation, route and dtype, at the operation's first shape."""
    for case in CASES.values():
        for route in routes:
            for dtype in case.dtypes:
                yield pytest.param(case, route, dtype, id=f"{case.op}-{route}-{dtype}")


ALL_FIRST = list(first_cases([*CPU_ROUTES, "triton", "cuda"]))


@pytest.mark.parametrize(("case", "route", "dtype", "shape"), list(cases()))
def test_within_error_budget(case, route, dtype, shape, monkeypatch):
    args = case.make(shape, DTYPES[dtype])
    with route_open(case.op, route, monkeypatch) as run:
        assert excess(case, run(*args), args) <= 1


LONG_ROWS = ["rms_norm", "add_rms_norm", "layer_norm", "softmax"]


@pytest.mark.parametrize("op", LONG_ROWS)
def test_a_row_of_262144_columns_on_the_host_shim(op, monkeypatch):
    """More than a block keeps in shared memory, and as long as the vocabularies of today."""
    args = CASES[op].make((1, 262144), torch.bfloat16)
    with route_open(op, "cuda_on_host", monkeypatch) as run:
        assert excess(CASES[op], run(*args), args) <= 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("op", LONG_ROWS)
def test_long_rows_keep_nan_and_infinity_as_the_reference_does(op, poison, monkeypatch):
    args = CASES[op].make((2, 12500), torch.float32)
    args[0][1, 6000] = poison
    with route_open(op, "cuda_on_host", monkeypatch) as run:
        got, reference = outputs(run(*args)), outputs(CASES[op].reference(*args))
    for y, good in zip(got, reference, strict=True):
        assert torch.equal(y.isnan(), good.isnan())
        assert torch.equal(y.isinf(), good.isinf())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_budget_finds_one_wrong_element(case):
    args = case.make(case.shapes[0], torch.float32)
    good = tuple(t.clone() for t in outputs(case.reference(*args)))
    assert excess(case, good, args) <= 1
    if good[0].is_floating_point():
        good[0].view(-1)[-1] += good[0].abs().max() * 1e-3
    else:  # a choice: another one
        good[0].view(-1)[-1] += 1
    assert excess(case, good, args) > 1


@pytest.mark.parametrize(("case", "route", "dtype"), ALL_FIRST)
def test_repeats_bitwise_and_rows_do_not_mix(case, route, dtype, monkeypatch):
    args = case.make(case.shapes[0], DTYPES[dtype])
    with route_open(case.op, route, monkeypatch) as run:
        first = run(*args)
        assert same_bits(first, run(*args))
        if not case.row_args or not case.row_stable:
            return
        sliced = (*case.row_args, *case.row_numbers)
        alone = [a[1:2].clone() if i in sliced else a for i, a in enumerate(args)]
        assert same_bits(run(*alone), tuple(t[1:2] for t in outputs(first)))


LINEARS = ["int8_linear", "w8a8_linear", "int4_linear", "int4_a8_linear", "fp8_linear"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", CPU_ROUTES)
@pytest.mark.parametrize("op", LINEARS)
def test_a_row_of_many_has_the_bits_of_one_alone(op, route, dtype, monkeypatch):
    """Up to where its case says that sums change their order, whichever products a batch takes."""
    case = CASES[op]
    rows = min(70, case.order_changes.get(dtype, 71) - 1)
    args = case.make((rows, 33, 640), DTYPES[dtype])
    args[0][1] *= 1e-30  # a row that no whole numbers hold
    with route_open(op, route, monkeypatch) as run:
        together = run(*args)
        for m in (0, 1, rows - 1):
            assert same_bits(run(args[0][m : m + 1].clone(), *args[1:]), together[m : m + 1])


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 41])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("route", CPU_ROUTES)
@pytest.mark.parametrize("op", ["int8_linear", "w8a8_linear"])
def test_long_sums_of_the_largest_numbers_do_not_overflow(op, route, dtype, rows, monkeypatch):
    """Every product at its largest and of one sign, beyond what 32 bits add up, by every tile."""
    outputs, inputs = 19, 9001
    largest = 1 - 2**-8  # as whole numbers of 8, 15 or 30 bits too
    sign = torch.tensor([1.0, -1.0]).repeat(rows)[:rows, None]
    x = (sign * largest).repeat(1, inputs).to(DTYPES[dtype])
    weight = torch.full((outputs, inputs), -128, dtype=torch.int8)
    weight[1::2] = 127
    exact = x.double() @ weight.double().T * 2**-10
    with route_open(op, route, monkeypatch) as run:
        y = run(x, weight, torch.full((outputs,), 2**-10), None)
    rounding = 2**-8 if dtype == "bf16" else inputs * 2**-24  # of a plain sum in fp32
    torch.testing.assert_close(y.double(), exact, rtol=rounding, atol=0)


@pytest.mark.parametrize(("case", "route", "dtype"), ALL_FIRST)
def test_strided_rows_give_the_same(case, route, dtype, monkeypatch):
    args = case.make(case.shapes[0], DTYPES[dtype])
    if not case.row_args:
        pytest.skip(f"{case.op} has no rows")
    spread = list(args)
    for i in case.row_args:
        wide = torch.full((*args[i].shape[:-1], args[i].shape[-1] + 3), torch.nan,
                          dtype=args[i].dtype)  # fmt: skip
        spread[i] = wide[..., : args[i].shape[-1]].copy_(args[i])
        assert not spread[i].is_contiguous()
    with route_open(case.op, route, monkeypatch) as run:
        assert same_bits(run(*args), run(*spread))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("case", "route", "dtype"), ALL_FIRST)
def test_nan_and_infinity_stay_in_their_row(case, route, dtype, poison, monkeypatch):
    args = list(case.make(case.shapes[0], DTYPES[dtype]))
    if not case.row_args or not case.row_stable:
        pytest.skip(f"{case.op} mixes rows")
    with route_open(case.op, route, monkeypatch) as run:
        clean = outputs(run(*args))
        x = args[case.row_args[0]] = args[case.row_args[0]].clone()
        x[1, ..., x.shape[-1] // 2] = poison
        got, reference = outputs(run(*args)), outputs(case.reference(*args))
    for y, was, good in zip(got, clean, reference, strict=True):
        assert torch.equal(y[1].isnan(), good[1].isnan())
        assert torch.equal(y[1].isinf(), good[1].isinf())
        rest = [i for i in range(len(y)) if i != 1]
        assert torch.equal(y[rest], was[rest])


@pytest.mark.parametrize("magnitude", [1e-35, 1e-18, 1e15])
@pytest.mark.parametrize(("case", "route", "dtype"), ALL_FIRST)
def test_large_and_small_magnitudes(case, route, dtype, magnitude, monkeypatch):
    if dtype == "fp16":
        pytest.skip(f"{magnitude:g} is outside fp16's range")
    args = list(case.make(case.shapes[0], DTYPES[dtype]))
    for i in case.row_args:
        args[i] = args[i] * magnitude
    with route_open(case.op, route, monkeypatch) as run:
        assert excess(case, run(*args), args) <= 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_threads_change_no_bit(case, threads):
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    args = case.make(case.large, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        several = OPS[case.op](*args, impl="cpu")
    finally:
        torch.set_num_threads(before)
    assert same_bits(several, OPS[case.op](*args, impl="cpu"))
    assert excess(case, several, args) <= 1


# ---- torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_a_proper_operator_of_torch(case, impl):
    if impl == "cpu" and (reason := build.lacks_compiler()):
        pytest.skip(reason)
    args = tuple(case.make(case.shapes[0], torch.float32))
    tests = ["test_schema", "test_faketensor"]
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
        tests.remove("test_schema")  # it multiplies every argument; torch has no product of e4m3
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        OPS[case.op](*args, impl=impl)
        tensors = [(a, b) for a, b in zip(args, before, strict=True) if isinstance(a, torch.Tensor)]
        assert all(same_bits(a, b) for a, b in tensors), "it says that it changes no argument"
    torch.library.opcheck(OPS[case.op].overloads[impl], args, test_utils=tests)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiles_into_one_graph(case):
    args = tuple(case.make(case.shapes[0], torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: outputs(OPS[case.op](*a))[0] * 2, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    expected = outputs(OPS[case.op](*args))[0] * 2
    assert torch.equal(compiled(*args), expected)


# ---- without a GPU --------------------------------------------------------------------------


@pytest.mark.slow
def test_triton_is_right_under_its_interpreter():
    """A child runs the triton cases there are; bf16 is unsupported by the interpreter."""
    pytest.importorskip("triton", reason="needs the package triton")
    if build.interpreting():
        pytest.skip("this is that child")
    chosen = "triton and not bf16 and not compiles and not interpreter"
    done = fresh_pytest(
        *("-p", "no:xdist", "-W", "ignore::RuntimeWarning", "-k", chosen),
        *("tests/test_kernels.py", "tests/test_gelu_bias.py"),
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 10 * sum("triton" in OPS[c].functions for c in CASES)


WITH_CUDA = [name for name, case in CASES.items() if (build.HERE / name / "cuda.cu").exists()]


def declared(ops):
    """(operation, architecture) for every one that its GPU kernels are for."""
    return [pytest.param(op, arch, id=f"{op}-{arch}") for op in ops for arch in CASES[op].archs]


@pytest.mark.parametrize(("op", "arch"), declared(WITH_CUDA))
def test_cuda_compiles_within_its_limits(op, arch):
    if kernel_tools.nvcc() is None:
        pytest.skip("needs nvcc (extra [gpu], or a CUDA toolkit)")
    compiler, usage, opcodes = kernel_tools.compile_cuda(op, arch)
    assert sorted(usage) == sorted(opcodes) == sorted(kernel_tools.entry_points(op))
    kernel_tools.check_limits(compiler, op, arch, usage)
    wanted = CASES[op].cuda_mma
    matrix = [k for k in opcodes if wanted and re.search(CASES[op].cuda_mma_kernels, k)]
    assert bool(matrix) == bool(wanted)
    for kernel in matrix:
        own = [o for name, o in CASES[op].on_hopper.items() if re.search(f"{name}$", kernel)]
        opcode = own[0] if own and arch == "sm_90a" else wanted
        assert opcodes[kernel] == [opcode], f"{kernel} uses no {opcode} on {arch}"


def test_opcodes_are_found_in_ptx_where_nothing_disassembles(monkeypatch):
    if kernel_tools.nvcc() is None:
        pytest.skip("needs nvcc (extra [gpu], or a CUDA toolkit)")
    monkeypatch.setattr(kernel_tools, "disassembler", lambda: None)
    _, _, opcodes = kernel_tools.compile_cuda("w8a8_linear", "sm_80")
    assert opcodes["w8a8_linear_gemm_bf16"] == opcodes["w8a8_linear_few_f32"] == ["IMMA"]
    assert opcodes["w8a8_linear_quantize_bf16"] == []
    _, _, opcodes = kernel_tools.compile_cuda("w8a8_linear", "sm_90a")
    assert opcodes["w8a8_linear_gemm_bf16"] == ["IGMMA"]
    assert opcodes["w8a8_linear_few_bf16"] == ["IMMA"]


@pytest.mark.parametrize("op", WITH_CUDA)
def test_cuda_compiles_by_nvrtc(op):
    if reason := build.lacks_nvrtc("cuda"):
        pytest.skip(reason)
    path, log = build.cubin(op, "sm_90a")
    assert path.stat().st_size > 1000
    assert all(used["spills"] == 0 for used in kernel_tools.ptxas_usage(log).values())


WITH_TRITON = [name for name in CASES if (build.HERE / name / "triton.py").exists()]


@pytest.mark.parametrize(("op", "arch"), declared(WITH_TRITON))
def test_triton_compiles_within_its_limits(op, arch):
    pytest.importorskip("triton", reason="needs the package triton")
    built = triton_tools.compiled_elsewhere(op, arch)
    kernel_tools.check_limits(built["version"], op, arch, built["usage"])
    wanted = CASES[op].mma.get(arch)
    for kernel, opcodes in built["opcodes"].items():
        if wanted and re.search(CASES[op].mma_kernels, kernel):
            assert wanted in opcodes, f"{kernel} uses no {wanted} on {arch}, only {opcodes}"


SANITIZED = [("thread", None, None, None), ("address", None, None, None),
             ("thread", "-D__syncthreads()=", None, "data race"),
             ("address", None, -1, "heap-buffer-overflow")]  # fmt: skip


@pytest.mark.slow(on_request=True)
@pytest.mark.parametrize(("sanitizer", "plant", "short", "finding"), SANITIZED,
                         ids=["threads", "bounds", "finds_a_race", "finds_an_overrun"])  # fmt: skip
@pytest.mark.parametrize("op", WITH_CUDA)
def test_cuda_has_no_race_and_stays_in_bounds(op, sanitizer, plant, short, finding, monkeypatch):
    """The host shim under ThreadSanitizer and AddressSanitizer, which must find planted bugs."""
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)
    case = CASES[op]
    if plant and "__syncthreads" not in (build.HERE / op / "cuda.cu").read_text() + case.uses:
        pytest.skip(f"{op} needs no barrier")
    launches: list = []
    with kernel_tools.host_shim(monkeypatch, launches):
        for shape in case.shim_shapes:
            OPS[op].functions["cuda"](*case.make(shape, torch.float32))
    library = kernel_tools.build_shim(op, f"-fsanitize={sanitizer}", *[plant] * bool(plant))
    short = None if short is None else case.short_argument
    child = kernel_tools.replay(library, launches, sanitizer, short)
    if finding is None:
        assert child.returncode == 0, child.stderr[-3000:]
        assert f"replayed {len(launches)}" in child.stdout
    else:
        assert child.returncode != 0
        assert finding in child.stderr


# ---- how fast -------------------------------------------------------------------------------


@pytest.mark.kernels
def test_speed(kernel, device, bench):
    """Against torch eager, torch.compile, the best library here and this machine's limit."""
    kernel.measure(bench, device)
