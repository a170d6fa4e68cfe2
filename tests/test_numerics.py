"""Are the numbers of the quantizers, and of the layers that hold them, what they claim to be?"""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from impl.core import StudyError
from impl.fidelity import sqnr_db
from impl.quantization import layers, numerics
from impl.quantization.int8 import _Operators

SHAPES = [(1, 1), (3, 5), (7, 64), (128, 33), (10, 3, 3, 5)]
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(n=48, k=40, bias=True, dtype=torch.float32):
    made = nn.Linear(k, n, bias=bias)
    made.weight.data = normal(n, k) / math.sqrt(k)
    if bias:
        made.bias.data = normal(n, seed=1)
    return made.to(dtype).requires_grad_(False)


@pytest.fixture
def choose(monkeypatch):
    """``choose(kernels)``: with our kernels, or as where there is no compiler."""

    def chosen(kernels: bool) -> bool:
        from kernels import build

        if not kernels:
            monkeypatch.setattr(build, "lacks_compiler", lambda: "no compiler, for this test")
        elif reason := build.lacks_compiler():
            pytest.skip(reason)
        return kernels

    return chosen


both_ways = pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no_compiler"])

# ---- quantizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_comes_back_within_half_a_step(shape, dtype):
    weight = normal(*shape, dtype=dtype)
    q, scale = numerics.quantize_per_channel(weight)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.int8, shape, dtype, shape[:1])
    assert q.abs().max() <= numerics.LEVELS
    step = scale.double().view(-1, *[1] * (len(shape) - 1))
    error = (q.double() * step - weight.double()).abs()
    # a scale rounded down can put the largest weight that much beyond the last level
    assert (error <= step * (0.5 + numerics.LEVELS * ROUNDOFF[dtype])).all()


@pytest.mark.parametrize("shape", [(4,), (1, 7), (3, 5, 16)], ids=str)
def test_an_activation_comes_back_within_half_a_step(shape):
    x = normal(*shape) * 100
    q, scale = numerics.quantize_per_token(x)
    assert scale.shape == (*shape[:-1], 1)
    error = (q.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + numerics.LEVELS * 2.0**-23)).all()
    assert q.abs().amax(-1).eq(numerics.LEVELS).all(), "the whole range is used"


def test_noise_is_that_of_rounding_to_the_levels():
    """Uniform rounding noise: step^2 / 12, and the step is the largest weight over 127."""
    weight = normal(64, 1024)
    q, scale = numerics.quantize_per_channel(weight)
    noise = (scale.double() ** 2 / 12).mean()
    expected = 10 * math.log10(weight.double().square().mean() / noise)
    assert sqnr_db(weight, q * scale[:, None]) == pytest.approx(expected, abs=0.2)
    assert expected > 40


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_zero_rows_and_extreme_values_stay_finite(dtype):
    extreme = torch.finfo(dtype)
    rows = [0.0, extreme.max, extreme.tiny, extreme.smallest_normal / 4, 1.0]
    weight = torch.tensor(rows, dtype=dtype)[:, None] * torch.tensor([1.0, -1.0, 0.25], dtype=dtype)
    q, scale = numerics.quantize_per_channel(weight)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert q[0].eq(0).all()
    assert q[1].tolist() == [127, -127, 32]
    nothing, scale = numerics.quantize_per_token(torch.zeros(2, 3))
    assert nothing.eq(0).all()
    assert (scale > 0).all(), "0 / 0 is no number"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = normal(4, 4)
    weight[2, 1] = bad
    with pytest.raises(StudyError, match="infinities or NaN"):
        numerics.quantize_per_channel(weight)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@both_ways
def test_a_token_that_is_not_finite_shows_in_its_own_output_only(kernels, bad, choose):
    choose(kernels)
    x = normal(3, 40)
    x[1, 5] = bad
    y = layers.Int8DynamicLinear.from_float(linear())(x)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 10, 256), (3, 7, 5), (17, 33, 129)])
def test_the_integer_product_is_exact_and_padding_changes_nothing(m, n, k):
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (m, k), generator=random, dtype=torch.int8)
    b = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
    exact = a.long() @ b.long().T
    assert numerics.int8_matmul(a, b).long().equal(exact)
    assert numerics.padded_matmul(a, b).long().equal(exact)


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 7, 5), (5, 48, 1024)])
def test_digits_lose_no_more_than_the_dtype_does(m, n, k, dtype):
    x = normal(m, k, dtype=dtype) * torch.logspace(-3, 3, m).to(dtype)[:, None]
    weight, _ = numerics.quantize_per_channel(normal(n, k, seed=1))
    y = numerics.product_by_digits(x, weight)
    exact = x.double() @ weight.double().T
    lost = 2.0 ** (-23 if dtype == torch.float32 else -15)  # of the largest, and fp32 sums
    size = x.double().abs().amax(-1, keepdim=True) * weight.double().abs().sum(-1)
    assert ((y.double() - exact).abs() <= lost * size + 4 * 2.0**-24 * exact.abs()).all()


def test_digits_of_nothing_are_nothing_and_of_infinity_are_not_finite():
    weight = torch.ones(3, 4, dtype=torch.int8)
    x = torch.zeros(2, 4)
    assert numerics.product_by_digits(x, weight).eq(0).all()
    x[1, 2] = math.inf
    y = numerics.product_by_digits(x, weight)
    assert y[0].eq(0).all()
    assert not y[1].isfinite().any()


