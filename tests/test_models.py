"""Is the lean decoder what transformers computes: cached, ragged, sampled, compiled?"""

import itertools

import pytest
import torch

from impl.core import GREEDY, Sampling, StudyError
from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.models import costs, load
from impl.models.decoder import (
    DecoderConfig,
    GrowingCache,
    KVCache,
    LeanDecoder,
    from_transformers,
)
from impl.models.generation import distribution, draw, generate, uniforms

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def rope(rope_type, **parameters):
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1000.0, **parameters}}


# name -> (transformers class, its options beside SMALL); each adds one thing to the first
CASES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama_one_kv_head": ("Llama", {"num_key_value_heads": 1}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("Llama", {"head_dim": 20}),
    "llama_eps": ("Llama", {"rms_norm_eps": 0.1}),
    "llama_linear": ("Llama", rope("linear", factor=4.0)),
    "llama_dynamic": ("Llama", rope("dynamic", factor=4.0)),
    "llama_llama3": ("Llama", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=16)),
    "llama_yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6,
                               "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_biases_tied": ("Qwen3", {"head_dim": 16, "attention_bias": True,
                                    "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def checkpoint(folder, case, max_shard_size="5GB", **options):
    """A small random checkpoint as save_pretrained writes it; norms and biases random as well."""
    import transformers

    name, more = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """``pair(case)`` -> (transformers' model, the lean decoder over its weights), fp32."""
    made = {}

    def make(case):
        if case not in made:
            folder = checkpoint(tmp_path_factory.mktemp(case), case)
            _, hf = load(str(folder), torch.float32)
            made[case] = hf, from_transformers(hf)
        return made[case]

    with torch.inference_mode():
        yield make


def ids_of(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(97, (batch, length), generator=generator)


def assert_close(reference, output, precision="fp32"):
    noise = sqnr_db(reference, output)
    assert noise >= ROUNDING_DB[precision], f"{noise:.1f} dB"


# ---- the same logits ---------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_transformers(pair, case):
    hf, lean = pair(case)
    ids = ids_of(2, 40)
    assert_close(hf(ids).logits, lean(ids))


@pytest.mark.parametrize("case", ["llama_yarn", "qwen3", "mixtral"])
def test_same_logits_as_transformers_in_bf16(pair, tmp_path, case):
    _, hf = load(str(checkpoint(tmp_path, case)), torch.bfloat16)
    lean = from_transformers(hf)
    ids = ids_of(2, 40)
    assert lean(ids).dtype == torch.bfloat16
    exact = pair(case)[0](ids).logits
    assert sqnr_db(exact, lean(ids)) > sqnr_db(exact, hf(ids).logits) - 3  # as exact as theirs


def test_a_changed_weight_is_seen(pair, tmp_path):
    hf, _ = pair("llama")
    _, other = load(str(checkpoint(tmp_path, "llama")), torch.float32)
    lean = from_transformers(other)
    lean.layers[1].attention.k_proj.weight[3] *= 1.01
    assert sqnr_db(hf(ids_of(1, 20)).logits, lean(ids_of(1, 20))) < ROUNDING_DB["fp32"]


@pytest.mark.parametrize("case", ["llama_tied", "llama_biases", "qwen3", "mixtral"])
def test_no_weight_is_copied(pair, case):
    hf, lean = pair(case)
    theirs = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    ours = {p.untyped_storage().data_ptr() for p in lean.parameters()}
    assert ours == theirs
    assert costs.weight_bytes(lean) == costs.weight_bytes(hf)


@pytest.mark.parametrize(
    ("case", "options", "why"),
    [
        ("llama", {"hidden_act": "gelu"}, "'gelu' in hidden_act of this llama"),
        ("qwen2_window", {"max_window_layers": 1}, "mixes full_attention and sliding_attention"),
        ("llama", rope("longrope", short_factor=[1.0] * 6, long_factor=[2.0] * 6,
                       original_max_position_embeddings=32), "not {'rope_type': 'longrope'"),
    ],
)  # fmt: skip
def test_what_the_lean_decoder_does_not_compute_is_refused(case, options, why):
    import transformers

    name, more = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more, **options})
    with pytest.raises(StudyError, match=why):
        DecoderConfig.from_hf(config)


def test_dynamic_rope_is_refused_beyond_its_static_range(pair):
    with pytest.raises(StudyError, match="65 positions are more than the 64"):
        pair("llama_dynamic")[1](ids_of(1, 65))


def test_the_rotary_table_grows_past_the_trained_length(pair):
    hf, lean = pair("llama")
    ids = ids_of(1, 70)
    assert_close(hf(ids).logits, lean(ids))


def test_a_model_made_from_its_config_alone_runs():
    config = DecoderConfig(97, 48, 80, 2, 4, 2, 12, 64, 1e-5, (1.0, 0.3, 0.1, 0.03, 0.01, 0.003))
    logits = LeanDecoder(config)(ids_of(2, 9))
    assert logits.shape == (2, 9, 97)
    assert logits.isfinite().all()


# ---- cached ------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_class", [GrowingCache, KVCache])
@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_the_full_forward(pair, case, cache_class):
    _, lean = pair(case)
    ids = ids_of(2, 24)
    whole = lean(ids)
    cache = cache_class(lean.config, 2, 24)
    parts = [lean(ids[:, :10], 0, cache), lean(ids[:, 10:13], 10, cache)]
    for t in range(13, 24):
        at = t if cache.lockstep else torch.full((2, 1), t)
        parts.append(lean(ids[:, t : t + 1], at, cache))
    assert_close(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("case", ["llama", "mistral_window", "qwen3", "mixtral"])
def test_rows_at_different_lengths_equal_separate_rows(pair, case):
    _, lean = pair(case)
    lengths = [3, 11, 7]
    ids = ids_of(3, 16)
    cache = KVCache(lean.config, 3, 16)
    lean(ids[:, :11], torch.arange(11).expand(3, -1), cache)  # rows 0 and 2 are padded
    for step in range(4):  # two tokens a row, each row at its own place
        at = torch.tensor(lengths)[:, None] + torch.arange(2) - step % 2  # an overlap is rewritten
        out = lean(ids.gather(1, at), at, cache)
        for row, end in enumerate(at[:, -1].tolist()):
            assert_close(lean(ids[row : row + 1, : end + 1])[:, -2:], out[row : row + 1])
        lengths = [n + 1 for n in lengths]


def test_a_rejected_draft_leaves_no_trace(pair):
    _, lean = pair("llama")
    ids, wrong = ids_of(1, 20), ids_of(1, 20, seed=1)
    cache = KVCache(lean.config, 1, 20)
    at = torch.arange(20)[None]
    lean(ids[:, :8], at[:, :8], cache)
    lean(wrong[:, 8:12], at[:, 8:12], cache)
    out = lean(ids[:, 8:10], at[:, 8:10], cache)
    assert_close(lean(ids[:, :10])[:, 8:], out)


def test_fewer_slots_give_the_same_logits(pair):
    _, lean = pair("llama")
    ids = ids_of(2, 12)
    cache = KVCache(lean.config, 2, 64)
    lean(ids[:, :11], 0, cache)
    at = torch.full((2, 1), 11)
    whole = lean(ids[:, 11:], at, cache)
    cache.slots = 12
    assert_close(whole, lean(ids[:, 11:], at, cache))


def test_last_only_is_the_last_position(pair):
    _, lean = pair("llama")
    ids = ids_of(2, 12)
    assert_close(lean(ids)[:, -1:], lean(ids, last_only=True))


def test_cache_bytes_are_those_counted_from_the_shape(pair):
    hf, lean = pair("llama_wide_heads")
    cache = KVCache(lean.config, 3, 10, torch.bfloat16)
    assert cache.nbytes == 3 * 10 * costs.kv_bytes_per_token(hf.config.to_dict(), 2)


@pytest.mark.parametrize("cache_class", [GrowingCache, KVCache])
def test_autocast_runs_with_an_fp32_cache(pair, cache_class):
    _, lean = pair("llama")
    ids = ids_of(2, 12)
    exact = lean(ids)
    with torch.autocast("cpu", torch.bfloat16):
        cache = cache_class(lean.config, 2, 12)
        lean(ids[:, :11], 0, cache)
        out = lean(ids[:, 11:], 11 if cache.lockstep else torch.full((2, 1), 11), cache)
    assert 70 > sqnr_db(exact[:, 11:], out) >= ROUNDING_DB["bf16"]


@torch.inference_mode(False)
@torch.enable_grad()
def test_a_model_shared_for_inference_can_be_trained(tmp_path):
    _, hf = load(str(checkpoint(tmp_path, "qwen3")), torch.float32)
    with torch.inference_mode():  # as engines are built
        lean = from_transformers(hf)
        lean.extend_positions(100)
    lean.requires_grad_(True)(ids_of(2, 9)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in lean.parameters())


# ---- compiled ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "mistral_window", "mixtral"])
def test_steps_with_tensor_positions_are_one_graph(pair, case):
    from torch._dynamo.testing import CompileCounter

    _, lean = pair(case)
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(lean, backend=counter, fullgraph=True)
    cache, again = (KVCache(lean.config, 2, 16) for _ in range(2))
    ids = ids_of(2, 6)
    for t in range(6):
        at = torch.full((2, 1), t)
        token = ids[:, t : t + 1]
        assert_close(lean(token, at, again), step(token, at, cache))
    assert counter.frame_count == 1
    torch._dynamo.reset()


# ---- generation --------------------------------------------------------------------------


def new_caches(lean, cache_class=GrowingCache):
    return lambda batch, max_len: cache_class(lean.config, batch, max_len)


@pytest.mark.parametrize("cache_class", [GrowingCache, KVCache])
@pytest.mark.parametrize("case", ["llama", "mistral_window", "qwen3", "mixtral"])
def test_same_greedy_tokens_as_transformers(pair, case, cache_class):
    hf, lean = pair(case)
    ids, seen = ids_of(3, 7), []
    theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                         do_sample=False, pad_token_id=0)  # fmt: skip
    ours = generate(lean, new_caches(lean, cache_class), ids, 20, GREEDY, seen.append)
    assert ours.tolist() == theirs.tolist()
    assert [s.shape for s in seen] == [(3, 1)] * 20
    assert torch.equal(torch.cat(seen, 1), ours[:, 7:])


def test_one_token_prompts_and_no_new_tokens(pair):
    _, lean = pair("llama")
    ids = ids_of(2, 1)
    assert torch.equal(generate(lean, new_caches(lean), ids, 0), ids)
    assert generate(lean, new_caches(lean), ids, 3).shape == (2, 4)


def test_no_prompt_and_no_room_are_errors(pair):
    _, lean = pair("llama")
    with pytest.raises(StudyError, match="the prompt is empty"):
        generate(lean, new_caches(lean), ids_of(1, 0), 3)
    small = lambda batch, max_len: KVCache(lean.config, batch, 8)  # noqa: E731
    with pytest.raises(StudyError, match="6 prompt and 3 new tokens need 9 slots, the cache has 8"):
        generate(lean, small, ids_of(1, 6), 3)


def test_a_sampled_row_depends_on_its_seed_and_number_alone(pair):
    _, lean = pair("llama")
    ids, sampling = ids_of(3, 5), Sampling(temperature=1.0, top_p=0.9, seed=4)
    batch = generate(lean, new_caches(lean), ids, 16, sampling)
    assert torch.equal(batch, generate(lean, new_caches(lean, KVCache), ids, 16, sampling))
    alone = generate(lean, new_caches(lean), ids[2:], 16, sampling, rows=[2])
    assert torch.equal(batch[2:], alone)
    other = generate(lean, new_caches(lean), ids[2:], 16, sampling, rows=[1])
    assert not torch.equal(alone, other)
    reseeded = Sampling(temperature=1.0, top_p=0.9, seed=5)
    assert not torch.equal(batch, generate(lean, new_caches(lean), ids, 16, reseeded))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_follow_the_distribution(top_p):
    from scipy import stats

    sampling = Sampling(temperature=0.8, top_p=top_p, seed=1)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0))
    probs = distribution(logits, sampling)
    u = uniforms(sampling, range(40), 500)  # (40, 500): many short streams, as rows have
    counts = torch.bincount(draw(probs.expand(40, 500, -1), u).flatten(), minlength=12)
    assert (counts[probs == 0] == 0).all()
    kept = probs > 0
    expected = probs[kept].double()
    expected = expected / expected.sum() * counts.sum()
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-3
    skewed = expected.flip(0)
    assert stats.chisquare(counts[kept].numpy(), skewed.numpy()).pvalue < 1e-9  # it can fail


