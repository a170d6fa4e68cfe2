"""Are the numbers of the quantizers, and of the quality measures, what they claim to be?"""

import dataclasses
import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from impl.core import TECHNIQUES, Engine, NotEngaged, StudyError
from impl.fidelity import sqnr_db
from impl.models import SPECS, quality
from impl.models.costs import weight_bytes
from impl.models.decoder import DecoderConfig, LeanDecoder
from impl.quantization import layers, numerics
from impl.quantization.int8 import quantize_modules

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
def test_a_token_that_is_not_finite_shows_in_its_own_output_only(bad):
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
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 1), (2, 5, 3)], ids=str)
def test_weight_only_linear_is_the_product_with_the_rounded_weights(leading, inputs, bias, dtype):
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
def test_dynamic_linear_is_the_product_of_the_rounded_operands(leading, dtype):
    int8 = layers.Int8DynamicLinear.from_float(linear(dtype=dtype))
    x = normal(*leading, int8.in_features, dtype=dtype)
    q, scale = numerics.quantize_per_token(x)
    exact = F.linear(q.double(), int8.weight.double()) * scale.double() * int8.scale.double()
    y = int8(x)
    assert (y.dtype, y.shape) == (dtype, (*leading, int8.out_features))
    bound = 3 * ROUNDOFF[dtype] * (exact.abs() + int8.bias.double().abs())
    assert ((y.double() - exact - int8.bias.double()).abs() <= bound).all()


def test_a_token_gives_the_same_bits_alone_and_in_a_batch():
    int8 = layers.Int8DynamicLinear.from_float(linear())
    x = normal(6, 40) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1.0, 50.0])[:, None]
    assert torch.cat([int8(row[None]) for row in x]).equal(int8(x))


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


# ---- models --------------------------------------------------------------------------------


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


def test_proof_of_int8_arithmetic_fails_for_float_products(monkeypatch):
    engine = engine_of(int8(tiny(), dynamic=True))
    wide = lambda a, b: (a.float() @ b.float().T).int()  # noqa: E731
    monkeypatch.setattr(layers, "int8_matmul", wide)
    with pytest.raises(NotEngaged, match="Int8DynamicLinear calls no int8 matrix product"):
        TECHNIQUES["int8_dynamic"].effect(engine, lambda: engine.forward(torch.arange(8)[None]))


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


# ---- quality -------------------------------------------------------------------------------

LANGUAGE = ("perplexity", "kl", "top1_agreement", "completion")


def figures(model, reference, profile="smoke"):
    engine, other = engine_of(model, metrics=LANGUAGE), engine_of(reference, metrics=LANGUAGE)
    return {m["metric"]: m for m in quality.quality_of(engine, other, profile)}


def test_a_model_equals_itself_in_every_figure():
    found = figures(tiny(tied=False), tiny(tied=False))
    assert list(found) == list(LANGUAGE)
    for name, metric in found.items():
        assert (metric["delta"], metric["stderr"]) == (0, 0), name
        assert metric["data"].startswith("sha256:")
        assert metric["budget"] is None
    # without training a token is one of 3840, more or less
    assert found["perplexity"]["value"] == pytest.approx(3840, rel=0.5)


def test_figures_are_those_of_the_definitions():
    reference, model = tiny(tied=False), int8(tiny(tied=False), dynamic=True)
    model.norm.weight.mul_(8)  # so peaked that KL is far from symmetric
    found = figures(model, reference)
    ids = quality._text(engine_of(reference), quality.SIZES["smoke"][0])
    p, q = (m(ids)[:, :-1].double().log_softmax(-1) for m in (reference, model))
    following = ids[:, 1:, None]
    perplexity = (-q.gather(-1, following)).mean().exp().item()
    assert found["perplexity"]["value"] == pytest.approx(perplexity, rel=1e-5)
    kl = (p.exp() * (p - q)).sum(-1)
    assert found["kl"]["value"] == pytest.approx(kl.mean().item(), rel=1e-2)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    assert found["top1_agreement"]["value"] == pytest.approx(same.mean().item())
    assert 0.5 < found["top1_agreement"]["value"] < 1
    difference = (p - q).gather(-1, following).flatten()
    stderr = difference.std() / math.sqrt(len(difference)) * found["perplexity"]["baseline"]
    assert found["perplexity"]["stderr"] == pytest.approx(stderr.item(), rel=1e-3)


def test_the_reference_runs_once_for_all_cells(monkeypatch):
    reference, runs = tiny(tied=False), []
    reference.register_forward_hook(lambda *_: runs.append(1))
    first = figures(int8(tiny(tied=False)), reference)
    once = len(runs)
    assert figures(int8(tiny(tied=False)), reference) == first
    assert len(runs) == once > 0


def test_a_model_that_gives_no_numbers_has_no_quality():
    broken = tiny(tied=False)
    broken.norm.weight.fill_(math.nan)
    found = figures(broken, tiny(tied=False))
    assert found["perplexity"]["value"] is None
    assert found["kl"]["value"] is None


def test_random_weights_have_no_quality():
    engine = Engine(SPECS["llama_1b"], None, torch.float32, torch.device("cpu"))
    assert quality.quality_of(engine, engine) == []


def test_an_unknown_profile_is_refused():
    with pytest.raises(StudyError, match="unknown profile 'huge'; known: smoke"):
        quality.quality_of(engine_of(None), engine_of(None), "huge")


