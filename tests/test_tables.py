"""Cells of a table sampled in the same rounds."""

import json
import random
import time
from types import SimpleNamespace

import pytest

from impl import core
from impl.models import SPECS
from tests.emulated import Ticker
from tests.inner import fresh_pytest
from tests.matrix import Cell
from tests.plugins.budget import Budget, Plan
from tests.plugins.pool import Pool
from tests.plugins.sampler import Limits, WallWatch
from tests.plugins.sides import company_of
from tests.plugins.study import STUDY, KeptRounds
from tests.plugins.tables import AGAIN, Company, Sampling, Sides, TableCell

STACKS = ("eager", "a", "b")


def session(seconds=60.0, stacks=STACKS):
    budget = Budget(seconds)
    budget.plan(Plan(stack, "m", (stack,)) for stack in stacks)
    budget.start()
    budget.begin(stacks[0])
    return SimpleNamespace(budget=budget, rounds=KeptRounds(), precision=0.5, device="cpu",
                           marks=[])  # fmt: skip


class Calls:
    """Calls of stacks, and how often each was made."""

    def __init__(self, **broken):
        self.made, self.broken = {}, broken

    def build(self, stack):
        def call(x):
            self.made[stack] = self.made.get(stack, 0) + 1
            if self.made[stack] > self.broken.get(stack, 1e9):
                raise RuntimeError(f"{stack} broke")
            return sum(range(2000))

        return call

    def table(self, stacks=STACKS):
        """The baseline's A/A cell, then each of the others against it."""
        cells = []
        for stack in stacks:
            names = (stack, stack + AGAIN) if stack == "eager" else (stack, "eager")
            cells.append(TableCell(stack, {name: lambda name=name: self.build(name)
                                           for name in names}))  # fmt: skip
        return cells

    def sides(self, stack):
        calls = {"variant": self.build(stack), "baseline": self.build("eager")}
        return Sides(calls, {"baseline": 1e-5}, {"baseline": "eager"})


def rounds_of(stack, study, calls, table):
    info = {"timing": "wall", "cell": {"techniques": [stack], "model": "m", "precision": "fp32",
                                       "batch": 1, "workload": "w"}}  # fmt: skip
    sampling = Sampling(study, stack)
    rounds = sampling.rounds(info, calls.sides(stack), [0, 1, 2, 3], WallWatch(), table)
    assert sampling.pairs == len(rounds) >= 6
    return info, rounds


def test_the_cells_of_a_table_share_their_rounds():
    study, calls = session(), Calls()
    info, first = rounds_of("eager", study, calls, calls.table())
    made = dict(calls.made)
    assert "sampled_with" not in info
    assert first.seconds["variant"] != first.seconds["baseline"], "an A/A trial has two sides"
    for stack in ("a", "b"):
        info, rounds = rounds_of(stack, study, calls, calls.table()[1:])
        assert info["sampled_with"] == "eager"
        assert rounds.seconds["baseline"] == first.seconds["baseline"]
        assert rounds.seconds["variant"] != first.seconds["variant"]
    assert calls.made == made, "a cell was sampled twice"


def test_a_cell_alone_in_its_table_has_its_own_rounds():
    study, calls = session(), Calls()
    info, _ = rounds_of("a", study, calls, calls.table()[1:2])
    assert "sampled_with" not in info
    assert set(calls.made) == {"a", "eager"}


def test_a_stack_that_cannot_run_is_left_to_its_own_test():
    study, calls = session(), Calls(a=0)
    rounds_of("eager", study, calls, calls.table())
    assert calls.made["a"] == 1
    assert rounds_of("b", study, calls, calls.table()[1:])[0]["sampled_with"] == "eager"
    with pytest.raises(RuntimeError, match="a broke"):
        rounds_of("a", study, calls, calls.table()[1:2])


def test_a_stack_that_breaks_among_the_samples_does_not_take_the_others_along():
    study, calls = session(), Calls(a=3)
    info, _ = rounds_of("eager", study, calls, calls.table())
    assert "sampled_with" not in info
    assert study.marks == ["eager: sampled alone, its table ended in RuntimeError('a broke')"]


def test_as_many_cells_as_fit_are_sampled_together(monkeypatch):
    ticker, tried = Ticker(), []
    monkeypatch.setattr(time, "perf_counter", ticker)
    jitter = random.Random(0)

    def call(x):
        ticker.work(jitter.uniform(0.9, 1.1))

    def limits(cells):
        tried.append(cells)
        return Limits(seconds=28.0)

    company = Company({"eager": call, **dict.fromkeys("abcd", call)}, {})
    company.groups = [["eager", name] for name in "abcd"]
    rounds = company.sample([0], WallWatch(), limits, "eager")
    assert tried == [4, 2]  # 30 s, 18 s
    assert set(rounds.seconds) == {"eager", "a", "b"}
    assert rounds.half_width() < 0.2