def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))
    for top_p, kept in ((0.3, {1}), (0.41, {1, 3}), (0.7, {1, 3, 4}), (0.0, {1})):
        probs = distribution(logits, Sampling(temperature=1.0, top_p=top_p))
        assert set(probs.nonzero().flatten().tolist()) == kept
        assert abs(probs.sum().item() - 1) < 8 * torch.finfo(torch.float32).eps


def test_a_draw_never_takes_a_token_without_probability():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0])
    edge = torch.tensor([0.0, 0.5, 1 - 2**-53])
    assert draw(probs.expand(3, -1), edge).tolist() == [1, 3, 3]


# ---- costs -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parameters_counted_from_the_shape(pair, case):
    hf, lean = pair(case)
    assert costs.decoder_parameters(hf.config.to_dict()) == costs.parameter_count(hf)
    assert costs.parameter_count(lean) == costs.parameter_count(hf)
    assert costs.weight_bytes(hf) == 4 * costs.parameter_count(hf)


@pytest.mark.parametrize("case", ["llama", "llama_wide_heads", "qwen3", "mixtral"])
def test_flops_counted_from_the_shape(pair, case):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    hf, lean = pair(case)
    config = hf.config.to_dict()
    T = 9
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lean(ids_of(1, T))
    # a full forward computes all T x T scores, also those that the mask hides
    assert counter.get_total_flops() == T * costs.flops_per_token(config, T)
    without_head = costs.flops_per_token(config, T, head=False)
    assert costs.flops_per_token(config, T) - without_head == 2 * 48 * 97


def test_every_case_differs_from_every_other(pair):
    """The cases mean something: each option changes the logits."""
    ids = ids_of(1, 40)
    logits = {case: pair(case)[0](ids).logits for case in CASES}
    same = {frozenset(two) for two in itertools.combinations(CASES, 2)
            if torch.equal(logits[two[0]], logits[two[1]])}  # fmt: skip
    # dynamic scaling is static up to max_position_embeddings, and full Mistral is Llama
    assert same <= {frozenset(two) for two in (("llama", "mistral"), ("llama", "llama_dynamic"),
                                               ("mistral", "llama_dynamic"))}  # fmt: skip