# ---- layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [40, 64, 37])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 1), (2, 5, 3), (70,)], ids=str)
@both_ways
def test_weight_only_linear_is_the_product_with_the_rounded_weights(
        kernels, leading, inputs, bias, dtype, choose):  # fmt: skip
    choose(kernels)
    int8 = layers.Int8Linear.from_float(linear(k=inputs, bias=bias, dtype=dtype))
    x = normal(*leading, int8.in_features, dtype=dtype)
    weight = int8.weight.double() * int8.scale.double()[:, None]
    exact = F.linear(x.double(), weight, int8.bias.double() if bias else None)
    y = int8(x)
    assert (y.dtype, y.shape) == (dtype, (*leading, int8.out_features))
    # sums of K terms and three roundings of the result
    size = F.linear(x.double().abs(), weight.abs(), int8.bias.double().abs() if bias else None)
    bound = ROUNDOFF[dtype] * (3 * size + 2.0**-16 * int8.in_features * size)
    bound = bound + int8.in_features * ROUNDOFF[torch.float32] * size
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [(), (1,), (2, 5, 3)], ids=str)
@both_ways
def test_dynamic_linear_is_the_product_of_the_rounded_operands(kernels, leading, dtype, choose):
    choose(kernels)
    int8 = layers.Int8DynamicLinear.from_float(linear(dtype=dtype))
    x = normal(*leading, int8.in_features, dtype=dtype)
    q, scale = numerics.quantize_per_token(x)
    exact = F.linear(q.double(), int8.weight.double()) * scale.double() * int8.scale.double()
    y = int8(x)
    assert (y.dtype, y.shape) == (dtype, (*leading, int8.out_features))
    bound = 3 * ROUNDOFF[dtype] * (exact.abs() + int8.bias.double().abs())
    assert ((y.double() - exact - int8.bias.double()).abs() <= bound).all()


@both_ways
def test_a_token_gives_the_same_bits_alone_and_in_a_batch(kernels, choose):
    choose(kernels)
    int8 = layers.Int8DynamicLinear.from_float(linear())
    x = normal(6, 40) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1.0, 50.0])[:, None]
    assert torch.cat([int8(row[None]) for row in x]).equal(int8(x))


def test_layers_run_on_the_kernels_and_by_torch_where_that_is_faster(choose):
    choose(True)
    ran = {}
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1, 16, 64, 65)):
        with _Operators() as operators:
            layers.Int8Linear.from_float(linear(48, 64, dtype=dtype))(
                normal(tokens, 64, dtype=dtype))  # fmt: skip
        ran[dtype, tokens] = "study::int8_linear.cpu" in operators.names
    from kernels import build

    wide, narrow = torch.float32, torch.bfloat16
    if not build.current_isa().startswith("avx512"):  # nor has torch a fast bf16
        assert all(ran.values())
        return
    assert ran == {(wide, 1): True, (wide, 16): True, (wide, 64): True, (wide, 65): True,
                   (narrow, 1): False, (narrow, 16): True, (narrow, 64): True,
                   (narrow, 65): False}  # fmt: skip


CONVOLUTIONS = [  # in, out, kernel, stride, padding, bias
    (1, 4, 3, 1, 1, True), (3, 5, 1, 2, 0, False), (8, 6, (3, 1), (2, 1), (0, 2), True),
    (16, 16, 7, 2, 3, False)]  # fmt: skip


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_int8_convolutions_are_convolutions_of_the_rounded_operands(options):
    into, out, kernel, stride, padding, bias = options
    conv = nn.Conv2d(into, out, kernel, stride, padding, bias=bias).requires_grad_(False)
    x = normal(2, into, 9, 12)
    weight, scale = numerics.quantize_per_channel(conv.weight)
    q, scale_x = numerics.quantize_per_token(x, (1, 2, 3))
    for kind, operand, unit in (
        (layers.Int8Conv2d, x, 1.0),
        (layers.Int8DynamicConv2d, q, scale_x),
    ):
        exact = F.conv2d(operand.double(), weight.double(), None, stride, padding)
        exact = exact * unit * scale.double().view(-1, 1, 1)
        if bias:
            exact = exact + conv.bias.double().view(-1, 1, 1)
        y = kind.from_float(conv)(x)
        assert y.shape == exact.shape
        assert sqnr_db(exact, y) > 120, "fp32 rounding is 20 log10(2^-24) = -144 dB"


def test_images_of_one_batch_do_not_share_a_scale():
    conv = layers.Int8DynamicConv2d.from_float(nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False))
    x = normal(2, 3, 8, 8) * torch.tensor([1.0, 1000.0]).view(2, 1, 1, 1)
    assert torch.cat([conv(x[:1]), conv(x[1:])]).equal(conv(x))


def test_grouped_and_reflecting_convolutions_are_left_alone():
    assert not layers.Int8Conv2d.takes(nn.Conv2d(4, 4, 3, groups=2))
    assert not layers.Int8Conv2d.takes(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
    assert not layers.Int8Conv2d.takes(nn.Conv2d(4, 4, 3, padding="same"))
    assert layers.Int8Conv2d.takes(nn.Conv2d(4, 4, 3))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_compiled_step_reads_int8_and_writes_no_wide_weights(tokens):
    from torch._inductor.utils import run_and_get_code

    from impl.machine import has_compiler

    if not has_compiler():
        pytest.skip("needs a C++ compiler and Python's headers")
    torch._dynamo.reset()
    int8 = layers.Int8Linear.from_float(linear(48, 40, bias=False))
    x = normal(tokens, 40)
    with torch.inference_mode():
        y, (code, *_) = run_and_get_code(torch.compile(int8, fullgraph=True), x)
    assert "int8_t" in code
    assert "empty_strided_cpu((48, 40)" not in code, "the weights are widened to memory"
    assert sqnr_db(int8(x), y) > 120
