"""Do the proofs of precision and of host synchronization notice what is off, and only that?"""

import pytest
import torch
from torch import nn

from impl.core import TECHNIQUES, Engine, NotEngaged, build, stack
from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.memory import generate_on_device, host_syncs
from impl.models import SPECS
from impl.models.decoder import KVCache
from impl.precision import AlignedLinear, islands, unaligned_linears
from tests.test_serving import requests_of, serving, small_model

MODELS = ("decoder", "classifier", "encoder")


def model_of(kind, dtype=torch.float32):
    """A small random model of each kind and an input of it."""
    import transformers

    ids = torch.arange(24).reshape(2, 12) + 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "decoder":
            return small_model(tie_word_embeddings=True).to(dtype), ids
        if kind == "classifier":
            config = transformers.ResNetConfig(
                num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
                num_labels=10, layer_type="basic")  # fmt: skip
            made = transformers.ResNetForImageClassification(config)
            image = torch.randn(2, 1, 32, 32)
        else:
            config = transformers.BertConfig(
                hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                vocab_size=100)  # fmt: skip
            made, image = transformers.BertModel(config, add_pooling_layer=False), None
    made = made.eval().requires_grad_(False).to(dtype)
    return made, ids if image is None else image.to(dtype)


def engine_of(kind, name=None, dtype=torch.float32):
    """An engine under this technique (none: as loaded), an input, and its canonical call."""
    model, x = model_of(kind, dtype)
    spec = {"decoder": "lm_small", "classifier": "digits_resnet", "encoder": "minilm"}[kind]
    engine = Engine(SPECS[spec], model, dtype, torch.device("cpu"), len(x))
    names = [name] if name else ["lean_decoder"] if kind == "decoder" else []
    engine = build(engine, stack(*names))
    run = (lambda: engine.generate(x, 5)) if kind == "decoder" else (lambda: forward(engine, x))
    return engine, x, run


def forward(engine, x):
    out = engine.forward(x)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("autocast_bf16", torch.float32), ("mixed_precision", torch.bfloat16),
     ("mixed_precision", torch.float16)],
)  # fmt: skip
def test_mixed_formats_are_proven_where_on_and_denied_where_off(kind, name, dtype):
    engine, x, run = engine_of(kind, name, dtype)
    assert TECHNIQUES[name].effect(engine, run)
    exact, _, _ = engine_of(kind)
    x_exact = x.float() if x.is_floating_point() else x
    noise = sqnr_db(forward(exact, x_exact), forward(engine, x))
    assert noise >= ROUNDING_DB["bf16"], f"{noise:.1f} dB from fp32"
    off, _, run_off = engine_of(kind, None, dtype)
    with pytest.raises(NotEngaged):
        TECHNIQUES[name].effect(off, run_off)


@pytest.mark.parametrize("kind", MODELS)
def test_islands_of_fp32_bring_the_output_nearer_to_fp32(kind):
    exact, x, _ = engine_of(kind)
    low, x_low, _ = engine_of(kind, None, torch.bfloat16)
    mixed, _, _ = engine_of(kind, "mixed_precision", torch.bfloat16)
    # the same bf16 weights on all sides: what differs is the arithmetic
    for ours, theirs in zip(exact.model.parameters(), low.model.parameters(), strict=True):
        ours.copy_(theirs)
    want = forward(exact, x)
    with_islands, without = (sqnr_db(want, forward(e, x_low)) for e in (mixed, low))
    if kind == "encoder":  # torch's layer norm sums in fp32 and rounds once by itself
        assert with_islands == without
    else:
        assert with_islands > without


def test_islands_leave_a_tied_embedding_in_low_precision():
    engine, _, _ = engine_of("decoder", "mixed_precision", torch.bfloat16)
    assert engine.model.embed.weight.dtype == torch.bfloat16
    assert engine.model.lm_head.weight.dtype == torch.float32
    assert set(islands(engine.model)) >= {"norm", "lm_head", "layers.0.input_norm"}


