"""Are the figures of quality those of their definitions?"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from impl.core import Engine, StudyError
from impl.models import SPECS, quality
from tests.test_quantized_models import engine_of, int8, tiny

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
