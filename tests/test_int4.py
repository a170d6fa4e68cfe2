"""Weights of four bits: how they are stored, and what int8 activations cost beside them."""

from __future__ import annotations

import math

import pytest
import torch

from impl.core import NotEngaged
from impl.quantization.int4 import (
    Int4DynamicLinear,
    Int4Linear,
    computed_from_int4,
    quantize_linears,
    stored_as_int4,
)
from impl.quantization.layers import Int8DynamicLinear, Int8Embedding, Int8Linear
from kernels.int4_a8_linear import int4_a8_linear
from kernels.int4_a8_linear.reference import quantize_groups
from kernels.int4_linear import dequantize, quantize
from kernels.int4_linear.reference import pack, unpack
from kernels.op import OPS, KernelError
from tests.kernel_cases import CASES, excess


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sqnr_db(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Signal to quantization noise, in dB."""
    return 20 * math.log10(exact.norm() / (got.double() - exact).norm())


def test_every_level_is_stored_and_read_at_its_place():
    q = torch.randint(-8, 8, (21, 64), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    packed = pack(q)
    assert packed.shape == (2, 8, 16)
    assert packed.nbytes == 32 * 64 // 2
    assert torch.equal(unpack(packed)[:21], q)
    assert not unpack(packed)[21:].any()


@pytest.mark.parametrize(("group", "bits"), [(32, 4.5), (128, 4.125)])
def test_weights_take_four_bits_and_their_share_of_a_scale(group, bits):
    packed, scale = quantize(normal(64, 256), group)
    assert (packed.nbytes + scale.nbytes) * 8 == bits * 64 * 256


@pytest.mark.parametrize(("group", "least_db"), [(32, 21), (128, 19.5)])
def test_weights_are_as_near_as_sixteen_levels_allow(group, least_db):
    weight = normal(64, 512)
    q = dequantize(*quantize(weight, group), 64)
    assert sqnr_db(q, weight.double()) > least_db
    # rounding to the nearest with the largest weight at a level is worse
    blocks = weight.view(64, -1, group)
    scale = blocks.abs().amax(-1, keepdim=True) / 7
    plain = ((blocks / scale).round() * scale).flatten(1)
    assert sqnr_db(q, weight.double()) > sqnr_db(plain, weight.double()) + 0.5


def test_zeros_and_single_weights_survive():
    weight = torch.zeros(3, 64)
    weight[1, 40], weight[2, 3] = 5.0, -1e-20
    back = dequantize(*quantize(weight, 32), 3)
    assert torch.equal(back == 0, weight == 0)
    assert torch.allclose(back, weight, rtol=2**-8, atol=0)  # a scale in bf16


@pytest.mark.parametrize(("weight", "group", "sentence"), [
    (torch.zeros(4, 64), 64, "groups of 32 or 128, not 64"),
    (torch.zeros(4, 96), 128, "groups of 128 do not divide 96 inputs; take 32"),
    (torch.full((4, 32), math.nan), 32, "infinities or NaN; quantize finite ones"),
])  # fmt: skip
def test_bad_weights_are_one_sentence(weight, group, sentence):
    with pytest.raises(KernelError, match=sentence):
        quantize(weight, group)


def outlying(x: torch.Tensor) -> torch.Tensor:
    """A channel 100 times the others, as in language models."""
    x = x.clone()
    x[:, 7] *= 100
    return x


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("shape", ["even", "outlying"])
def test_int8_activations_cost_at_most_their_rounding(group, shape):
    """Against fp64 of the dequantized weights: half a step of each activation; 42 dB of normals."""
    x, weight = normal(9, 512, seed=2), normal(48, 512, seed=3)
    x = outlying(x) if shape == "outlying" else x
    packed, scale = quantize(weight, group)
    dequantized = dequantize(packed, scale, 48, torch.float64)
    exact = x.double() @ dequantized.T
    got = int4_a8_linear(x, packed, scale, 48)
    _, step = quantize_groups(x, 512 // group)
    each = step.double().repeat_interleave(group, -1) / 2  # (9, 512)
    rounding = 2**-20 * (x.double().abs() @ dequantized.abs().T)  # of fp32 sums
    assert ((got.double() - exact).abs() <= each @ dequantized.abs().T + rounding).all()
    assert shape == "outlying" or sqnr_db(got, exact) > 42


def test_a_scale_per_group_confines_an_outlier():
    """With one scale for the row every other channel pays for it."""
    x, weight = outlying(normal(9, 512, seed=2)), normal(48, 512, seed=3)
    weight[:, 7] = 0  # what is left of the output comes from the others
    packed, scale = quantize(weight, 32)
    exact = x.double() @ dequantize(packed, scale, 48, torch.float64).T
    step = x.abs().amax(1, keepdim=True) / 127
    per_row = (x / step).round() * step
    row = per_row.double() @ dequantize(packed, scale, 48, torch.float64).T
    assert sqnr_db(int4_a8_linear(x, packed, scale, 48), exact) > sqnr_db(row, exact) + 10


# ---- the module -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_the_module_is_a_linear_layer_of_its_dequantized_weights(dtype):
    linear = torch.nn.Linear(64, 20).to(dtype)
    int4 = Int4Linear.from_float(linear, 32)
    x = normal(3, 64, 5).to(dtype).transpose(1, 2)  # (3, 5, 64), its last dimension not dense
    weight = dequantize(int4.packed, int4.scale, 20, torch.float64)
    exact = x.double() @ weight.T + linear.bias.double()
    got = int4(x)
    assert (got.shape, got.dtype) == ((3, 5, 20), dtype)
    rounding = torch.finfo(dtype).eps
    assert (got.double() - exact).abs().max() <= 2 * rounding * exact.abs().max()


class Tied(torch.nn.Module):
    """A model with a layer of each fate, and ``lm_head`` tied to ``embed``."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(40, 64)
        self.up, self.odd = torch.nn.Linear(64, 72), torch.nn.Linear(72, 64)
        self.router = torch.nn.Linear(64, 4)
        self.lm_head = torch.nn.Linear(64, 40, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.odd(self.up(self.embed(ids))))


def test_layers_that_four_bits_do_not_suit_are_int8():
    model = Tied()
    quantize_linears(model, 32)
    assert [type(m) for m in (model.up, model.odd, model.lm_head, model.embed, model.router)] == [
        Int4Linear, Int8Linear, Int8Linear, Int8Embedding, torch.nn.Linear]  # fmt: skip
    assert model.lm_head.weight.data_ptr() == model.embed.weight.data_ptr()


def quantized_engine():
    from types import SimpleNamespace

    model = Tied().eval()
    quantize_linears(model, 32)
    ids = torch.arange(6)[None]
    return SimpleNamespace(model=model, stats={}), lambda: model(ids)


@torch.inference_mode()
def test_the_proof_counts_bytes_and_puts_the_weights_back():
    engine, run = quantized_engine()
    before = run()
    assert stored_as_int4(engine, run).startswith("1 layers read int4: 0.00 of 0.01 MB")
    assert torch.equal(run(), before)
    assert engine.stats["int4_bytes"] == 80 * 64 // 2 + 80 * 2 * 2  # 72 outputs padded to 80


@torch.inference_mode()
def test_the_proof_sees_layers_that_are_float_or_padded_or_not_read():
    engine, run = quantized_engine()
    plain = torch.ones(2)
    with pytest.raises(NotEngaged, match="they are not read"):
        stored_as_int4(engine, lambda: plain)
    engine.model.odd = torch.nn.Linear(72, 64)
    with pytest.raises(NotEngaged, match="1 layers still hold float weights: odd"):
        stored_as_int4(engine, run)
    engine, run = quantized_engine()
    packed = engine.model.up.packed
    engine.model.up.packed = torch.cat((packed, packed))[: len(packed)]
    with pytest.raises(NotEngaged, match="more than half a byte"):
        stored_as_int4(engine, run)
    engine.model.up = Int8Linear.from_float(torch.nn.Linear(64, 72))
    with pytest.raises(NotEngaged, match="no layer of the model holds int4"):
        stored_as_int4(engine, run)


@torch.inference_mode()
def test_int4_with_int8_activations_proves_its_arithmetic(monkeypatch):
    from types import SimpleNamespace

    model, ids = Tied().eval(), torch.arange(6)[None]
    quantize_linears(model, 32, Int4DynamicLinear)
    assert type(model.lm_head) is Int8DynamicLinear
    engine = SimpleNamespace(model=model, stats={}, dtype=torch.float32, device=torch.device("cpu"))
    proof = computed_from_int4(engine, lambda: model(ids))
    assert "sums int32 in study::int4_a8_linear." in proof
    monkeypatch.setattr(Int4DynamicLinear, "forward", Int4Linear.forward)
    with pytest.raises(NotEngaged, match="none multiplies as study::int4_a8_linear"):
        computed_from_int4(engine, lambda: model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["int4_linear", "int8_linear"])
def test_wide_ranges_and_denormals_stay_within_the_budget(op, dtype):
    """One input of a row is many times the others; a row is denormal; its neighbours are usual."""
    outlier = 100 if dtype == torch.float16 else 3000  # results that fp16 holds
    case = CASES[op]
    args = [*case.make((4, 40, 4096), dtype)[:-1], None]
    for spoil in (lambda x: x[:, 5].mul_(outlier), lambda x: x[1].mul_(1e-40)):
        spoiled = [args[0].clone(), *args[1:]]
        spoil(spoiled[0])
        got = OPS[op](*spoiled, impl="cpu")
        assert excess(case, got, spoiled) <= 1
        alone = OPS[op](spoiled[0][1:2].clone(), *spoiled[1:], impl="cpu")
        assert torch.equal(alone[0], got[1])
        assert bool(got[1].any()) == bool(spoiled[0][1].any())
