"""GELU by the erf and in the tanh form: each route is torch's function of that name, and nearer."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from kernels import build
from tests import kernel_tools, triton_tools
from tests.kernel_cases import CASES, DTYPES, excess, outputs

if build.interpreting():
    triton_tools.mend_interpreter()

ROUTES = ["reference", *build.ISA_LEVELS, "cuda_on_host", "triton"]
FORMS = ["none", "tanh"]


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_each_form_is_torch_s_function_of_that_name(route, dtype, approximate, monkeypatch):
    if route == "triton" and dtype == "bf16":
        pytest.skip("Triton's interpreter computes bf16 wrongly")
    run = kernel_tools.run_on("gelu_bias", route, monkeypatch)
    for shape in [(3, 301), (2, 3, 64), (0, 7)]:
        x, bias, _ = CASES["gelu_bias"].make(shape, DTYPES[dtype])
        y = run(x, bias, approximate)
        z = x.double() + bias.double()
        exact = gelu(z, approximate=approximate)
        # two roundings of the result, and where 1 is added to a tanh or erf, of that sum
        allowed = 2 * torch.finfo(y.dtype).eps * exact.abs() + 8 * 2**-24 * z.abs()
        assert ((y.double() - exact).abs() <= allowed).all()
        assert excess(CASES["gelu_bias"], y, [x, bias, approximate]) <= 1


@pytest.mark.parametrize("route", [*build.ISA_LEVELS, "cuda_on_host"])
def test_the_error_by_the_erf_is_bounded_relative_to_the_result(route, monkeypatch):
    """|y - z Phi(z)| <= (12 + z^2 / 2) 2^-24 |y|, as deep as floats reach (14 below 0).

    CUDA rounds z / sqrt 2 before erfc, to which a large z is sensitive: 2 z^2.
    """
    slope = 2 if route == "cuda_on_host" else 0.5
    few = 301 if route == "cuda_on_host" else 400_001
    z = torch.linspace(-14, 14, few)
    y = kernel_tools.run_on("gelu_bias", route, monkeypatch)(z[None], torch.zeros(few), "none")[
        0
    ].double()
    z = z.double()
    exact = z * 0.5 * torch.erfc(-z / 2**0.5)
    smallest = 14 * 2.0**-149  # the step of floats around 0, times z
    bound = (12 + slope * z * z) * 2**-24 * exact.abs() + smallest
    assert ((y - exact).abs() <= bound).all()
    cancelled = gelu(z.float()).double()
    assert ((cancelled - exact).abs() > bound).any(), "a test that torch's own form fails too"


@pytest.mark.parametrize("route", ROUTES)
def test_the_forms_differ_by_more_than_they_err(route, monkeypatch):
    run = kernel_tools.run_on("gelu_bias", route, monkeypatch)
    x, bias, _ = CASES["gelu_bias"].make((3, 301), torch.float32)
    erf, tanh = run(x, bias, "none"), run(x, bias, "tanh")
    assert (erf - tanh).abs().max() > 1e-4
    assert excess(CASES["gelu_bias"], erf, [x, bias, "tanh"]) > 1
    assert excess(CASES["gelu_bias"], tanh, [x, bias, "none"]) > 1


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_nan_and_infinity_are_the_formulas(route, approximate, monkeypatch):
    run = kernel_tools.run_on("gelu_bias", route, monkeypatch)
    x = torch.tensor([[float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 30.0, -30.0, 1e30]])
    (y,) = outputs(run(x, torch.zeros(x.shape[-1]), approximate))
    assert y[0].isnan().nonzero().flatten().tolist() == [0, 2]  # -inf times 0, as the formulas say
    assert y[0].isinf().nonzero().flatten().tolist() == [1]  # where torch's erf form gives NaN
    assert y[0, 3] == y[0, 4] == 0
    assert y[0, 5] == 30
    assert y[0, 7] == x[0, 7]
