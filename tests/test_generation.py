"""Does every way of generating emit the same tokens?"""

import numpy as np
import pytest
import torch

from impl.core import Engine, NotEngaged, Sampling, build, stack
from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.kv_cache import preallocated
from impl.machine import lacks
from impl.models.generation import generate
from impl.speculative import DraftModel, NgramIndex, PromptLookup, Proposal, speculate
from tests.tiny import SPEC

# (prompt, new tokens): shorter than an n-gram, as long, well over; no room for a guess, room for
# one, less than k, many steps
LENGTHS = ((1, 24), (2, 3), (33, 24), (5, 1), (5, 2), (5, 3))


def tiny(seed, vocab=32, layers=2, hidden=32, scale=3.0):
    """A random Llama, its weights scaled up so that its choices are far from ties."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False)  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(scale)
    return model


def engine_of(hf, *techniques, batch=1):
    engine = Engine(SPEC, hf, torch.float32, torch.device("cpu"), batch)
    return build(engine, stack(*(techniques or ("lean_decoder",))))


def plain_loop(engine):
    """The loop without drafts over the engine's model and cache."""
    return lambda ids, n: generate(engine.model, engine.new_cache, ids, n)


def prompts(batch, length, vocab=32, seed=0):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class Oracle:
    """Proposes what ``answer(row, place)`` says for the new token at that place."""

    exact_draws = True

    def __init__(self, k, answer):
        self.k, self.answer = k, answer

    def start(self, ids, length, sampling, rows):
        self.places = [0] * len(ids)

    def propose(self, emitted):
        self.places = [p + len(e) for p, e in zip(self.places, emitted, strict=True)]
        guesses = [[self.answer(b, p + i) for i in range(self.k)]
                   for b, p in enumerate(self.places)]  # fmt: skip
        return Proposal(torch.tensor(guesses), None, [True] * len(guesses))


def drafted_by(engine, draft, k):
    """A drafter over another engine's decoder."""
    return DraftModel(draft.model, preallocated(draft), k, lambda: engine.model)


@pytest.fixture(scope="module")
def target():
    return engine_of(tiny(0), "static_kv_cache")


@pytest.fixture(scope="module")
def draft():
    return engine_of(tiny(1, layers=1), "static_kv_cache")


