"""When sampling may stop and what its ratios claim; when a session must."""

import gc
import itertools
import math
import random
import time

import pytest
import torch

from tests.emulated import Ticker
from tests.plugins import sampler
from tests.plugins.budget import LEEWAY, Budget, Plan, load_costs, save_costs
from tests.plugins.intervals import interval_rank, paired_ratio, verdict
from tests.plugins.sampler import Limits, WallWatch, balanced_orders, sample_rounds
from tests.plugins.study import KeptRounds


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrices(n=160):
    return [torch.randn(n, n, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def product(x):
    return x @ x


def twice(x):
    return x @ x + 0 * (x @ x)


# ---- statistics --------------------------------------------------------------------------


def test_interval_ranks_are_exact():
    """Against the binomial distribution itself, and the values in print."""
    assert [interval_rank(n) for n in (5, 6, 20, 40, 400)] == [0, 1, 6, 14, 180]
    for n in range(6, 80):
        k = interval_rank(n)
        miss = [2 * sum(math.comb(n, i) for i in range(j)) / 2**n for j in (k, k + 1)]
        assert miss[0] <= 0.05 < miss[1]


def test_five_pairs_have_no_interval_and_no_verdict():
    ratio = paired_ratio([2.0] * 5, [1.0] * 5)
    assert (ratio.middle, ratio.low, ratio.high) == (2.0, None, None)
    assert verdict(ratio.low, ratio.high, 0.02) == "ambiguous"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.985, 1.015, "same"),
        (1.005, 1.015, "same"),  # inside the margin, though above 1
        (1.01, 1.05, "faster"),
        (0.9, 0.99, "slower"),
        (0.97, 1.04, "ambiguous"),
        (1.0, 1.04, "ambiguous"),
    ],
)
def test_verdicts(low, high, expected):
    assert verdict(low, high, 0.02) == expected


def test_a_known_ratio_is_found(one_thread):
    limits = Limits(seconds=3.0, precision=0.03, overspend=lambda _: True)  # busy machines too
    rounds = sample_rounds({"variant": product, "baseline": twice}, matrices(), WallWatch(), limits)
    ratio = rounds.ratio()
    assert 1.6 < ratio.middle < 2.6
    assert verdict(ratio.low, ratio.high, 0.06) == "faster"


def false_alarms(trials, seconds):
    """Intervals without 1.0 when the same code is timed against itself."""
    inputs, missed = matrices(48), 0
    gc.freeze()  # as a session does: each trial collects garbage, 0.2 s where much is loaded
    for seed in range(trials):
        limits = Limits(seconds, precision=0.01, shortest=20e-6, overspend=lambda _: True)
        sides = {"variant": product, "baseline": product}
        ratio = sample_rounds(sides, inputs, WallWatch(), limits, seed).ratio()
        missed += not ratio.low <= 1 <= ratio.high
    return missed


def test_same_code_is_neither_faster_nor_slower(one_thread):
    """Honest 95 % intervals miss more than 9 of 60 in 0.1 % of runs."""
    assert false_alarms(60, 0.01) <= 9


@pytest.mark.slow
def test_false_alarms_stay_below_five_percent(one_thread):
    """28 of 400: what intervals that miss 5 % exceed in 3 % of runs, ours in fewer."""
    assert false_alarms(400, 0.01) <= 28


def test_intervals_cover_what_they_claim_under_bursts_of_load():
    """Samples with bursts and drift that fall on both sides alike: coverage 93 % or more."""
    rng, covered = random.Random(1), 0
    for _ in range(600):
        variant, baseline = [], []
        for i in range(40):
            burst = rng.choice((1, 1, 1, 4)) * (1 + i / 100)
            variant.append(burst * rng.lognormvariate(0, 0.1))
            baseline.append(burst * 1.3 * rng.lognormvariate(0, 0.1))
        ratio = paired_ratio(baseline, variant)
        covered += ratio.low <= 1.3 <= ratio.high
    assert covered >= 0.93 * 600


def test_all_sides_get_the_same_inputs_in_random_order(monkeypatch):
    ticker, seen = Ticker(), []
    monkeypatch.setattr(time, "perf_counter", ticker)

    def side(name, seconds):
        def call(x):
            seen.append((name, x))
            ticker.now += seconds

        return call

    sides = {"variant": side("variant", 1.0), "baseline": side("baseline", 2.0),
             "without": side("without", 1.5), "peer": side("peer", 1.0)}  # fmt: skip
    rounds = sample_rounds(sides, range(9), WallWatch(), Limits(seconds=1000, precision=0.001))
    taken = seen[-4 * len(rounds) :]
    orders = set()
    for four in zip(*[iter(taken)] * 4, strict=True):
        assert {name for name, _ in four} == set(sides)
        assert len({x for _, x in four}) == 1
        orders.add(tuple(name for name, _ in four))
    assert len(orders) > 6
    assert rounds.stop == "precise"
    assert len(rounds) == 24
    assert [rounds.ratio(s).middle for s in ("baseline", "without", "peer")] == pytest.approx(
        [2.0, 1.5, 1.0]
    )


