"""Does a quantized model hold and read what it says, and does its proof fail where it does not?"""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from impl.core import TECHNIQUES, Engine, NotEngaged
from impl.fidelity import sqnr_db
from impl.models import SPECS
from impl.models.costs import weight_bytes
from impl.models.decoder import DecoderConfig, LeanDecoder
from impl.quantization import layers
from impl.quantization.int8 import quantize_modules
from tests.test_numerics import both_ways, choose, linear, normal  # noqa: F401


def tiny(tied=True, experts=0):
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=3840, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=32, max_positions=512, norm_eps=1e-5, tie_embeddings=tied,
        rope_frequencies=tuple(1e4 ** -(i / 16) for i in range(16)), num_experts=experts,
        experts_per_token=min(experts, 2))  # fmt: skip
    return LeanDecoder(config).eval().requires_grad_(False)


def engine_of(model, **spec):
    """An engine around a decoder with the project's vocabulary."""
    known = dataclasses.replace(SPECS["llama_1b"], random_weights=False, **spec)
    return Engine(known, model, torch.float32, torch.device("cpu"))


def int8(model, dynamic=False):
    kinds = (layers.Int8DynamicLinear, layers.Int8DynamicConv2d) if dynamic else (
        layers.Int8Linear, layers.Int8Conv2d)  # fmt: skip
    quantize_modules(model, *kinds)
    return model


def test_a_tied_embedding_shares_the_int8_table():
    model = int8(tiny())
    assert isinstance(model.embed, layers.Int8Embedding)
    assert model.embed.weight.data_ptr() == model.lm_head.weight.data_ptr()
    ids = torch.arange(12).view(3, 4)
    table = model.lm_head.weight.float() * model.lm_head.scale[:, None]
    assert model.embed(ids).equal(table[ids])
    untied = int8(tiny(tied=False))
    assert type(untied.embed) is nn.Embedding


def test_bytes_are_one_per_weight_and_four_per_channel():
    model = tiny()
    channels = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    norms = 5 * 64 * 4
    assert weight_bytes(model) == 4 * weights + norms
    assert weight_bytes(int8(model)) == weights + 4 * channels + norms


def test_no_float_weight_stays_alive():
    model = tiny()
    floats = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, nn.Linear)]
    int8(model)
    gc.collect()
    assert not [ref for ref in floats if ref() is not None]


def test_routers_stay_as_they_are():
    model = int8(tiny(experts=3))
    assert type(model.layers[0].mlp.router) is nn.Linear
    assert isinstance(model.layers[0].mlp.experts[2].up_proj, layers.Int8Linear)


@pytest.mark.parametrize("name", ["int8_weight_only", "int8_dynamic"])
def test_proof_of_int8_fails_for_what_is_not_int8(name):
    effect = TECHNIQUES[name].effect
    ids = torch.arange(8)[None]

    def prove(model):
        engine = engine_of(model)
        return effect(engine, lambda: engine.forward(ids))

    with pytest.raises(NotEngaged, match="no layer"):
        prove(tiny())
    half = int8(tiny(), dynamic=name == "int8_dynamic")
    half.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    with pytest.raises(NotEngaged, match=r"1 layers still hold float weights: layers.0.mlp.up_pr"):
        prove(half)
    engine = engine_of(int8(tiny(), dynamic=name == "int8_dynamic"))
    with pytest.raises(NotEngaged, match="they are not read"):
        effect(engine, lambda: torch.ones(3))
    before = engine.forward(ids)
    assert "layers read int8" in effect(engine, lambda: engine.forward(ids))
    assert engine.forward(ids).equal(before), "the proof changed the weights"


def test_proof_of_int8_arithmetic_fails_for_weights_alone():
    engine = engine_of(int8(tiny()))
    with pytest.raises(NotEngaged, match=r"Int8Linear computes in torch.float32"):
        TECHNIQUES["int8_dynamic"].effect(engine, lambda: engine.forward(torch.arange(8)[None]))


@both_ways
def test_proof_of_int8_arithmetic_names_the_operator_that_multiplied(kernels, choose):  # noqa: F811
    engine = engine_of(int8(tiny(), dynamic=True))
    operator = "study::w8a8_linear.cpu" if choose(kernels) else "aten::_int_mm"
    effect = TECHNIQUES["int8_dynamic"].effect
    proof = effect(engine, lambda: engine.forward(torch.arange(8)[None]))
    assert proof.endswith(f"sums int32 in {operator}")


