"""Are kernels timed as they should be?  Selection, inputs, rivals and checks of kernel_speed."""

import dataclasses
import math

import pytest
import torch

from kernels.op import OPS
from tests import kernel_speed, matrix
from tests.inner import fresh_pytest
from tests.kernel_cases import SPEEDS, Rival
from tests.kernel_speed import Disagrees, KernelCell
from tests.plugins.kernels import asked_for, undescribed

SMALL = KernelCell("rms_norm", "reference", "fp32", (40, 64))
LINEAR = KernelCell("int8_linear", "reference", "fp32", (3, 32, 64))


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch):
    monkeypatch.setattr(kernel_speed, "SMALLEST_DRAM", 1 << 12)
    monkeypatch.setattr(kernel_speed, "last_level_cache", lambda device: 1 << 10)
    monkeypatch.setattr(kernel_speed, "compiled", lambda eager: eager)


def measured(cell):
    """What the ``bench`` fixture is asked to do."""
    asked = {}
    cell.measure(lambda **given: asked.update(given), "cpu")
    return asked


# ---- which cells -----------------------------------------------------------------------------


def of_op(cells, op):
    return [c for c in cells.values() if c.op == op]


@pytest.mark.parametrize("op", SPEEDS)
def test_profiles_take_one_the_decoding_and_all_shapes(op):
    sizes = {
        profile: {c.shape for c in of_op(kernel_speed.cells(matrix.Selection(profile)), op)}
        for profile in ("smoke", "core", "full")
    }
    assert sizes["smoke"] == {SPEEDS[op].shapes[0]}
    assert sizes["smoke"] <= sizes["core"] <= sizes["full"] == set(SPEEDS[op].shapes)


def test_every_implementation_has_cells_the_reference_only_in_full():
    core, full = (kernel_speed.cells(matrix.Selection(p)) for p in ("core", "full"))
    for op in SPEEDS:
        assert {c.impl for c in of_op(full, op)} == set(OPS[op].functions)
        assert {c.impl for c in of_op(core, op)} == set(OPS[op].functions) - {"reference"}


def test_what_was_asked_of_the_matrix_narrows_kernels_too():
    found = kernel_speed.cells(matrix.Selection("core", precisions=("bf16",), batches=(8,)))
    assert found
    assert {(c.precision, c.batch) for c in found.values()} == {("bf16", 8)}
    assert not kernel_speed.cells(matrix.Selection("core", models=("lm_small",)))
    assert not kernel_speed.cells(matrix.Selection("core", techniques=("torch_compile",)))


def wants(*args, keyword="", only=True, profile="core", collect=False):
    class Config:
        option = type("Option", (), {"benchmark_only": only, "collectonly": collect,
                                     "keyword": keyword, "profile": profile})  # fmt: skip

    Config.args = args or ("tests",)
    return asked_for(Config)


def test_a_plain_run_leaves_its_budget_to_the_stacks():
    assert not wants()
    assert not wants(profile="smoke")
    assert not wants(keyword="latency and lm_small")
    assert not wants("tests/test_latency.py")
    assert not wants("tests/test_kernels.py", only=False), "that asks whether they are right"
    assert wants("tests/test_kernels.py")
    assert wants(keyword="rms_norm and not bf16")
    assert wants(profile="full")
    assert wants("tests/test_kernels.py::test_speed[x]", only=False), "named: profilers do"


def test_ids_are_told_apart_and_name_every_coordinate():
    cells = kernel_speed.cells(matrix.Selection("full"))
    marks = {tuple(sorted(c.mark().kwargs.items())) for c in cells.values()}
    assert len(marks) == len(cells)
    assert SMALL.id == "rms_norm_reference-kernel-fp32-batch40-40x64"


def test_what_cannot_run_here_says_so():
    sentence = dataclasses.replace(SMALL, impl="triton").missing("cpu")
    assert sentence == (
        "impl='triton' needs a GPU to be timed; on a CPU only its numbers are checked"
    )
    assert "needs cuda for fp16" in dataclasses.replace(SMALL, precision="fp16").missing("cpu")
    assert SMALL.missing("cpu") is None


def test_an_operation_without_a_description_says_so():
    skipped = undescribed("new_operation").marks[1]
    assert skipped.kwargs["reason"].startswith("new_operation has no Speed yet: describe one")


def test_kernels_come_after_the_stacks():
    """How they keep memory must not move a stack's time."""
    done = fresh_pytest("--collect-only", "--benchmark-only", "--profile", "smoke",
                        "tests/test_kernels.py", "tests/test_latency.py")  # fmt: skip
    nodes = [line for line in done.stdout.splitlines() if "::" in line]
    kinds = ["test_speed[" in node for node in nodes]
    assert any(kinds)
    assert not all(kinds)
    assert kinds == sorted(kinds)
    assert not done.stderr, "at exit libraries report what they believe has leaked"


# ---- what a cell measures --------------------------------------------------------------------