def test_who_comes_first_decides_nothing(monkeypatch):
    """The same code, 2 % slower for who finds the inputs cold: hardly ever a narrow interval
    beside 1, though sampling ends when an interval is narrow."""
    ticker, noise, sides = Ticker(), random.Random(2), ("variant", "baseline")
    monkeypatch.setattr(time, "perf_counter", ticker)
    calls = itertools.count()

    def call(x):
        ticker.now += (1.02 if next(calls) % 2 == 0 else 1.0) * noise.lognormvariate(0, 0.002)

    missed = 0
    for seed in range(200):
        limits = Limits(seconds=200, precision=0.009, known=dict.fromkeys(sides, 1.0))
        ratio = sample_rounds(dict.fromkeys(sides, call), [0], WallWatch(), limits, seed).ratio()
        missed += not ratio.low <= 1 <= ratio.high
    assert missed <= 10


@pytest.mark.parametrize("rounds", [2, 8])
def test_every_order_of_a_chunk_comes_reversed_too(rounds):
    slots = ["variant", "baseline", "baseline", "peer"]
    orders = balanced_orders(slots, rounds, random.Random(3))
    assert len(orders) == rounds
    assert all(sorted(order) == sorted(slots) for order in orders)
    assert sorted(orders) == sorted(order[::-1] for order in orders)
    assert orders != balanced_orders(slots, rounds, random.Random(4))


def test_the_share_ends_a_cell_and_six_pairs_must_fit(monkeypatch):
    ticker = Ticker()
    monkeypatch.setattr(time, "perf_counter", ticker)
    jitter = random.Random(0)

    def call(x):
        ticker.now += jitter.uniform(0.5, 1.5)

    sides = {"variant": call, "baseline": call}
    rounds = sample_rounds(sides, [0], WallWatch(), Limits(seconds=40, precision=1e-6))
    assert rounds.stop == "budget"
    assert 38 < ticker.now < 44
    with pytest.raises(sampler.DoesNotFit, match="six pairs need"):
        sample_rounds(sides, [0], WallWatch(), Limits(seconds=5))
    allowed = Limits(seconds=5, overspend=lambda needs: needs < 100)
    assert len(sample_rounds(sides, [0], WallWatch(), allowed)) == 6


def test_a_quick_side_is_called_at_several_moments_of_a_round(monkeypatch):
    ticker, order, ends, times = Ticker(), [], [], itertools.cycle([0.01, 0.03])
    monkeypatch.setattr(time, "perf_counter", ticker)

    def slow(x):
        order.append("slow")
        ticker.work(1.0)

    def quick(x):
        order.append("quick")
        ticker.work(next(times))

    limits = Limits(seconds=30.0, precision=1e-9, pause=lambda: ends.append(len(order)) or 0.0)
    sides = {"quick": quick, "slow": slow, "slow too": slow}
    rounds = sample_rounds(sides, [0], WallWatch(), limits, reference="slow")
    often = sampler.samples_per_round({"quick": 0.01, "slow": 1.0, "slow too": 1.0})
    assert often == {"quick": 8, "slow": 1, "slow too": 1}
    assert rounds.seconds["slow"] == pytest.approx([1.0] * len(rounds))
    assert rounds.seconds["quick"] == pytest.approx([0.02] * len(rounds)), "not the mean of them"
    in_rounds = [order[a:b] for a, b in itertools.pairwise(ends)]
    assert all(calls.count("quick") == 8 and calls.count("slow") == 2 for calls in in_rounds)
    places = [calls.index("slow") for calls in in_rounds]
    assert any(0 < place < 7 for place in places), "quick calls all at one moment"


def test_quick_sides_fill_more_of_a_round_where_there_is_time():
    """Of 20 rounds, or of rounds whose quick sides take half as much."""
    quickest = {"quick": 0.04, "slow": 0.96}
    assert sampler.samples_per_round(quickest, seconds=22.0) == {"quick": 2, "slow": 1}
    assert sampler.samples_per_round(quickest, seconds=20.0) == {"quick": 1, "slow": 1}