class Answers(nn.Module):
    """A classifier that is right on all but the given share of the held-out digits."""

    def __init__(self, wrong):
        super().__init__()
        from impl.models import data

        digits = data.digits()
        keys = [image.numpy().tobytes() for image in digits.test_images]
        self.known = dict(zip(keys, digits.test_labels.tolist(), strict=True))
        self.wrong = set(keys[:wrong])

    def forward(self, images):
        keys = [image.numpy().tobytes() for image in images]
        labels = torch.tensor([(self.known[k] + (k in self.wrong)) % 10 for k in keys])
        return F.one_hot(labels, 10).float()


def test_accuracy_counts_and_its_error_is_that_of_the_difference():
    spec = SPECS["digits_resnet"]
    ours, theirs = (Engine(spec, Answers(n), torch.float32, torch.device("cpu"), 8) for n in (6, 4))
    (metric,) = quality.quality_of(ours, theirs, "smoke")
    assert metric["metric"] == "accuracy"
    assert metric["value"] == pytest.approx(122 / 128)
    assert metric["baseline"] == pytest.approx(124 / 128)
    p = 2 / 128  # the two images where they differ
    assert metric["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 127), rel=1e-6)


class BagOfWords(nn.Module):
    """An encoder: how often each token stands in the text, the first ``blind`` tokens unseen."""

    def __init__(self, vocab, blind=0):
        super().__init__()
        self.vocab, self.blind = vocab, blind

    def forward(self, input_ids, attention_mask):
        counts = torch.zeros(len(input_ids), self.vocab)
        counts.scatter_add_(1, input_ids, attention_mask.float())
        counts[:, : self.blind] = 0
        return counts + 1e-6


def test_cosine_and_retrieval_are_those_of_the_texts():
    spec = SPECS["minilm"]
    if reason := spec.lacks():
        pytest.skip(reason)
    vocab = spec.config["vocab_size"]

    def measured(blind):
        ours, theirs = (
            Engine(spec, BagOfWords(vocab, b), torch.float32, torch.device("cpu"), 3)
            for b in (blind, 0)
        )
        return {m["metric"]: m for m in quality.quality_of(ours, theirs, "smoke")}

    same = measured(0)
    assert same["cosine"]["value"] == pytest.approx(1)
    # a title's words stand in its own text more often than one time in sixteen
    assert same["retrieval"]["baseline"] == same["retrieval"]["value"] > 0.25
    blind = measured(vocab)
    assert blind["cosine"]["value"] < 0.5
    assert blind["retrieval"]["value"] == pytest.approx(1 / 16), "all alike: the first is chosen"
    assert blind["retrieval"]["baseline"] == same["retrieval"]["value"]


# ---- checks of what was emitted --------------------------------------------------------------


def test_emitted_tokens_are_choices_near_ties_or_violations():
    logits = torch.zeros(2, 5, 4)
    logits[0, 1, 2] = 1.0  # judges token 2 of row 0: emitted
    logits[0, 2, 1], logits[0, 2, 3] = 1.0, 0.95  # emitted 3: a near tie
    logits[0, 3, 0] = 1.0  # emitted 2: a violation
    logits[1, :, 1] = 1.0  # row 1 emits 1 throughout
    logits[1, 4] = math.nan  # judges a token that nobody emitted
    tokens = torch.tensor([[0, 0, 2, 3, 2], [3, 3, 1, 1, 1]])
    violations, ties = quality.tokens_agree(logits, tokens, 2, margin=0.1)
    assert violations.tolist() == [[False, False, True], [False] * 3]
    assert ties.tolist() == [[False, True, False], [False] * 3]
    assert quality.tokens_agree(logits, tokens, 2, margin=2.0)[0].sum() == 0
    assert quality.tokens_agree(logits, tokens, 2, margin=0.0)[0].sum() == 2
    assert quality.tokens_agree(logits * math.nan, tokens, 2, 1.0)[0].all()


def test_logits_of_other_tokens_judge_nothing():
    with pytest.raises(StudyError, match="run the reference over prompt and answer"):
        quality.tokens_agree(torch.zeros(1, 4, 3), torch.zeros(1, 5, dtype=torch.int64), 2, 0.1)
    with pytest.raises(StudyError, match="prompt of 0"):
        quality.tokens_agree(torch.zeros(1, 5, 3), torch.zeros(1, 5, dtype=torch.int64), 0, 0.1)


def test_draws_from_the_distribution_pass_and_others_do_not():
    probs = (torch.arange(50) * -0.2).softmax(0)
    random = torch.Generator().manual_seed(3)
    passed = [
        quality.same_distribution(
            torch.multinomial(probs, 400, replacement=True, generator=random), probs)
        for _ in range(40)
    ]  # fmt: skip
    assert min(passed) > quality.P_THRESHOLD
    assert sum(p < 0.5 for p in passed) in range(8, 33), "p-values of a true sampler are uniform"
    hotter = (torch.arange(50) * -0.15).softmax(0)
    drawn = torch.multinomial(hotter, 2000, replacement=True, generator=random)
    assert quality.same_distribution(drawn, probs) < quality.P_THRESHOLD
    greedy = torch.zeros(400, dtype=torch.int64)
    assert quality.same_distribution(greedy, probs) < quality.P_THRESHOLD


def test_a_draw_that_cannot_be_is_no_sample():
    probs = torch.tensor([0.5, 0.5, 0.0])
    draws = torch.tensor([0, 1] * 50)
    assert quality.same_distribution(draws, probs) > 0.5
    draws[7] = 2
    assert quality.same_distribution(draws, probs) == 0


def test_too_few_draws_are_refused():
    with pytest.raises(StudyError, match="draw more"):
        quality.same_distribution(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
