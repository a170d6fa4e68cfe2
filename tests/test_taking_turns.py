"""Models that do not fit together: fewer layers, or turns in memory."""

import gc
import itertools
import json
from pathlib import Path

import pytest
import torch

from impl.core import stack
from impl.models import LAYER_STEP, SPECS, costs, cut_to_fit, footprint_bytes
from tests import matrix
from tests.inner import fresh_pytest
from tests.matrix import Cell, Selection
from tests.plugins import blocks
from tests.plugins.engines import Checks
from tests.plugins.pool import Pool
from tests.plugins.sampler import DoesNotFit, Limits, WallWatch

LARGE = SPECS["llama_8b"]
INT8 = Cell(stack("int8_weight_only"), "lm_small", "fp32", 1)
IDS = torch.arange(40)[None]


# ---- fewer layers ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_of_random_weights_is_cut_to_what_fits_twice(precision):
    have = 22 * 10**9
    cut = cut_to_fit(LARGE, precision, 1, have)
    assert cut.layers % LAYER_STEP == 0
    assert 0 < cut.layers < 32
    assert footprint_bytes(cut, precision, 1) <= have
    assert cut.config["num_hidden_layers"] == cut.layers
    assert cut.config["hidden_size"] == LARGE.config["hidden_size"]
    assert cut.size_note == f" ({cut.layers} of 32 layers)"


def test_what_fits_is_left_alone_and_so_is_what_never_will():
    assert cut_to_fit(LARGE, "bf16", 1, 10**12) == LARGE
    assert cut_to_fit(LARGE, "bf16", 1, 10**9) == LARGE
    assert cut_to_fit(SPECS["lm_small"], "bf16", 1, 10**6) == SPECS["lm_small"]
    assert LARGE.size_note == ""


def test_a_cut_model_runs_and_says_so(monkeypatch):
    cell = Cell(stack("eager"), "llama_1b", "bf16", 1)
    few = footprint_bytes(cut_to_fit(SPECS["llama_1b"], "bf16", 1, 4 * 10**9), "bf16", 1)
    monkeypatch.setattr(matrix, "session_memory", lambda device: few)
    pool = Pool(SPECS, "cpu")
    spec = pool.spec(cell)
    assert matrix.missing(cell, SPECS["llama_1b"]) is None
    engine = pool.get(cell.techniques, cell).engine
    assert len(engine.model.model.layers) == spec.layers < 16
    assert costs.parameters(spec) == sum(p.numel() for p in engine.model.parameters())
    pool.close_all()


# ---- one at a time -----------------------------------------------------------------------