@pytest.mark.parametrize(("length", "new"), LENGTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_speculation_emits_the_tokens_of_the_plain_loop(target, draft, batch, length, new):
    ids = prompts(batch, length)
    plain = engine_of(tiny(0)).generate(ids, new)
    assert plain.shape == (batch, length + new)
    assert torch.equal(plain, target.generate(ids, new)), "static cache"
    for k in (1, 5):
        for drafter in (PromptLookup(k), drafted_by(target, draft, k)):
            assert torch.equal(plain, speculate(target, drafter, ids, new)), drafter


@pytest.mark.parametrize("batch", [1, 3])
def test_a_draft_that_is_always_right_fills_every_step(target, batch):
    k, steps = 4, 6
    ids, new = prompts(batch, 7), 1 + 6 * 5
    plain = target.generate(ids, new)
    right = Oracle(k, lambda b, p: int(plain[b, min(7 + p, plain.shape[1] - 1)]))
    assert torch.equal(plain, speculate(target, right, ids, new))
    assert target.stats["mean_accepted"] == k + 1
    assert target.stats["accept_rate"] == 1
    assert target.stats["target_steps"] == steps


def test_the_target_as_its_own_draft_is_always_right(target):
    ids, new = prompts(3, 7), 1 + 6 * 4
    speculate(target, drafted_by(target, target, 3), ids, new)
    assert target.stats["mean_accepted"] == 4


@pytest.mark.parametrize("batch", [1, 3])
def test_a_draft_that_is_always_wrong_costs_steps_and_no_token(target, batch):
    ids, new = prompts(batch, 7), 20
    plain = target.generate(ids, new)
    wrong = Oracle(4, lambda b, p: (int(plain[b, min(7 + p, 26)]) + 1) % 32)
    assert torch.equal(plain, speculate(target, wrong, ids, new))
    assert target.stats["accepted"] == 0
    assert target.stats["mean_accepted"] == 1
    assert target.stats["target_steps"] == new - 1


def test_rows_that_accept_differently_stay_apart(target):
    """One row always right, one always wrong, one right at every other place."""
    ids, new = prompts(3, 7), 24
    plain = target.generate(ids, new)

    def answer(b, p):
        truth = int(plain[b, min(7 + p, 30)])
        return truth if b == 0 or (b == 2 and p % 2) else (truth + 1) % 32

    seen = []
    out = speculate(target, Oracle(3, answer), ids, new, on_token=seen.append)
    assert torch.equal(plain, out)
    assert torch.equal(torch.cat(seen, 1), out[:, 7:]), "what was streamed is the answer"


def test_tokens_do_not_depend_on_what_the_lent_cache_held_before(target):
    ids = prompts(1, 9)
    first = target.generate(ids, 20)
    cache = target.new_cache(1, 29)
    with torch.inference_mode():
        for t in (*cache.keys, *cache.values):
            t.fill_(1e4)
    del cache
    assert torch.equal(first, target.generate(ids, 20))
    assert torch.equal(first, speculate(target, Oracle(4, lambda b, p: 3), ids, 20))


def test_a_cache_in_use_is_not_lent_twice():
    new_cache = preallocated(engine_of(tiny(0)))
    one, two = new_cache(1, 10), new_cache(1, 10)
    assert one.keys[0].data_ptr() != two.keys[0].data_ptr()
    address = one.keys[0].data_ptr()
    del one
    assert new_cache(1, 12).keys[0].data_ptr() == address, "the same bucket gets the same memory"


# ---- the index ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "k", "expected"),
    [
        ("abcdeabc", 3, "dea"),  # what followed the longest known suffix
        ("abcXbcYbc", 2, "Yb"),  # the latest of several
        ("abab", 5, "ababa"),  # a match that runs into the end goes round
        ("aaa", 3, "aaa"),
        ("abcdef", 3, None),  # nothing repeats
        ("a", 3, None),  # shorter than an n-gram
        ("", 3, None),
    ],
)
def test_the_index_finds_what_followed(text, k, expected):
    whole = NgramIndex([ord(c) for c in text])
    piecewise = NgramIndex()
    for c in text:
        piecewise.extend([ord(c)])
    for index in (whole, piecewise):
        found = index.guess(k)
        assert (found and "".join(map(chr, found))) == expected


def test_text_that_never_repeats_is_generated_in_plain_steps(target):
    class Never(PromptLookup):
        def propose(self, emitted):
            proposal = super().propose(emitted)
            assert proposal is None or any(proposal.real)
            return None

    widths = []
    hook = target.model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    try:
        speculate(target, Never(4), prompts(1, 7), 12)
    finally:
        hook.remove()
    assert widths == [7] + 11 * [1]
    assert target.stats["drafted"] == 0


# ---- sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_sampled_prompt_lookup_emits_the_tokens_of_the_plain_loop(target, batch):
    ids = prompts(1, 6).repeat(batch, 4)
    for seed in range(3):
        sampling = Sampling(1.3, 0.95, seed)
        plain = target.generate(ids, 30, sampling)
        assert torch.equal(plain, speculate(target, PromptLookup(4), ids, 30, sampling))


def chi_square(counts, probabilities):
    """p-value that counts follow the probabilities, cells expected under 5 pooled."""
    from scipy.stats import chisquare

    expected = probabilities * counts.sum()
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    return chisquare(
        counts[keep], expected[keep] * counts[keep].sum() / expected[keep].sum()
    ).pvalue


@pytest.mark.parametrize("drafter", ["prompt_lookup", "draft", "same"])
@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0), Sampling(0.8, 0.9)], ids=["all", "top_p"])
def test_speculation_samples_from_the_target(target_of_six, draft_of_six, drafter, sampling):
    """Pairs of tokens over 4,000 draws follow the target's exact distribution (chi-square)."""
    from impl.models.generation import distribution

    V, N = 6, 4000
    ids = torch.tensor([[1, 2, 3, 1, 2]]).repeat(N, 1)
    source = {
        "prompt_lookup": PromptLookup(2),
        "draft": drafted_by(target_of_six, draft_of_six, 2),
        "same": drafted_by(target_of_six, target_of_six, 2),
    }[drafter]
    out = speculate(
        target_of_six, source, ids, 4, Sampling(sampling.temperature, sampling.top_p, 7)
    )
    # exact distribution of the second to fourth new tokens, by enumeration of all V^4 answers
    answers = torch.cartesian_prod(*[torch.arange(V)] * 4)
    logits = target_of_six.model(torch.cat((ids[: len(answers)], answers), 1))[:, 4:8]
    probs = distribution(logits, sampling).double().gather(2, answers[..., None])[..., 0].prod(1)
    counts = np.bincount((out[:, 5:] * torch.tensor([V**3, V**2, V, 1])).sum(1), minlength=V**4)
    assert counts[probs.numpy() == 0].sum() == 0, "a token outside the nucleus"
    assert chi_square(counts, probs.numpy()) > 1e-3
    if drafter == "same":
        assert target_of_six.stats["accept_rate"] > 0.999


