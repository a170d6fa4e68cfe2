"""Are rows right at the edges of their number formats, where saved instructions could lose?"""

import pytest
import torch

from kernels import build
from kernels.op import OPS
from tests.kernel_cases import CASES, outputs

ELEMENTWISE = ["swiglu", "gelu_bias", "rope"]


@pytest.fixture(params=["cpu_avx2", "cpu_plain"])
def level(request):
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    name = request.param.removeprefix("cpu_")
    if name not in build.isas():
        pytest.skip(f"needs {name}; this processor's best is {build.isas()[0]}")
    with build.isa(name):
        yield name


def every_nan() -> torch.Tensor:
    """The 254 NaN of bf16: any sign, any of the 127 payloads, quiet or not."""
    bits = [sign | 0x7F80 | payload for sign in (0, 0x8000) for payload in range(1, 128)]
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_every_nan_of_bf16_stays_nan(op, level):
    """Rounding adds to the bits: of a NaN it must not carry into the sign, nor into infinity."""
    nans = every_nan()
    shape = (1, 127, 1, 64) if op == "rope" else (2, 512)
    args = CASES[op].make(shape, torch.bfloat16)
    x = args[0] = torch.ones_like(args[0])
    x.view(-1)[: 4 * len(nans) : 4] = nans
    y = outputs(OPS[op](*args, impl="cpu"))[0]
    assert y.isnan().sum() >= len(nans)
    assert torch.equal(y.isnan(), outputs(CASES[op].reference(*args))[0].isnan())


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "softmax", "add_rms_norm"])
def test_a_row_with_any_nan_of_bf16_is_nan(op, level):
    nans = every_nan()
    args = CASES[op].make((len(nans), 96), torch.bfloat16)
    args[0][:, 33] = nans
    for y in outputs(OPS[op](*args, impl="cpu")):
        assert y[:, 33].isnan().all()


@pytest.mark.parametrize("below", [80.0, 87.5, 95.0, 103.0, 103.9, 104.5, 200.0, float("inf")])
def test_softmax_rounds_what_is_below_the_smallest_normal_once(below, level):
    """Each within its own rounding: one step of denormals, or two units in the last place."""
    x = torch.full((1, 67), -below)
    x[0, 5] = 0.0
    y = OPS["softmax"](x, impl="cpu").double()
    exact = torch.softmax(x.double(), -1)
    step = torch.maximum(exact * 2**-22, torch.tensor(2.0**-149, dtype=torch.float64))
    assert ((y - exact).abs() <= step).all()
