"""e4m3 in numbers: every code, every rounding, and the labels of what is emulated."""

from __future__ import annotations

import pytest
import torch

from kernels import build, fp8_linear
from kernels.fp8_linear.reference import quantize_rows
from kernels.op import KernelError
from tests import kernel_tools

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


ROUTES = ["reference", *build.ISA_LEVELS, *kernel_tools.ON_HOST]


@pytest.mark.parametrize("rows", [1, 9, 65])  # read as they are, widened ahead, by whole tiles
@pytest.mark.parametrize("route", ROUTES)
def test_every_code_of_a_weight_is_its_number(route, rows, monkeypatch):
    """Among zeros stands one 448, whose row has the scale 1: its column's weights come out."""
    run = kernel_tools.run_on("fp8_linear", route, monkeypatch)
    x = torch.zeros(rows, 40)
    x[:, 3] = 448.0
    weight = torch.zeros(256, 40).to(torch.float8_e4m3fn)
    weight[:, 3] = CODES
    y = run(x, weight, torch.ones(256), None)
    assert torch.equal(y.nan_to_num(-1), (448 * CODES.float()).expand(rows, -1).nan_to_num(-1))
    assert y[0].isnan().sum() == 2


@pytest.mark.parametrize("route", ROUTES)
def test_activations_round_to_the_nearest_e4m3_and_ties_to_even(route, monkeypatch):
    """Every number of e4m3, what is just beside it, and the middles between two."""
    run = kernel_tools.run_on("fp8_linear", route, monkeypatch)
    codes = CODES[:127].float()
    middles = (codes[1:] + codes[:-1]) / 2
    points = torch.cat(
        [codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1])]
    )
    points = torch.cat([points, -points])
    x = torch.full((1, len(points) + 1), 448.0)  # so that the scale is 1
    x[0, 1:] = points
    weight = torch.eye(len(points) + 1).to(torch.float8_e4m3fn)
    y = run(x, weight, torch.ones(len(points) + 1), None)
    assert torch.equal(y[0], x[0].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("route", ROUTES)
def test_rows_of_zeros_and_of_nearly_nothing(route, monkeypatch):
    run = kernel_tools.run_on("fp8_linear", route, monkeypatch)
    x = torch.zeros(3, 8)
    x[1], x[2] = 1e-40, 3e38
    weight, scale = fp8_linear.quantize(torch.ones(4, 8))
    y = run(x, weight, scale, torch.full((4,), 5.0))
    assert torch.equal(y[:2], torch.full((2, 4), 5.0)), "below 2^-129 a number is none"
    assert y[2].isinf().all() or (y[2] > 1e38).all()
    assert not y.isnan().any()


def test_quantized_is_within_half_a_step():
    w = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    w[2] = 0
    q, scale = fp8_linear.quantize(w)
    assert q.dtype == torch.float8_e4m3fn
    assert q.float().abs().amax(1).tolist() == [448, 448, 0, 448, 448]
    error = (q.float() * scale[:, None] - w).abs()
    # half of an eighth of a number's power of two; half of 2^-9 steps of the scale near 0
    assert (error <= torch.maximum(w.abs() / 16, scale[:, None] * 2**-10) * (1 + 1e-6)).all()
    assert (error > w.abs() / 32).any(), "the bound is not idle"


def test_what_is_emulated_says_so():
    assert fp8_linear.EMULATED == ("reference", "cpu")
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    from tests.kernel_speed import KernelCell, proof, variant_of

    args = (torch.randn(1, 8), *fp8_linear.quantize(torch.randn(3, 8)), None)
    cell = KernelCell("fp8_linear", "cpu", "fp32", (1, 3, 8))
    call, _ = variant_of(cell, args)
    words = proof(cell, lambda: call(*args), [])
    assert words.startswith("C function fp8_linear_emulated_f32 for ")


def test_a_gpu_without_fp8_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        KernelError, match="needs sm89 for fp8; this is sm80; take impl='reference'"
    ):
        fp8_linear.expect_sm89(torch.device("cuda"))


def test_torch_computes_the_same():
    """``torch._scaled_mm`` on the same codes and scales."""
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    weight, scale = fp8_linear.quantize(torch.randn(32, 64))
    q, scale_x = quantize_rows(x)
    try:
        theirs = torch._scaled_mm(q, weight.t(), scale_a=scale_x, scale_b=scale[None],
                                  out_dtype=torch.bfloat16)  # fmt: skip
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no scaled_mm here: {str(error).splitlines()[0]}")
    ours = fp8_linear.fp8_linear(x, weight, scale, None)
    assert (theirs.float() - ours.float()).abs().max() <= 2**-8 * ours.float().abs().max()
