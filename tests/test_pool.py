"""Engines of a model too large to load per stack share its weights, and cannot spoil them."""

import dataclasses

import pytest
import torch

from impl import core
from impl.core import TECHNIQUES, stack
from impl.models import SPECS, costs
from tests.matrix import Cell
from tests.plugins import pool as pools
from tests.plugins.pool import Pool

EAGER = Cell(stack("eager"), "lm_small", "fp32", 1)
LEAN = EAGER.of("lean_decoder")
IDS = torch.arange(40)[None]


@pytest.fixture
def pool():
    pool = Pool(SPECS, "cpu")
    yield pool
    pool.close_all()


@pytest.fixture
def large(monkeypatch):
    """Any model is too large to load twice."""
    monkeypatch.setattr(pools, "SHARE_FROM", 0)


def scales_a_weight(engine):
    """Where it lies, past autograd's counters."""
    engine = TECHNIQUES["eager"].apply(engine)
    next(engine.model.parameters()).data.mul_(1.5)
    return engine


def addresses(built):
    return {p.data_ptr() for p in built.engine.model.parameters()}


def test_stacks_of_a_large_model_hold_its_weights_once(pool, large):
    eager, lean = (pool.get(c.techniques, c) for c in (EAGER, LEAN))
    once = costs.weight_bytes(eager.engine.model)
    assert addresses(lean) & addresses(eager)
    assert pool.resident_bytes() < 1.2 * once
    assert eager.engine.model is not lean.engine.model


def test_stacks_of_a_small_model_have_their_own(pool):
    eager, lean = (pool.get(c.techniques, c) for c in (EAGER, LEAN))
    assert not addresses(lean) & addresses(eager)


def test_tied_weights_stay_tied(pool, large):
    model = pool.get(EAGER.techniques, EAGER).engine.model
    assert model.lm_head.weight is model.get_input_embeddings().weight


@torch.inference_mode()
def test_who_writes_into_weights_spoils_nobody_elses(pool, large, monkeypatch):
    writes = dataclasses.replace(TECHNIQUES["eager"], name="writes", apply=scales_a_weight)
    monkeypatch.setattr(core, "TECHNIQUES", {**TECHNIQUES, "writes": writes})
    eager = pool.get(EAGER.techniques, EAGER).engine
    before = eager.forward(IDS)
    spoiled = pool.get((writes,), EAGER).engine
    assert torch.equal(eager.forward(IDS), before)
    assert not torch.equal(spoiled.forward(IDS), before), "its own weights it may write"
    later = pool.get(LEAN.techniques, LEAN).engine
    assert (later.forward(IDS) - before).abs().max() < 1e-3 * before.abs().max()


@pytest.mark.parametrize("words", [1, 8, 13])
def test_a_checksum_sees_one_bit(words):
    module = torch.nn.Linear(words, 5, bias=False)
    before = pools.checksums(module)
    with torch.no_grad():
        module.weight.view(torch.int32)[-1, -1] ^= 1
    assert not all(map(torch.equal, pools.checksums(module), before))
