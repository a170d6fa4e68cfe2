"""When does a guess pay?"""

import pytest
import torch

from impl.core import stack
from impl.speculative import PromptLookup, speculate
from impl.speculative.drafters import Row
from impl.speculative.payoff import LEARNING_RATE, TRIALS, Payoff
from tests.test_generation import engine_of, prompts, tiny


def payoff_of(k, plain, wide):
    payoff = Payoff(k)
    for _ in range(TRIALS):
        payoff.took(1, plain)
        payoff.took(k + 1, wide)
    return payoff


@pytest.mark.parametrize(("wide", "kept", "pays"), [(2.0, 2, True), (2.0, 0, False),
                                                    (4.9, 4, True), (5.1, 4, False)])  # fmt: skip
def test_a_guess_is_verified_when_it_brings_more_than_it_costs(wide, kept, pays):
    payoff = payoff_of(4, 1.0, wide)
    for _ in range(60):
        payoff.learn("kind", kept)
    assert payoff.worth(["kind"]) is pays


def test_rows_without_a_guess_pay_for_the_others():
    payoff = payoff_of(4, 1.0, 2.5)
    for _ in range(60):
        payoff.learn("kind", 4)
    assert payoff.worth(["kind", None])
    assert not payoff.worth(["kind", None, None])


def test_a_compilation_in_the_first_wide_step_is_forgotten():
    payoff = payoff_of(4, 1.0, 2.0)
    payoff.took(5, 1000.0)
    assert payoff.worth(["kind"])


def test_guesses_that_are_not_verified_are_learned_from():
    payoff = payoff_of(4, 1.0, 100.0)  # never worth it
    row = Row([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], payoff)
    kind, guess = row.guess(4)
    assert guess == [4, 5, 6, 7]
    before = payoff.kept[kind]
    row.extend([4])
    row.extend([5, 9])  # two were right
    assert payoff.kept[kind] == pytest.approx(before + LEARNING_RATE * (2 - before))
    assert not row.copying


def test_costly_verification_is_given_up_and_no_token_changes(monkeypatch):
    target = engine_of(tiny(0), "static_kv_cache")
    ids = prompts(1, 6).repeat(1, 4)
    drafter = PromptLookup(4)
    monkeypatch.setattr(drafter, "took", lambda width, s: drafter.payoff.took(width, width**2))
    for _ in range(2):
        assert torch.equal(target.generate(ids, 40), speculate(target, drafter, ids, 40))
    assert target.stats["drafted"] == 0


def test_the_proof_looks_even_where_guesses_do_not_pay():
    engine = engine_of(tiny(0), "prompt_lookup")
    ids = prompts(1, 6).repeat(1, 4)
    drafter = engine.generate.drafter
    drafter.took = lambda width, seconds: drafter.payoff.took(width, width**2)
    for _ in range(2):
        engine.generate(ids, 40)
    assert not engine.stats["drafted"]
    prove = stack("prompt_lookup")[0].effect
    assert "guesses accepted" in prove(engine, lambda: engine.generate(ids, 40))
    assert engine.stats["drafted"]


def test_where_steps_are_one_call_plain_ones_are_taken_together():
    """Sixteen at a time while a guess may pay, and far more where none ever can."""
    payoff = Payoff(4)
    for _ in range(TRIALS):
        payoff.took(5, 2.0)
    payoff.took(1, 1.0)
    assert payoff.patience() == 16, "five tokens for two steps' time"
    payoff.took(1, 0.4)
    assert payoff.patience() == 64, "five tokens take the time of five steps"
    assert Payoff(4).patience() == 1, "nothing is known yet"


def test_the_rest_is_one_call_where_no_guess_can_pay():
    plain, engine = (
        engine_of(tiny(0), *names) for names in (["decode_step"], ["decode_step", "prompt_lookup"])
    )
    ids = prompts(1, 6).repeat(1, 4)
    drafter, runs, seen = engine.generate.drafter, [], []
    run = engine.model.greedy_run
    engine.model.greedy_run = lambda *args: runs.append(args[2]) or run(*args)
    drafter.took = lambda width, seconds: drafter.payoff.took(width, width**2)
    engine.generate(ids, 60)  # learns what a guess costs
    runs.clear()
    out = engine.generate(ids, 60, on_token=seen.append)
    assert runs == [59]
    assert torch.equal(out, plain.generate(ids, 60))
    assert torch.equal(torch.cat(seen, 1), out[:, ids.shape[1] :])