# ---- budget ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("seconds", [20, 40, 600])
def test_the_budget_ends_the_selection(seconds, seed):
    """94 cells whose building takes 0 to 20 s: never 5 % late, no cell unaccounted."""
    rng, ticker = random.Random(seed), Ticker()
    heavy = rng.choice((0.0, 0.05, 1.0))  # mean seconds of building
    builds = [min(20.0, rng.expovariate(1 / heavy)) if heavy else 0.0 for _ in range(94)]
    names = [f"cell{i}" for i in range(94)]
    budget = Budget(seconds, clock=ticker, known=dict(zip(names, builds, strict=True)))
    budget.plan(Plan(n, f"model{i % 5}", (f"t{i % 40}",)) for i, n in enumerate(names))
    budget.start()
    ran, refused = [], []
    for name, build in zip(names, builds, strict=True):
        if budget.begin(name):
            refused.append(name)
            budget.done(name, 0.0)
            continue
        ticker.work(build)
        share = budget.share(name)
        needs = rng.uniform(0.001, 0.1)
        if needs > share and not budget.may_overspend(name, needs):
            refused.append(name)
            budget.done(name, 0.0)
            continue
        took = max(needs, share * rng.choice((0.2, 1.0)))  # precise early, or its whole share
        ticker.work(took)
        ran.append(name)
        budget.done(name, took, 20)
    assert len(ran) + len(refused) == 94
    assert ticker.now <= seconds * (1 + LEEWAY)
    assert not (heavy == 0 and refused)


def test_a_cell_named_by_hand_is_never_refused():
    ticker = Ticker()
    budget = Budget(1, clock=ticker)
    budget.plan([Plan("a", "m", ("t",), by_name=True), Plan("b", "m", ("t",))])
    budget.start()
    ticker.work(2)
    assert budget.begin("a") is None
    assert budget.may_overspend("a", 100)
    assert "raise --bench-budget" in budget.begin("b")


def test_a_new_technique_may_take_more_than_its_share():
    budget = Budget(100, clock=Ticker())
    budget.plan([Plan("a", "m", ("new",)), Plan("b", "m", ("new",)), Plan("c", "m", ("new",))])
    assert budget.may_overspend("a", 50)
    budget.done("a", 1.0, pairs=6)
    assert not budget.may_overspend("b", 50)
    assert budget.may_overspend("b", 30)  # less than an equal part of the whole


def test_the_last_cells_leave_less_for_nobody():
    budget = Budget(100, clock=Ticker())
    budget.plan([Plan("a", "m", ("t",)), Plan("b", "m", ("t",))])
    budget.start()
    assert budget.share("a") == pytest.approx(0.8 * 100 / 2)
    assert budget.share("a", cells=2) == pytest.approx(0.9 * 100)


def test_what_is_built_early_is_expected_to_need_the_rest_of_what_it_needed_before():
    """Not as much as the first cell, which loads the model and everything it is held against."""
    ticker = Ticker()
    budget = Budget(100, clock=ticker, known={"b": 12.0})
    budget.plan([Plan(name, "m", ("t",)) for name in "abc"])
    budget.begin("a")
    ticker.work(30)
    budget.prepay("b", 8.0)
    budget.prepay("c", 8.0)
    assert budget.expected("b") == pytest.approx(4.0)
    assert budget.expected("c") == pytest.approx(22.0)


def test_costs_of_earlier_runs_are_remembered(tmp_path):
    path = tmp_path / "machine" / "costs.json"
    save_costs(path, {"a": 1.0})
    save_costs(path, {"b": 2.0})
    assert load_costs(path) == {"a": 1.0, "b": 2.0}
    path.write_text("{")
    assert load_costs(path) == {}


# ---- rounds that serve two cells ---------------------------------------------------------


def kept_rounds(pairs=8):
    kept = KeptRounds()
    times = {stack: [float(i + n) for n in range(pairs)]
             for i, stack in enumerate(("ours", "eager", "theirs"), 1)}  # fmt: skip
    kept.keep(PLACE, "wall", "ours", times)
    return kept, times


PLACE = {"model": "m", "precision": "fp32", "batch": 1, "workload": "w"}
PEERS_SIDES = {"variant": "theirs", "baseline": "eager"}


def test_a_peer_takes_its_samples_from_the_rounds_it_stood_in():
    kept, times = kept_rounds()
    whose, rounds = kept.find(PLACE, "wall", PEERS_SIDES)
    assert whose == "ours"
    assert rounds.seconds == {"variant": times["theirs"], "baseline": times["eager"]}


@pytest.mark.parametrize(
    ("place", "timing", "sides"),
    [
        ({"workload": "another"}, "wall", PEERS_SIDES),
        ({"batch": 8}, "wall", PEERS_SIDES),
        ({"precision": "bf16"}, "wall", PEERS_SIDES),
        ({}, "event", PEERS_SIDES),
        ({}, "wall", {**PEERS_SIDES, "without": "lean"}),
        ({}, "wall", {"variant": "eager again", "baseline": "eager"}),
    ],
)
def test_other_work_or_other_sides_are_sampled_anew(place, timing, sides):
    assert kept_rounds()[0].find({**PLACE, **place}, timing, sides) is None


def test_too_few_rounds_serve_no_second_cell():
    assert kept_rounds(pairs=5)[0].find(PLACE, "wall", PEERS_SIDES) is None