def test_proof_of_int8_arithmetic_fails_for_float_products(monkeypatch):
    engine = engine_of(int8(tiny(), dynamic=True))
    wide = lambda a, b: (a.float() @ b.float().T).int()  # noqa: E731
    monkeypatch.setattr(layers, "int8_matmul", wide)
    monkeypatch.setattr(layers.Int8DynamicLinear, "forward", layers.Int8DynamicLinear.by_torch)
    with pytest.raises(NotEngaged, match="none multiplies as study::w8a8_linear"):
        TECHNIQUES["int8_dynamic"].effect(engine, lambda: engine.forward(torch.arange(8)[None]))


@torch.inference_mode()
def test_fp8_layers_prove_themselves_and_say_that_they_are_emulated():
    from impl.quantization.fp8 import Fp8Embedding, Fp8Linear

    technique, ids = TECHNIQUES["fp8_dynamic"], torch.arange(8)[None]
    engine, plain = engine_of(tiny()), tiny()
    with pytest.raises(NotEngaged, match="no layer of the model holds fp8"):
        technique.effect(engine, lambda: engine.forward(ids))
    model = technique.apply(engine).model
    assert isinstance(model.embed, Fp8Embedding)
    assert model.embed.weight.data_ptr() == model.lm_head.weight.data_ptr()
    # a rounding of e4m3 is at most 2^-4: about 30 dB a product
    assert sqnr_db(plain(ids), engine.forward(ids)) > 18
    before = engine.forward(ids)
    proof = technique.effect(engine, lambda: engine.forward(ids))
    assert "EMULATED" in proof
    assert engine.forward(ids).equal(before), "the proof changed the weights"
    with pytest.raises(NotEngaged, match="they are not read"):
        technique.effect(engine, lambda: torch.ones(3))
    engine.model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)
    with pytest.raises(NotEngaged, match="1 layers still hold float weights"):
        technique.effect(engine, lambda: engine.forward(ids))
    layer = Fp8Linear.from_float(linear(37, 40))
    widened = layer.weight.double() * layer.scale.double()[:, None]
    x = normal(2, 5, 40)
    assert sqnr_db(F.linear(x.double(), widened, layer.bias.double()), layer(x)) > 28


@torch.inference_mode()
def test_proof_of_fp8_fails_for_float_products(monkeypatch):
    from impl.quantization.fp8 import Fp8Linear

    def widened(self, x):
        return F.linear(x, self.weight.float() * self.scale[:, None])

    engine = TECHNIQUES["fp8_dynamic"].apply(engine_of(tiny()))
    monkeypatch.setattr(Fp8Linear, "forward", widened)
    with pytest.raises(NotEngaged, match="none multiplies as study::fp8_linear"):
        TECHNIQUES["fp8_dynamic"].effect(engine, lambda: engine.forward(torch.arange(8)[None]))


@pytest.mark.parametrize(
    ("name", "package"),
    [("bnb_int8", "bitsandbytes"), ("bnb_nf4", "bitsandbytes"),
     ("torchao_int8_weight_only", "torchao"), ("torchao_int8_dynamic", "torchao")],
)  # fmt: skip
def test_peers_quantize_the_same_module(name, package):
    pytest.importorskip(package)
    technique, ids = TECHNIQUES[name], torch.arange(8)[None]
    plain = tiny(tied=False)
    reference, size = plain(ids), weight_bytes(plain)
    engine = engine_of(tiny(tied=False))
    with pytest.raises(NotEngaged):
        technique.effect(engine, lambda: None)
    engine = technique.apply(engine)
    with torch.inference_mode():
        proof = technique.effect(engine, lambda: engine.forward(ids))
        assert ("bitsandbytes'" if package == "bitsandbytes" else "torchao's") in proof
        assert weight_bytes(engine.model) < 0.8 * size, "the embedding alone stays float"
        # int8: 127 levels, about 40 dB a layer; nf4: 16 levels, about 20
        assert sqnr_db(reference, engine.forward(ids)) > (12 if name == "bnb_nf4" else 30)
    engine.undo.close()
