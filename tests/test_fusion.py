"""Joined operations compute what the separate ones do, hold no weight twice, and can be refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from impl.core import Engine, NotEngaged, Sampling, StudyError, build, stack
from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.fusion.activations import GemmBiasGelu, form_of
from impl.fusion.projections import join
from impl.fusion.proofs import operators_of
from impl.models import SPECS, costs
from impl.models.kv_cache import GrowingCache, KVCache
from impl.quantization.fp8 import Fp8Linear
from impl.quantization.int4 import Int4DynamicLinear, Int4Linear
from impl.quantization.layers import Int8DynamicLinear, Int8Linear
from kernels import build as kernels_build
from kernels.op import KernelError
from tests.matrix import impossible
from tests.test_decode_step import SHAPES, decoder
from tests.test_generation import engine_of, prompts, tiny
from tests.tiny import SPEC

EXPERTS = {"num_experts": 3, "experts_per_token": 2}
KINDS = (nn.Linear, Int8Linear, Int8DynamicLinear, Fp8Linear, Int4Linear, Int4DynamicLinear)
DECODER_FUSIONS = ("decode_attention", "fused_mlp", "fused_norm", "fused_qkv")


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if reason := kernels_build.lacks_compiler():
        pytest.skip(reason)


def engine_over(model, *names, dtype=torch.float32) -> Engine:
    """An engine of the lean ``model`` with the techniques, and none else, applied."""
    engine = Engine(SPEC, model, dtype, torch.device("cpu"))
    engine.new_cache = lambda rows, slots: GrowingCache(model.config, rows, slots, dtype)
    for t in stack(*names):
        engine = t.apply(engine)
    return engine


def logits(engine, cache, ids):
    """A prompt of all but two tokens, then two steps."""
    T = ids.shape[1] - 2
    step = (
        (lambda at: at) if cache.lockstep
        else lambda at: torch.full((len(ids), 1), at)
    )  # fmt: skip
    parts = [engine.model(ids[:, :T], 0, cache)]
    parts += [engine.model(ids[:, at : at + 1], step(at), cache) for at in (T, T + 1)]
    return torch.cat(parts, 1)


# ---- the same numbers --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GrowingCache, KVCache])
@pytest.mark.parametrize("shape", [*SHAPES, "experts"])
@pytest.mark.parametrize("name", [*DECODER_FUSIONS, "all"])
@torch.inference_mode()
def test_a_fused_decoder_computes_what_the_decoder_does(name, shape, kind):
    options = SHAPES.get(shape, EXPERTS)
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    plain = decoder(**options)
    want = logits(engine_over(plain), kind(plain.config, 2, 24), ids)
    fused = engine_over(decoder(**options), *(DECODER_FUSIONS if name == "all" else (name,)))
    got = logits(fused, kind(plain.config, 2, 24), ids)
    assert sqnr_db(want, got) >= ROUNDING_DB["fp32"]


@torch.inference_mode()
def test_rows_at_different_lengths_read_their_own_spans():
    model = decoder()
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    outputs = []
    for names in ((), ("decode_attention",)):
        engine = engine_over(model, *names)
        cache = KVCache(model.config, 2, 24)
        for held in (*cache.keys, *cache.values):
            held[:, :, 9:] = torch.nan  # who reads a slot beyond its own sees it, masked or not
        engine.model(ids, 0, cache)
        if names:
            got = engine.model(ids[:, :1], torch.tensor([[9], [4]]), cache)
        else:  # row by row, over exactly its slots
            got = torch.cat([
                model(ids[b : b + 1, :1], at, cache.narrow(b, 1)) if at == 9
                else _step_alone(model, ids[b : b + 1], at)
                for b, at in ((0, 9), (1, 4))])  # fmt: skip
        outputs.append(got)
        engine.undo.close()
    assert not outputs[1].isnan().any()
    assert sqnr_db(*outputs) >= ROUNDING_DB["fp32"]


def _step_alone(model, ids, at):
    cache = GrowingCache(model.config, 1, 24)
    model(ids[:, :at], 0, cache)
    return model(ids[:, :1], at, cache)


@pytest.mark.parametrize(("activation", "form"), [
    ("gelu", "none"), ("gelu_python", "none"), ("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"),
    ("quick_gelu", None), ("relu", None),
])  # fmt: skip
@torch.inference_mode()
def test_the_gelu_that_joins_a_bias_is_the_model_s_own(activation, form):
    """x sigmoid(1.702 x) is called a GELU too, and is neither form: such a layer stays as it is."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertIntermediate

    torch.manual_seed(0)
    layer = BertIntermediate(BertConfig(hidden_size=48, intermediate_size=80,
                                        hidden_act=activation)).eval()  # fmt: skip
    layer.dense.weight.data.normal_()
    layer.dense.bias.data.normal_()
    assert form_of(layer.intermediate_act_fn) == form
    assert GemmBiasGelu.takes(layer) == (form is not None)
    if form is not None:
        x = torch.randn(3, 5, 48)
        want = layer(x)
        assert sqnr_db(want, GemmBiasGelu(layer.dense, form)(x)) >= ROUNDING_DB["fp32"]