@pytest.fixture
def tight(monkeypatch):
    """Memory for lm_small once in fp32, and not twice."""
    one, two = (footprint_bytes(SPECS["lm_small"], "fp32", 1, copies=n) for n in (1, 2))
    monkeypatch.setattr(matrix, "session_memory", lambda device: (one + two) // 2)


@pytest.fixture
def pool():
    pool = Pool(SPECS, "cpu")
    yield pool
    pool.close_all()


def test_only_stacks_with_weights_of_their_own_take_turns(tight, pool):
    pool.focus(INT8)
    assert pool.one_at_a_time
    pool.focus(INT8.of("lean_decoder"))
    assert not pool.one_at_a_time
    assert matrix.missing(INT8, SPECS["lm_small"]) is None


@torch.inference_mode()
def test_one_engine_is_in_memory_and_each_is_itself(tight, pool):
    apart = Pool(SPECS, "cpu")
    wanted = [apart.get(c.techniques, c).engine.forward(IDS) for c in (INT8, INT8.of("eager"))]
    apart.close_all()
    pool.focus(INT8)
    engines = [pool.get(c.techniques, c).engine for c in (INT8, INT8.of("eager"))]
    for _ in range(2):
        for engine, right in zip(engines, wanted, strict=True):
            assert torch.equal(engine.forward(IDS), right)
            assert len(pool._built) == 1


def test_counters_outlive_their_engine(tight, pool):
    cell = INT8.of("int8_weight_only", "prompt_lookup")
    pool.focus(cell)
    engine = pool.get(cell.techniques, cell).engine
    engine.generate(IDS, 8)
    counted = dict(engine.stats)
    pool.get(stack("eager"), cell).engine.forward(IDS)
    assert counted
    assert engine.stats == counted


def test_checks_pass_in_turns(tight, pool):
    pool.focus(INT8)
    checks = Checks(pool, Selection("smoke"), "cpu")
    evidence = checks.evidence(INT8)
    assert "int8" in evidence.effect
    assert {m["metric"] for m in evidence.quality} >= {"perplexity", "kl"}


# ---- blocks ------------------------------------------------------------------------------


class Turns:
    """Two sides of which one is in memory: a call of the other loads it first."""

    def __init__(self, clock):
        self.clock, self.inside, self.loads = clock, None, 0

    def side(self, name: str, seconds: float, load: float = 5.0):
        def call(_):
            if self.inside != name:
                self.inside, self.loads = name, self.loads + 1
                self.clock.now += load
            self.clock.now += seconds

        return call


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    gc.freeze()  # as a session does: each block collects garbage, a second where much is loaded
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def test_loading_is_never_timed(clock):
    turns = Turns(clock)
    sides = {"variant": turns.side("variant", 0.1), "baseline": turns.side("baseline", 0.2)}
    rounds, dropped = blocks.sample_blocks(sides, [0] * 4, WallWatch(), Limits(400), lambda: 1.0)
    assert not dropped
    assert rounds.ratio().middle == pytest.approx(2)
    assert max(rounds.seconds["baseline"]) == pytest.approx(0.2)
    assert len(rounds) >= 6
    assert turns.loads < 2 * len(rounds) + 1


def test_rounds_on_a_drifting_machine_are_dropped(clock):
    turns = Turns(clock)
    sides = {"variant": turns.side("variant", 0.1), "baseline": turns.side("baseline", 0.2)}
    yardstick = itertools.cycle([1.0, 1.0, 1.0, 1.1]).__next__  # every second block drifts
    rounds, dropped = blocks.sample_blocks(sides, [0] * 4, WallWatch(), Limits(400), yardstick)
    assert dropped == blocks.MOST_ROUNDS
    assert set(rounds.seconds) == {"variant"}, "a time, and nothing to compare it with"


def test_blocks_that_do_not_fit_say_both_numbers(clock):
    turns = Turns(clock)
    sides = {"variant": turns.side("variant", 0.1), "baseline": turns.side("baseline", 0.2)}
    with pytest.raises(DoesNotFit, match=r"six pairs need 7\d s and its share is 20 s"):
        blocks.sample_blocks(sides, [0] * 4, WallWatch(), Limits(20), lambda: 1.0)


@pytest.mark.slow(on_request=True)
def test_a_cell_is_measured_in_turns(tmp_path):
    """The whole way, in a session that believes its memory small."""
    one, two = (footprint_bytes(SPECS["lm_small"], "fp32", 1, copies=n) for n in (1, 2))
    plugin, out = tmp_path / "small_memory.py", tmp_path / "out.json"
    plugin.write_text(
        f"from tests import matrix\nmatrix.session_memory = lambda device: {(one + two) // 2}\n"
        "from tests.plugins import blocks\nblocks.DRIFT = 10\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = fresh_pytest(
        "-p", "small_memory", "--benchmark-only", "--models", "lm_small", "--precisions", "fp32",
        "--batches", "1", "--techniques", "int8_weight_only", "--profile", "smoke",
        "-k", "test_generation", "--bench-budget", "12", f"--benchmark-json={out}",
        PYTHONPATH=f"{tmp_path}:{root}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    run = json.loads(out.read_text())
    (record,) = (b["extra_info"] for b in run["benchmarks"])
    assert record["pairs"] >= 6
    assert any("took turns in memory" in mark for mark in run["conditions"]["marks"])