@pytest.mark.parametrize("timed", [SMALL, LINEAR], ids=lambda c: c.id)
def test_all_sides_get_the_same_and_agree(timed):
    asked = measured(timed)
    assert set(asked["sides"]) >= {"variant", "baseline", "without"}
    for given in asked["inputs"]:
        wanted = asked["sides"]["variant"](given)
        for call in asked["sides"].values():
            assert kernel_speed.sqnr(call(given), wanted) > 20
    contents = {tuple(x.args[0].flatten().tolist()) for x in asked["inputs"]}
    assert len(contents) == len(asked["inputs"]) >= 4, "no answer can be remembered"


def test_inputs_exceed_the_caches(monkeypatch):
    monkeypatch.setattr(kernel_speed, "SMALLEST_DRAM", 1 << 16)
    inputs = kernel_speed.make_inputs(SMALL, "cpu")
    assert sum(kernel_speed.nbytes(x.args) for x in inputs) >= 1 << 16
    assert len({x.args[0].data_ptr() for x in inputs}) == len(inputs)


def test_other_inputs_keep_their_lengths_and_tables():
    lengths, x = torch.tensor([3, 9, 5]), torch.randn(3, 8)
    other = kernel_speed.rolled([x, lengths, 0.5], 1)
    assert not torch.equal(other[0], x)
    assert torch.equal(other[1], lengths)
    assert other[1].data_ptr() != lengths.data_ptr()
    assert other[2] == 0.5


def test_bytes_and_flops_are_the_operations_own():
    from kernels import rms_norm

    asked = measured(SMALL)
    assert asked["bytes_moved"] == rms_norm.bytes_moved(40, 64, 4)
    assert asked["flops"] == rms_norm.flops(40, 64)
    assert measured(LINEAR)["flops"] == 2 * 3 * 32 * 64, "the formula torch knows"
    assert asked["bytes_written"] == 40 * 64 * 4
    assert asked["weight_bytes"] is None
    assert measured(LINEAR)["weight_bytes"] == 32 * 64 + 4 * 32


def test_a_changed_input_changes_the_answer_and_back():
    asked = measured(SMALL)
    given, call = asked["inputs"][0], torch.inference_mode()(asked["sides"]["variant"])
    before = call(given).clone()
    with torch.inference_mode():
        restore = asked["change"](given)
    changed = call(given)
    assert not torch.equal(changed, before)
    asked["agree"](changed, given)
    with pytest.raises(AssertionError, match="times its budget"):
        asked["agree"](before, given)
    with torch.inference_mode():
        restore()
    assert torch.equal(call(given), before)


def test_one_wrong_row_and_one_unwritten_element_are_found():
    asked = measured(dataclasses.replace(SMALL, shape=(16, 64)))
    given = asked["inputs"][0]
    good = asked["sides"]["variant"](given)
    for wrong in (0.0, float("nan")):
        bad = good.clone()
        bad[5] = wrong
        with pytest.raises(AssertionError):
            asked["agree"](bad, given)


def with_peer(monkeypatch, **peers):
    speed = dataclasses.replace(SPEEDS["rms_norm"], peers=peers)
    monkeypatch.setitem(SPEEDS, "rms_norm", speed)
    return speed.eager


def test_a_peer_that_computes_something_else_fails_the_cell(monkeypatch):
    with_peer(monkeypatch, wrong=Rival(lambda x, weight, eps: x))
    with pytest.raises(Disagrees, match=r"wrong is .* dB from the operation"):
        measured(SMALL)


def test_a_peer_that_computes_no_numbers_fails_the_cell(monkeypatch):
    with_peer(monkeypatch, wrong=Rival(lambda x, weight, eps: torch.full_like(x, math.nan)))
    with pytest.raises(Disagrees, match="wrong is -inf dB from the operation"):
        measured(SMALL)


def test_of_a_large_answer_every_column_is_looked_at():
    right = torch.randn(4 * kernel_speed.LOOKED_AT // 4096, 4096)
    for column in (0, 1, 4095):
        wrong = right.clone()
        wrong[:, column] = 100.0
        assert kernel_speed.sqnr(right.clone(), right) == math.inf
        assert kernel_speed.sqnr(wrong, right) < 10


def test_an_absent_peer_is_named_and_the_fastest_stands(monkeypatch):
    def absent(*args):
        raise NotImplementedError("not on this machine")

    eager = SPEEDS["rms_norm"].eager
    repeated = Rival(lambda *args: [eager.call(*args) for _ in range(200)][-1])
    with_peer(monkeypatch, absent=Rival(absent), slow=repeated, quick=eager)
    asked = measured(SMALL)
    assert asked["names"]["peer"] == "quick"
    assert "no absent here (not on this machine)" in asked["effect"]()


def test_the_compiled_code_must_be_reached():
    with pytest.raises(kernel_speed.StudyError, match="called no C function"):
        kernel_speed.proof(dataclasses.replace(SMALL, impl="cpu"), lambda: None, [])


def test_cpu_kernels_write_into_the_same_memory():
    from kernels import build

    if reason := build.lacks_compiler():
        pytest.skip(reason)
    asked = measured(dataclasses.replace(SMALL, impl="cpu"))
    outputs = {asked["sides"]["variant"](x).data_ptr() for x in asked["inputs"]}
    assert outputs == {asked["outputs"][0].data_ptr()}
    assert asked["effect"]().startswith("C function rms_norm_f32 for ")
