"""Defects planted in the captured step: other tokens or a refusal, as a CUDA graph would break."""

from __future__ import annotations

import contextlib

import pytest
import torch

from impl.core import Sampling
from impl.fusion import graphs, steps
from impl.fusion.graphs import GraphStep
from kernels import build
from tests.recorded import Synchronized
from tests.test_graph_step import HOST, captured, lean, prompts


@pytest.fixture
def plant(monkeypatch):
    """``plant(name, function)``: puts a defect into ``GraphStep``; gives an engine that has it."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)

    def planted(name, make, where=GraphStep):
        monkeypatch.setattr(where, name, make(getattr(where, name)))
        return captured(HOST)

    return planted


def goes_wrong(engine, new=12):
    ids = prompts(HOST, 1, 7)
    return not torch.equal(engine.generate(ids, new), lean(HOST).generate(ids, new))


def test_a_number_of_python_s_that_changes_is_noticed(plant):
    def make(hidden):
        def frozen(self, ids, positions, cache):
            at = 7 + self.stats["graph_replays"]  # right when it is captured, and only then
            return hidden(self, ids, torch.full_like(positions, at), cache)

        return frozen

    assert goes_wrong(plant("hidden", make))


def test_inputs_allocated_anew_are_noticed(plant):
    def make(load):
        def elsewhere(graph, ids, positions):
            load(graph, ids, positions)
            graph.ids, graph.positions = graph.ids.clone(), graph.positions.clone()

        return elsewhere

    engine = plant("load", make, where=graphs)
    ids = prompts(HOST, 1, 7)
    drawn = Sampling(temperature=1.0)
    assert not torch.equal(engine.generate(ids, 9, drawn), lean(HOST).generate(ids, 9, drawn))


@pytest.mark.parametrize("read", [
    lambda t: t.max().item(), lambda t: t.tolist(), lambda t: t.nonzero(), lambda t: t[t > 3],
    lambda t: bool(t.any()), lambda t: t.unique(), lambda t: t.numpy(),
], ids=["item", "tolist", "nonzero", "mask", "bool", "unique", "numpy"])  # fmt: skip
def test_a_value_read_on_the_host_is_noticed(plant, read):
    def make(hidden):
        def reading(self, ids, positions, cache):
            read(positions)
            return hidden(self, ids, positions, cache)

        return reading

    engine = plant("hidden", make)
    with pytest.raises(Synchronized, match="not permitted while a stream is captured"):
        engine.generate(prompts(HOST, 1, 7), 12)


@torch.inference_mode()
def test_a_graph_over_another_cache_is_noticed(plant):
    engine = plant("addresses", lambda _: lambda self, cache: ())
    assert not goes_wrong(engine), "over one cache nothing shows"
    first = engine.new_cache(1, 20)  # the same memory again
    second, ids = engine.new_cache(1, 20), prompts(HOST, 1, 8, seed=1)
    engine.model(ids[:, :7], 0, second)
    want = lean(HOST).generate(ids, 9)[:, 8:]
    assert not torch.equal(engine.model.greedy_run(ids[:, 7:], 7, 9, second), want)
    engine.model(ids[:, :7], 0, first)
    assert torch.equal(engine.model.greedy_run(ids[:, 7:], 7, 9, first), want)


def test_a_capture_that_is_not_launched_is_noticed(plant):
    def make(replay):
        def first_is_taken_from_the_capture(self, graph):
            if self.stats["graph_replays"]:
                graph.replay()
            self.stats["graph_replays"] += 1

        return first_is_taken_from_the_capture

    assert goes_wrong(plant("replay", make))


def test_a_step_without_a_defect_passes_where_they_fail(plant):
    assert not goes_wrong(plant("hidden", lambda hidden: hidden))


# ---- CUDA's own capture, its calls alone -----------------------------------------------------


def test_a_capture_follows_calls_on_a_side_stream_whose_inputs_are_set_anew(monkeypatch):
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Inside(contextlib.nullcontext):
        def __init__(self, name, **options):
            super().__init__()
            self.name = name
            log.append(f"enters {name}{''.join(f' {k}={v}' for k, v in options.items())}")

        def __exit__(self, *_):
            log.append(f"leaves {self.name}")

    class Graph:
        def replay(self):
            log.append("replay")

    for name, stand_in in {
        "Stream": Stream, "current_stream": lambda: Stream("current"), "CUDAGraph": Graph,
        "stream": lambda s: Inside(s.name), "device": lambda d: contextlib.nullcontext(),
        "graph": lambda _, **options: Inside("capture", **options),
        "graph_pool_handle": lambda: "pool",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    capture = graphs.CudaGraphs(torch.device("cuda"))
    replay = capture(lambda: log.append("step"), lambda: log.append("before"))
    replay()
    assert log == ["side waits for current", "enters side", *["before", "step"] * graphs.WARM_UPS,
                   "leaves side", "current waits for side",
                   "enters capture pool=pool capture_error_mode=thread_local", "step",
                   "leaves capture", "replay"]  # fmt: skip


def test_the_device_of_the_engine_chooses_between_one_call_and_a_graph(monkeypatch):
    monkeypatch.setattr(graphs, "CudaGraphs", lambda device: f"graphs on {device}")
    monkeypatch.setattr(steps, "step_by_graph", lambda engine, capture: capture)
    monkeypatch.setattr(steps, "step_by_call", lambda engine: "one call")
    engine = lean(HOST)
    assert steps.decode_step(engine) == "one call"
    engine.device = torch.device("cuda:1")
    assert steps.decode_step(engine) == "graphs on cuda:1"