def test_autocast_writes_a_static_cache_of_fp32():
    engine, _, run = engine_of("decoder", "autocast_bf16")
    growing = run()
    config = engine.model.config
    engine.new_cache = lambda rows, length: KVCache(config, rows, length)
    assert torch.equal(run(), growing)


def test_one_island_off_is_noticed():
    engine, _, run = engine_of("encoder", "mixed_precision", torch.bfloat16)
    norm = next(iter(islands(engine.model).values()))
    norm._forward_pre_hooks.clear()
    norm.to(torch.bfloat16)
    with pytest.raises(NotEngaged, match="1 of 5 islands ran in low precision"):
        TECHNIQUES["mixed_precision"].effect(engine, run)


def test_tf32_is_on_inside_a_forward_and_nowhere_else():
    engine, _, run = engine_of("encoder")
    engine = TECHNIQUES["tf32"].apply(engine)
    seen = []
    engine.model.embeddings.register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    run()
    assert (seen, torch.get_float32_matmul_precision()) == (["high"], "highest")
    with pytest.raises(NotEngaged, match="its products are fp32's"):  # as on every CPU
        TECHNIQUES["tf32"].effect(engine, run)


# ---- aligned shapes ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 10), (33, 64), (5, 3), (130, 200)])
def test_padding_a_linear_changes_nothing(inputs, outputs, bias):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    aligned = AlignedLinear(linear)
    assert not any(size % 64 for size in aligned.weight.shape)
    x = torch.randn(2, 7, inputs)
    assert aligned(x).shape == (2, 7, outputs)
    assert sqnr_db(linear(x), aligned(x)) >= ROUNDING_DB["fp32"]


@pytest.mark.parametrize("kind", MODELS)
def test_aligned_shapes_are_proven_where_on_and_denied_where_off(kind):
    plain, x, run_plain = engine_of(kind)
    assert unaligned_linears(plain.model)
    with pytest.raises(NotEngaged):
        TECHNIQUES["aligned_shapes"].effect(plain, run_plain)
    want = forward(plain, x)
    aligned, _, run = engine_of(kind, "aligned_shapes")
    assert "64]" in TECHNIQUES["aligned_shapes"].effect(aligned, run)
    assert sqnr_db(want, forward(aligned, x)) >= ROUNDING_DB["fp32"]


# ---- the host does not wait --------------------------------------------------------------


def test_a_planted_synchronization_is_found():
    model, ids = model_of("decoder")
    assert host_syncs(lambda: generate_on_device(model, ids, 6)) == []
    for plant in (
        lambda token: token[0, 0].item(),
        lambda token: bool((token == 1).any()),
        lambda token: token.nonzero(),
        lambda token: torch.equal(token, token),
    ):
        found = host_syncs(lambda plant=plant: generate_on_device(model, ids, 6, on_token=plant))
        assert len(found) >= 6, found


def test_host_sync_free_is_denied_to_transformers_own_loop():
    model, ids = model_of("decoder")
    effect = TECHNIQUES["host_sync_free"].effect
    with serving(model, "host_sync_free") as engine:
        assert "no host synchronization" in effect(engine, lambda: engine.generate(ids, 3))
    with serving(model, "eager") as engine, pytest.raises(NotEngaged):
        effect(engine, lambda: engine.generate(ids, 3))


def test_host_sync_free_writes_the_same_tokens_and_draws_as_the_lean_loop():
    from impl.core import Sampling

    model, ids = model_of("decoder")
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3)
    with serving(model, "eager") as eager, serving(model, "lean_decoder") as lean:
        assert torch.equal(generate_on_device(model, ids, 12), eager.generate(ids, 12))
        drawn = generate_on_device(model, ids, 12, sampling)
        assert torch.equal(drawn, lean.generate(ids, 12, sampling))
    with serving(model, "host_sync_free") as engine:
        request = requests_of((5, 7))[0]
        (answer,) = engine.serve([request])
        assert torch.equal(answer.ids[None], engine.generate(request.ids[None], 7))