@pytest.mark.parametrize("names", [("fused_qkv",), ("fused_norm",), ("fused_qkv", "fused_norm"),
                                   ("fused_qkv", "fused_norm", "gemm_bias_act")])  # fmt: skip
@torch.inference_mode()
def test_a_fused_encoder_computes_what_the_encoder_does(names):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                        num_attention_heads=4, attn_implementation="sdpa")  # fmt: skip

    def bert():
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False)

    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[1, 6:] = 0
    plain, ours = bert(), Engine(SPECS["minilm"], bert(), torch.float32, torch.device("cpu"))
    for t in stack(*names):
        ours = t.apply(ours)
    want, got = (
        m(input_ids=ids, attention_mask=real).last_hidden_state for m in (plain, ours.model)
    )
    assert sqnr_db(want[real.bool()], got[real.bool()]) >= ROUNDING_DB["fp32"]
    seen = operators_of(lambda: ours.model(input_ids=ids, attention_mask=real))
    assert seen["native_layer_norm"] == (0 if "fused_norm" in names else 5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9), Sampling(0.7, 0.8, seed=3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_without_logits_are_the_tokens_of_the_plain_loop(sampling, batch):
    ids = prompts(batch, 7)
    plain, fused = engine_of(tiny(0)), engine_of(tiny(0), "fused_sampling")
    seen: list[torch.Tensor] = []
    out = fused.generate(ids, 24, sampling, seen.append)
    assert torch.equal(out, plain.generate(ids, 24, sampling))
    assert torch.equal(torch.cat(seen, 1), out[:, 7:])


# ---- joined weights ----------------------------------------------------------------------


def linears(bias, sizes=(48, 16, 32)):
    torch.manual_seed(0)
    return [nn.Linear(64, n, bias=b).requires_grad_(False)
            for n, b in zip(sizes, bias, strict=True)]  # fmt: skip


@pytest.mark.parametrize("bias", [(True,) * 3, (False,) * 3, (True, False, True)])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_one_product_over_joined_weights_is_the_products_side_by_side(kind, bias):
    parts = linears(bias)
    if issubclass(kind, Int4Linear):
        parts = [kind.from_float(m, 32) for m in parts]
    elif kind is not nn.Linear:
        parts = [kind.from_float(m) for m in parts]
    joint = join(*parts)
    assert type(joint) is kind
    for rows in (1, 5):
        x = torch.randn(2, rows, 64)
        want = torch.cat([m(x) for m in parts], -1)
        assert sqnr_db(want, joint(x)) >= ROUNDING_DB["fp32"]


def test_unlike_layers_are_not_joined():
    one, two, _ = linears((True,) * 3)
    with pytest.raises(StudyError, match="type Int8Linear and Linear cannot be joined, only"):
        join(one, Int8Linear.from_float(two))
    odd = [Int4Linear.from_float(m, 32) for m in linears((False, False), (20, 16))]
    with pytest.raises(StudyError, match="int4 layers of 20 outputs cannot be joined, only of mul"):
        join(*odd)


@pytest.mark.parametrize("name", ["fused_qkv", "fused_mlp"])
def test_the_separate_weights_are_let_go(name):
    before = costs.weight_bytes(decoder())
    engine = engine_over(decoder(), name)
    assert costs.weight_bytes(engine.model) == before
    left = [n for n, _ in engine.model.named_parameters()]
    gone = ("q_proj", "k_proj", "v_proj") if name == "fused_qkv" else ("gate_proj", "up_proj.")
    assert not [n for n in left if any(f".{part}" in n for part in gone)]


# ---- proofs and refusals -----------------------------------------------------------------


def test_joined_weights_that_nobody_reads_are_noticed():
    engine = engine_of(tiny(0), "fused_qkv")
    prove = stack("fused_qkv")[0].effect
    assert "products" in prove(engine, lambda: engine.generate(prompts(1, 5), 8))
    with pytest.raises(NotEngaged, match="same with zeros for the joint weights"):
        prove(engine, lambda: prompts(1, 5))


def test_weights_held_twice_are_noticed():
    engine = engine_of(tiny(0), "fused_mlp")
    engine.model.kept = nn.Linear(3, 3)
    with pytest.raises(NotEngaged, match="left copies of them behind"):
        stack("fused_mlp")[0].effect(engine, lambda: engine.generate(prompts(1, 5), 8))


def test_closing_the_engine_gives_steps_back_to_sdpa():
    engine = engine_of(tiny(0), "decode_attention")
    cache = engine.new_cache(1, 8)

    def ours():
        return operators_of(lambda: engine.model(torch.tensor([[5]]), 3, cache))[
            "study::decode_attention"
        ]

    assert ours() == 2
    engine.undo.close()
    assert ours() == 0


@pytest.mark.parametrize("names", [
    ("decode_step", "fused_norm"), ("decode_step", "fused_qkv"), ("decode_step", "fused_mlp"),
    ("decode_step", "decode_attention"), ("decode_step", "flash_attention"),
    ("decode_step", "fused_sampling"), ("torch_compile", "fused_sampling"),
    ("int8_weight_only", "fused_sampling"), ("prompt_lookup", "fused_sampling")])  # fmt: skip
def test_two_that_replace_the_same_part_are_impossible(names):
    scope, why = impossible(stack(*names), SPECS["lm_small"], "fp32", 1)
    assert scope == "stack"
    assert all(name in why for name in names)


def test_fused_techniques_stand_beside_quantization_and_compilation():
    for other in ("int8_weight_only", "int8_dynamic", "int4_weight_only_g32", "int4_dynamic_g32",
                  "fp8_dynamic", "torch_compile", "static_kv_cache"):  # fmt: skip
        assert not impossible(stack(*DECODER_FUSIONS, other), SPECS["lm_small"], "fp32", 1)


def test_arguments_are_checked_again_when_they_look_different():
    """A check is remembered by shapes, strides, dtypes and numbers: the next wrong one is seen."""
    from kernels.rms_norm import rms_norm
    from kernels.top_p_sampling import top_p_sampling

    x, weight = torch.randn(2, 8), torch.ones(8)
    for _ in range(2):
        rms_norm(x, weight)
        with pytest.raises(KernelError, match="stride 1"):
            rms_norm(torch.randn(8, 8).T[:2], weight)
        with pytest.raises(KernelError, match="alike"):
            rms_norm(x, weight.bfloat16())
        top_p_sampling(x, torch.rand(2), 1.0, 0.9)
        with pytest.raises(KernelError, match="top_p"):
            top_p_sampling(x, torch.rand(2), 1.0, 1.5)


def test_a_stack_of_all_dispatches_fewer_operators_than_each():
    def total(*names):
        engine = build(Engine(SPEC, tiny(0), torch.float32, torch.device("cpu")),
                       stack(*(names or ("lean_decoder",))))  # fmt: skip
        cache = engine.new_cache(1, 8)
        return operators_of(lambda: engine.model(torch.tensor([[5]]), 3, cache)).total()

    each = [total(name) for name in DECODER_FUSIONS]
    assert total(*DECODER_FUSIONS) < min(each) <= max(each) <= total() + 1