# ---- what it costs -----------------------------------------------------------------------


def budget_of(*names, seconds=100.0, **known):
    ticker = Ticker()
    budget = Budget(seconds, clock=ticker, known=known)
    budget.plan(Plan(name, "m", (name,)) for name in names)
    budget.start()
    return budget, ticker


def test_what_is_built_for_a_later_cell_is_its_own_cost():
    budget, ticker = budget_of("a", "b")
    budget.begin("a")
    ticker.work(3.0)  # building and checking a
    ticker.work(20.0)  # building b
    budget.prepay("b", 20.0)
    assert budget.expected("b") == pytest.approx(3.0), "what is left of b: its checks"
    ticker.work(5.0)
    budget.done("a", sampling_s=25.0, pairs=6)
    budget.begin("b")
    ticker.work(2.0)
    budget.done("b", sampling_s=0.0, pairs=6)
    assert budget.fixed == pytest.approx({"a": 3.0, "b": 22.0})


def test_probes_are_not_the_cost_of_the_cell_they_fell_upon():
    budget, ticker = budget_of("a", "b")
    budget.begin("a")
    ticker.work(20.0)
    budget.not_its_own(20.0)
    ticker.work(4.0)
    budget.prepay("b", 1.0)
    assert budget.expected("b") == pytest.approx(3.0)
    budget.done("a", sampling_s=1.0, pairs=6)
    assert budget.fixed == pytest.approx({"a": 3.0})
    assert budget.left() == pytest.approx(76.0), "but the session spent them"


def test_a_cell_with_samples_is_not_refused():
    budget, ticker = budget_of("a", "b", "c", seconds=10.0)
    budget.begin("a")
    budget.prepay("b", 5.0)
    ticker.work(10.1)
    assert budget.begin("b") is None
    assert "leaves 0.0 s" in budget.begin("c")
    ticker.work(1.0)
    assert "leaves 0.0 s" in budget.begin("b"), "the session would never end"


def test_no_cell_is_built_early_that_there_is_no_time_for():
    budget, ticker = budget_of("a", "b", "c", seconds=30.0, b=12.0, c=12.0)
    budget.begin("a")
    ticker.work(8.0)
    assert budget.affords("b")
    ticker.work(8.0)
    budget.prepay("b", 8.0)  # whose checks will take as long as a's: 8 s
    assert not budget.affords("c"), "14 s are left, 8 of them b's"


# ---- the real thing ----------------------------------------------------------------------


@pytest.mark.slow(on_request=True)
def test_a_real_table_has_one_set_of_rounds(tmp_path):
    stacks = "eager,lean_decoder,static_kv_cache"
    done = fresh_pytest(
        "--benchmark-only", "tests/test_latency.py", "-k", "generation", "--models", "lm_small",
        "--profile", "smoke", "--techniques", stacks, "--precisions", "fp32", "--batches", "1",
        "--bench-budget", "20", f"--benchmark-json={tmp_path}/run.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    records = {
        "+".join(b["extra_info"]["cell"]["techniques"]): b["extra_info"]
        for b in json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    }
    assert set(records) == set(stacks.split(","))
    assert {stack: r.get("sampled_with") for stack, r in records.items()} == {
        "eager": None, "lean_decoder": "eager", "static_kv_cache": "eager"
    }  # fmt: skip
    assert len({r["pairs"] for r in records.values()}) == 1
    assert records["eager"]["pairs"] >= 6


def test_nobody_is_measured_early_at_the_cost_of_others():
    """A technique of low precision alone comes early; it does not take its whole table along."""
    names = ("eager", "mixed_precision", "int8_weight_only")
    cells = [Cell(core.stack(name), "lm_small", p, 1) for p in ("fp32", "bf16") for name in names]
    config = SimpleNamespace(study_cells={c.id: c for c in cells},
                             stash={STUDY: session(stacks=[c.id for c in cells])})  # fmt: skip
    items = [
        SimpleNamespace(nodeid=c.id, originalname="test_generation", config=config,
                        callspec=SimpleNamespace(params={"cell": c.id}))
        for c in cells
    ]  # fmt: skip
    for item in items:
        item.session = SimpleNamespace(items=items)
    pool = Pool(SPECS, "cpu")

    def company(cell):
        (item,) = (it for it in items if it.nodeid == cell.id)
        return [c.stack for c in company_of(item, cell, pool).values()]

    assert company(cells[0]) == list(names)
    assert company(cells[4]) == ["mixed_precision"]
    assert company(cells[3]) == ["eager", "int8_weight_only"]
