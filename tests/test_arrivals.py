"""When does a scheduler see a request, start a batch, and wait for the device?"""

import contextlib
import time

import pytest
import torch

from impl import baseline
from impl.batching import continuous, replay, schedulers
from impl.batching.continuous import serve_continuous
from impl.batching.replay import Arrivals, Clock, Pace
from impl.batching.schedulers import serve_static
from tests.emulated import Behind
from tests.test_serving import check, requests_of, serving, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()


class FakeClock(Clock):
    """Time that passes only when a forward runs (1 s each) or when somebody sleeps."""

    def __init__(self):
        self.time, self.waited = 0.0, 0.0

    def now(self):
        return self.time

    def sleep_until(self, moment):
        self.waited += max(0.0, moment - self.time)
        self.time = max(self.time, moment)


@pytest.mark.parametrize("serve", [serve_static, serve_continuous])
def test_no_request_is_seen_before_it_arrives(model, serve):
    requests = requests_of((5, 4), (6, 3), (4, 8), (7, 2), (3, 3), (9, 5),
                           arrivals=[0.0, 2.5, 2.5, 6.0, 40.0, 41.0])  # fmt: skip
    with serving(model, "continuous_batching", batch=2) as engine:
        clock = FakeClock()

        def look(_, args, options):
            ids = args[0]
            if ids.shape[1] > 1:  # prompts
                now = {tuple(r.ids.tolist()) for r in requests if r.arrival_s <= clock.time}
                for prompt in prompts_in(ids, args[1], options.get("columns")):
                    assert prompt in now, f"prompt of {len(prompt)} seen at {clock.time}"
            clock.time += 1.0

        engine.model.register_forward_pre_hook(look, with_kwargs=True)
        answers = serve(engine, requests, 96, clock)
        check(model, requests, answers)
        assert clock.waited > 10, "it did not wait for the fifth request"


def prompts_in(ids, positions, columns):
    """The prompts of a forward: one a row, padded on the left, or ``columns`` end them in one."""
    if columns is None:
        for row, at in zip(ids, positions, strict=True):
            yield tuple(row[at < len(row)].tolist())
        return
    starts = [0, *(columns + 1).tolist()]
    for start, end in zip(starts, columns.tolist(), strict=False):
        if positions[0, start] == 0:
            yield tuple(ids[0, start : end + 1].tolist())


def test_a_batch_that_is_not_full_starts_after_the_longest_wait(model):
    requests = requests_of((5, 2), (6, 2), (4, 2), arrivals=[0.0, 100.0, 101.0])
    with serving(model, "static_batching", batch=3) as engine:
        patient = serve_static(engine, requests, 96, FakeClock())
        assert all(a.first_token_s >= 101.0 for a in patient)
        hasty = serve_static(engine, requests, 96, FakeClock(), max_wait_s=5.0)
        assert [a.first_token_s for a in hasty] == [5.0, 101.0, 101.0]
        assert engine.stats["mean_batch"] == 1.5


def test_arrivals_come_in_order_and_not_more_than_asked():
    clock = FakeClock()
    arrivals = Arrivals(requests_of((1, 1), (2, 1), (3, 1), arrivals=[3.0, 1.0, 1.0]), clock)
    assert arrivals.take(9) == []
    arrivals.wait()
    assert clock.time == 1.0
    assert [r.id for r in arrivals.take(1)] == [1]
    assert [r.id for r in arrivals.take(9)] == [2]
    arrivals.wait(5)
    assert clock.time == 3.0
    assert [r.id for r in arrivals.take(9)] == [0]
    assert not arrivals


def test_the_host_is_one_step_ahead_of_a_device_and_none_where_a_token_is_due(monkeypatch):
    log = []

    class Event:
        def __init__(self):
            self.number = sum(line.startswith("launched") for line in log)

        def record(self):
            log.append(f"launched {self.number}")

        def synchronize(self):
            log.append(f"waited for {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("waited for all"))
    pace = Pace(torch.device("cuda"))
    for due in (True, False, False, False, True, False):
        pace.step(due)
    assert log == ["waited for all", "launched 0", "launched 1", "waited for 0",
                   "launched 2", "waited for 1", "waited for all", "launched 3"]  # fmt: skip
    Pace(torch.device("cpu")).step(due=False)
    assert len(log) == 8, "a CPU has nothing to wait for"


def test_a_token_is_due_where_a_request_begins_or_ends(model, monkeypatch):
    waits = []
    monkeypatch.setattr(Pace, "step", lambda self, due: waits.append(due))
    with serving(model, "continuous_batching", batch=2) as engine:
        engine.serve(requests_of((4, 5), (6, 3)))
    assert waits == [True, False, True, False, True]


@pytest.fixture
def behind(monkeypatch):
    """``behind(*names)``: an engine whose forwards take a second each on an asynchronous device."""
    device, open_ = Behind(), contextlib.ExitStack()

    def make(*names):
        engine = open_.enter_context(serving(model, *names, batch=2))
        engine.model.register_forward_pre_hook(lambda *_: device.launch(1.0))
        for module in (baseline, continuous, replay, schedulers):
            monkeypatch.setattr(module, "finish", device.finish)
        monkeypatch.setattr(time, "perf_counter", device)
        open_.enter_context(device)
        return device, engine

    model = small_model()
    with open_:
        yield make


def test_one_by_one_tokens_are_there_when_they_are_computed(behind):
    _, engine = behind("lean_decoder")
    answers = engine.serve(requests_of((5, 4), (6, 2)))
    assert [a.first_token_s for a in answers] == [1.0, 5.0]
    assert [a.done_s for a in answers] == [4.0, 6.0]


def test_a_token_that_is_only_launched_is_noticed(behind, monkeypatch):
    _, engine = behind("lean_decoder")
    monkeypatch.setattr(baseline, "finish", lambda device: None)
    answers = engine.serve(requests_of((5, 4), (6, 2)))
    assert [a.first_token_s for a in answers] == [0.0, 4.0]


@pytest.mark.parametrize(
    "names",
    [("static_batching",), ("continuous_batching",), ("continuous_batching", "static_kv_cache")],
    ids="+".join,
)
def test_scheduled_tokens_are_there_when_they_are_computed(behind, names):
    """Prompts first, then a second for each token; nothing is left that is only launched."""
    device, engine = behind(*names)
    launched = []
    engine.model.register_forward_pre_hook(lambda *_: launched.append(device.now + device.pending))
    answers = engine.serve(requests_of((5, 4), (6, 4), (7, 1)))
    assert device.pending == 0.0
    assert max(a.done_s for a in answers) == len(launched)
    for a in answers:
        new = len(a.ids) - {0: 5, 1: 6, 2: 7}[a.id]
        assert a.first_token_s >= 1.0
        assert a.done_s - a.first_token_s >= new - 1
