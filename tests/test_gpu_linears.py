"""Quantized linear layers for GPUs, on the host shim: which kernel runs, and what they share."""

from __future__ import annotations

import pytest
import torch

from kernels.op import OPS, KernelError
from tests import kernel_tools
from tests.kernel_cases import CASES, DTYPES, excess


@pytest.fixture
def on_host(monkeypatch):
    """``run(op, *args)`` -> (its output by impl='cuda' on the CPU, names of the kernels)."""
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)

    def run(op, *args):
        launches: list = []
        with kernel_tools.host_shim(monkeypatch, launches):
            y = OPS[op].functions["cuda"](*args)
        return y, [launch[0].removeprefix(op + "_").rpartition("_")[0] for launch in launches]

    return run


@pytest.mark.parametrize(("op", "rows", "kernels"), [
    ("w8a8_linear", 1, ["quantize", "few"]),
    ("w8a8_linear", 64, ["quantize", "few"]),
    ("w8a8_linear", 65, ["quantize", "gemm"]),
    ("int4_a8_linear", 1, ["quantize", "few"]),
    ("int4_a8_linear", 64, ["quantize", "few"]),
    ("int4_a8_linear", 65, ["quantize", "gemm"]),
    ("int8_linear", 64, ["dot"]),
    ("int8_linear", 65, ["arrange", "gemm"]),
    ("int4_linear", 8, ["dot"]),
    ("int4_linear", 9, ["few"]),
    ("int4_linear", 64, ["few"]),
    ("int4_linear", 65, ["gemm"]),
])  # fmt: skip
def test_prompts_and_steps_take_their_own_kernel(op, rows, kernels, on_host):
    args = CASES[op].make((rows, 3, 64), torch.bfloat16)
    y, ran = on_host(op, *args)
    assert ran == kernels
    assert excess(CASES[op], y, args) <= 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_w8a8_rows_have_the_same_bits_in_a_step_and_a_prompt(dtype, on_host):
    """Sums are whole: neither the order nor the tile shows."""
    x, *weights = CASES["w8a8_linear"].make((70, 5, 150), DTYPES[dtype])
    whole, ran = on_host("w8a8_linear", x, *weights)
    assert ran[1] == "gemm"
    some, ran = on_host("w8a8_linear", x[50:].clone(), *weights)
    assert ran[1] == "few"
    assert torch.equal(whole[50:], some)


@pytest.mark.parametrize("rows", [3, 66])
@pytest.mark.parametrize("op", ["w8a8_linear", "int4_a8_linear"])
def test_nan_and_infinity_stay_in_their_row(op, rows, on_host):
    x, *weights = CASES[op].make((rows, 5, 64), torch.float32)
    clean, _ = on_host(op, x, *weights)
    x[1, 7], x[2, 9] = float("inf"), float("nan")
    got, _ = on_host(op, x, *weights)
    assert got[1:3].isnan().all()
    rest = [i for i in range(rows) if i not in (1, 2)]
    assert torch.equal(got[rest], clean[rest])


@pytest.mark.parametrize("shape", [(12, 40, 384), (12, 40, 416), (66, 150, 384), (66, 150, 160)])
@pytest.mark.parametrize("op", ["int4_linear", "int4_a8_linear"])
def test_groups_and_stretches_of_inputs_meet_their_weights(op, shape, on_host):
    """Groups of 128 and 32, several blocks of outputs, several and partial stretches of inputs."""
    args = CASES[op].make(shape, torch.float32)
    y, _ = on_host(op, *args)
    assert excess(CASES[op], y, args) <= 1


@pytest.mark.parametrize("op", ["int4_linear", "int4_a8_linear"])
def test_int4_weights_that_start_between_16_bytes_are_one_sentence(op, on_host):
    x, packed, *rest = CASES[op].make((3, 5, 64), torch.float32)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.int32)[1:].view_as(packed).copy_(packed)
    with pytest.raises(KernelError, match="needs packed to start at a multiple of 16 bytes"):
        on_host(op, x, shifted, *rest)


@pytest.mark.parametrize(("op", "rows"), [
    ("int4_linear", 12), ("int4_linear", 66), ("int8_linear", 66)])  # fmt: skip
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_float_activations_keep_infinity_and_nan_in_their_row(op, rows, dtype, on_host):
    """Three numbers in bf16 stand for one in fp32: those of an infinity are no NaN."""
    x, *weights = CASES[op].make((rows, 5, 64), DTYPES[dtype])
    clean, _ = on_host(op, x, *weights)
    x[1, 7], x[2, 9] = float("inf"), float("nan")
    got, _ = on_host(op, x, *weights)
    expected = CASES[op].reference(x, *weights)
    assert expected[1].isinf().any()
    assert torch.equal(got[1].isinf(), expected[1].isinf())
    assert torch.equal(got[:3].isnan(), expected[:3].isnan())
    rest = [i for i in range(rows) if i not in (1, 2)]
    assert torch.equal(got[rest], clean[rest])


def test_rows_that_start_between_16_bytes_are_arranged_first(on_host):
    x, *weights = CASES["int4_linear"].make((12, 5, 64), torch.bfloat16)
    spread = torch.full((12, 67), torch.nan, dtype=x.dtype)[:, :64].copy_(x)
    expected, _ = on_host("int4_linear", x, *weights)
    got, ran = on_host("int4_linear", spread, *weights)
    assert ran == ["arrange", "few"]
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("op", "rows"), [
    ("int4_linear", 12), ("int4_linear", 66), ("int8_linear", 66)])  # fmt: skip
def test_fp32_loses_nothing_on_tensor_cores(op, rows, on_host):
    """Within a few roundings of fp32 sums; a bf16 activation would be 2^-9 off."""
    x, *weights, _ = CASES[op].make((rows, 40, 256), torch.float32)
    y, ran = on_host(op, x, *weights, None)
    assert ran[0] == "arrange"
    exact = CASES[op].exact(x, *weights, None)
    assert (y - exact).norm() / exact.norm() < 2**-22


@pytest.mark.parametrize(("op", "rows"), [
    ("w8a8_linear", 2), ("w8a8_linear", 66), ("int8_linear", 66)])  # fmt: skip
def test_weights_that_start_between_16_bytes_give_the_same(op, rows, on_host):
    x, weight, scale, bias = CASES[op].make((rows, 5, 64), torch.float32)
    shifted = torch.empty(weight.numel() + 1, dtype=torch.int8)[1:].view_as(weight).copy_(weight)
    assert shifted.data_ptr() % 16
    expected, _ = on_host(op, x, weight, scale, bias)
    got, _ = on_host(op, x, shifted, scale, bias)
    assert torch.equal(got, expected)