@pytest.fixture(scope="module")
def target_of_six():
    return engine_of(tiny(2, vocab=6, scale=6.0), "static_kv_cache")


@pytest.fixture(scope="module")
def draft_of_six():
    return engine_of(tiny(3, vocab=6, layers=1, scale=6.0), "static_kv_cache")


# ---- compiled ----------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    bool(lacks("compiler")), reason=lacks("compiler") or "a compiler is here"
)


@needs_compiler
def test_compiled_steps_emit_the_same_tokens_and_compile_once_per_shape():
    """Plain and speculating loops, rows apart; a second sweep over the shapes compiles nothing."""
    from torch._dynamo.utils import counters

    engine = engine_of(tiny(0), "prompt_lookup", "torch_compile", batch=2)
    with engine.undo:
        loops = (engine.generate, plain_loop(engine))
        ids, new = prompts(2, 6).repeat(1, 3), 20
        plain = engine_of(tiny(0)).generate(ids, new)
        before = counters["stats"]["unique_graphs"]
        for loop in loops:
            assert torch.equal(loop(ids, new), plain)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs - before <= 2, "one token, and k + 1"
        for loop in loops:
            assert torch.equal(loop(ids, new), plain)
        effect = stack("torch_compile")[0].effect
        assert "0 graph breaks" in effect(engine, lambda: engine.generate(ids, new))
        assert counters["stats"]["unique_graphs"] == graphs
        assert {tokens for _, tokens, *_ in engine.model.step.functions} == {1, 5}
        engine.model = engine.model.eager
        with pytest.raises(NotEngaged):
            effect(engine, lambda: engine.generate(ids, new))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generated_products_of_few_rows_equal_the_library_s(dtype):
    """Linear layers with and without bias, one of int8 weights, at 1, 3 and 8 rows and at 9."""
    from impl.compilation import MAX_ROWS, rewrite_skinny_products, skinny_products

    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, biased = torch.nn.Linear(48, 20, bias=False), torch.nn.Linear(48, 7)
    packed = torch.randint(-127, 128, (5, 48), dtype=torch.int8)
    plain, biased = plain.to(dtype), biased.to(dtype)
    replaced = []

    class Counting(type(skinny_products())):
        def __call__(self, graph):
            replaced.append(rewrite_skinny_products(graph))

        def uuid(self):
            return None

    def f(x):
        return torch.cat((plain(x), biased(x), x @ packed.to(x.dtype).T), -1)

    compiled = torch.compile(
        f, fullgraph=True, dynamic=False, options={"post_grad_custom_pre_pass": Counting()}
    )
    with torch.inference_mode():
        for rows in (1, 3, MAX_ROWS, MAX_ROWS + 1):
            x = torch.randn(rows, 48).to(dtype)
            assert (
                sqnr_db(f(x), compiled(x))
                > (ROUNDING_DB["fp32" if dtype == torch.float32 else "bf16"])
            )
    torch._dynamo.reset()
    assert replaced == [3, 3, 3, 0]


# ---- proofs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["static_kv_cache", "prompt_lookup", "peer_static_cache", "peer_prompt_lookup"]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_proof_passes_with_the_technique_and_fails_without(name, batch):
    technique = stack(name)[0]
    engine = engine_of(tiny(0, vocab=64), name, batch=batch)
    ids = prompts(batch, 12)
    plain = engine_of(tiny(0, vocab=64)).generate(ids, 16)
    assert torch.equal(engine.generate(ids, 16), plain)
    assert technique.effect(engine, lambda: engine.generate(ids, 16))
    without = engine_of(
        tiny(0, vocab=64), "eager" if technique.host == "transformers" else "lean_decoder",
        batch=batch)  # fmt: skip
    with pytest.raises(NotEngaged):
        technique.effect(without, lambda: without.generate(ids, 16))
