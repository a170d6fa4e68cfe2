"""Is the trace that schedulers serve the same on every machine, and drawn as it says?"""

import itertools

import pytest
import torch

from impl.core import Request, StudyError
from impl.models.requests import LONGEST, request_trace, trace_hash

TEXT = torch.arange(5000)


def test_a_trace_is_fixed_by_its_seed():
    first, again, other = (request_trace(44, seed, text=TEXT) for seed in (0, 0, 1))
    assert trace_hash(first) == trace_hash(again) != trace_hash(other)
    # Python's generator and these lengths are the same on every machine
    assert [(len(r.ids), r.max_new_tokens) for r in first[:3]] == [(62, 5), (14, 6), (49, 4)]
    moved = [*first[:-1], Request(43, first[-1].ids, first[-1].max_new_tokens, 9.0)]
    assert trace_hash(moved) != trace_hash(first)


def test_lengths_are_log_normal_about_their_means_and_arrivals_poisson():
    trace = request_trace(4000, rate=50.0, mean_prompt=48, mean_output=14, text=TEXT)
    prompts = torch.tensor([len(r.ids) for r in trace]).double()
    answers = torch.tensor([r.max_new_tokens for r in trace]).double()
    gaps = torch.tensor([b.arrival_s - a.arrival_s for a, b in itertools.pairwise(trace)])
    # four standard errors of the mean, and what cutting the longest takes away
    assert prompts.mean().item() == pytest.approx(48, rel=4 * 0.53 / 4000**0.5 + 0.01)
    assert answers.mean().item() == pytest.approx(14, rel=4 * 0.95 / 4000**0.5 + 0.03)
    assert gaps.mean().item() == pytest.approx(1 / 50, rel=4 / 4000**0.5)
    assert answers.max() <= LONGEST * 14
    assert answers.min() >= 1
    assert answers.quantile(0.95) > 2 * answers.mean(), "no long tail"


def test_prompts_are_stretches_of_the_text():
    for r in request_trace(20, text=TEXT):
        assert torch.equal(r.ids, torch.arange(r.ids[0].item(), r.ids[0].item() + len(r.ids)))


def test_a_trace_that_cannot_be_drawn_is_refused():
    assert request_trace(0) == []
    with pytest.raises(StudyError, match="text has 10 tokens and a prompt may take 192"):
        request_trace(3, text=TEXT[:10])
    with pytest.raises(StudyError, match="give positive numbers"):
        request_trace(3, rate=0.0, text=TEXT)
