"""The captured decode step: the decoder's tokens, though nothing but memory changes between steps.

On a CPU graphs are recorded operators (``tests/recorded.py``); the same tests run over CUDA graphs
where a GPU is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from impl.core import GREEDY, TECHNIQUES, Engine, NotEngaged, Sampling, stack
from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.fusion.graphs import MOST_GRAPHS, CudaGraphs, GraphStep
from impl.fusion.steps import kernels_of, step_by_graph
from impl.models.generation import generate
from impl.models.kv_cache import GrowingCache, KVCache
from impl.speculative import PromptLookup, speculate
from kernels import build
from kernels.op import KernelError, Op
from tests import kernel_tools
from tests.recorded import Recorder
from tests.test_decode_step import SHAPES, decoder
from tests.test_generation import Oracle
from tests.test_serving import TRACES
from tests.tiny import SPEC


@dataclass
class Place:
    """Where graphs are made: ``captures()`` gives a new way to capture."""

    device: torch.device
    captures: Callable


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request) -> Place:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device; this machine has none")
        device = torch.device("cuda")
        return Place(device, lambda: CudaGraphs(device))
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    return Place(torch.device("cpu"), Recorder)


HOST = Place(torch.device("cpu"), Recorder)


def lean(place, *names, dtype=torch.float32, batch=1, **shape) -> Engine:
    """An engine of the lean decoder, its choices far from ties, with what is named applied."""
    model = decoder(**{"max_positions": 512} | shape)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(3.0)
    model = model.requires_grad_(False).to(place.device, dtype)
    engine = Engine(SPEC, model, dtype, place.device, batch)
    engine.new_cache = lambda rows, slots: GrowingCache(
        model.config, rows, slots, dtype, place.device
    )
    engine.generate = lambda ids, n, sampling=GREEDY, on_token=None: generate(
        engine.model, engine.new_cache, ids, n, sampling, on_token
    )
    for t in stack(*names):
        engine = t.apply(engine)
    return engine


def captured(place, *names, **options) -> Engine:
    return step_by_graph(lean(place, *names, **options), place.captures())


def prompts(place, batch, length, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 300, (batch, length), generator=source).to(place.device)


# ---- the same tokens ---------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "batch"), [*product(SHAPES, (1, 3)), ("grouped", 5)])
def test_tokens_are_those_of_the_decoder(place, shape, batch):
    """One generation after another, of other lengths, over graphs that are captured once."""
    plain, graph = (make(place, **SHAPES[shape]) for make in (lean, captured))
    for prompt, new in ((7, 20), (1, 9), (33, 2), (17, 12)):
        ids, seen = prompts(place, batch, prompt, seed=prompt), []
        want = plain.generate(ids, new)
        assert torch.equal(graph.generate(ids, new), want)
        assert torch.equal(graph.generate(ids, new, on_token=seen.append), want)
        assert torch.equal(torch.cat(seen, 1), want[:, prompt:])
    steps = 19 + (1 + 8) + 1 + 11  # a prompt of one token is a step, too
    assert graph.stats["graph_replays"] == graph.stats["fused_steps"] == 2 * steps
    assert graph.stats["graphs_captured"] == 2, "a cache that is given back is the next one's"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampling", [Sampling(0.9), Sampling(0.7, 0.8, seed=3)])
def test_drawn_tokens_are_those_of_the_decoder(place, sampling, batch):
    plain, graph = lean(place), captured(place)
    for prompt in (5, 19):
        ids = prompts(place, batch, prompt)
        assert torch.equal(graph.generate(ids, 12, sampling), plain.generate(ids, 12, sampling))
    assert graph.stats["graph_replays"] == 2 * 11


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["int8_weight_only", "int8_dynamic", "int4_weight_only_g32",
                                  "int4_dynamic_g32", "fp8_dynamic"])  # fmt: skip
def test_quantized_layers_are_the_engine_s_own(place, name, batch):
    """Joined or, where int4 does not end between blocks, apart."""
    if reason := _lacks(name, place):
        pytest.skip(reason)
    for inner in (160, 200):
        plain, graph = (make(place, name, intermediate_size=inner) for make in (lean, captured))
        ids = prompts(place, batch, 9)
        assert torch.equal(graph.generate(ids, 16), plain.generate(ids, 16))
        assert graph.stats["graph_replays"] == 15


def _lacks(name, place):
    from impl.machine import lacks

    return next(
        filter(None, (lacks(r, str(place.device)) for r in TECHNIQUES[name].requires)), None
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.inference_mode()
def test_low_precision_is_rounded_as_the_decoder_s(place, precision, shape):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    plain, graph = (make(place, dtype=dtype, **SHAPES[shape]) for make in (lean, captured))
    ids, logits = prompts(place, 2, 12), []
    for engine in (plain, graph):
        cache = engine.new_cache(2, 16)
        engine.model(ids[:, :9], 0, cache)
        logits.append(torch.cat([engine.model(ids[:, i : i + 1], i, cache) for i in (9, 10, 11)]))
    assert logits[1].dtype == dtype
    assert sqnr_db(*logits) >= ROUNDING_DB[precision]


# ---- drafts to verify ----------------------------------------------------------------------


@pytest.mark.parametrize("spare", [True, False], ids=["spare_slots", "full_cache"])
@pytest.mark.parametrize("shape", ["grouped", "window"])
@pytest.mark.parametrize("batch", [1, 3])
def test_verified_drafts_are_the_single_steps(place, batch, shape, spare):
    """Right and wrong guesses, rows apart, up to the last slot of a cache."""
    plain, graph = (make(place, **SHAPES[shape]) for make in (lean, captured))
    if not spare:
        graph.new_cache = lambda rows, slots: KVCache(
            graph.model.config, rows, slots, device=place.device
        )
    ids = prompts(place, batch, 7)
    want = plain.generate(ids, 24)

    def answer(b, p):  # every third guess of every other row is wrong
        return int(want[b, min(7 + p, 30)] + ((p + b) % 3 == 0)) % 300

    for drafter in (Oracle(4, answer), PromptLookup(4)):
        assert torch.equal(speculate(graph, drafter, ids, 24), want)
    assert {key[2] for key in graph_step(graph).graphs} >= {5}, "k + 1 tokens are a graph"


def graph_step(engine) -> GraphStep:
    """The step behind an engine's ``greedy_run``."""
    cells = engine.model.greedy_run.__closure__
    return next(c.cell_contents for c in cells if isinstance(c.cell_contents, GraphStep))


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@torch.inference_mode()
def test_a_step_of_several_tokens_has_the_logits_of_single_ones(place, tokens):
    plain, graph = lean(place), captured(place)
    ids = prompts(place, 2, 40)
    cache = graph.new_cache(2, 64)
    graph.model(ids[:, :20], 0, cache)
    at = torch.arange(20, 20 + tokens, device=place.device).expand(2, -1)
    for _ in range(2):  # captured, and launched again
        got = graph.model(ids[:, 20 : 20 + tokens], at, cache)
    want = plain.model(ids[:, : 20 + tokens])[:, 20:]
    assert sqnr_db(want, got) >= ROUNDING_DB["fp32"]
    assert graph.stats["graph_replays"] == 2


# ---- memory --------------------------------------------------------------------------------


@torch.inference_mode()
def test_caches_lent_at_once_are_graphs_of_their_own(place):
    plain, graph = lean(place), captured(place)
    ids = [prompts(place, 1, 9, seed) for seed in range(3)]
    caches = [graph.new_cache(1, 40) for _ in ids]
    starts = [graph.model(x, 0, c)[:, -1:].argmax(-1) for x, c in zip(ids, caches, strict=True)]
    runs = [graph.model.greedy_run(first, 9, 6, cache) for first, cache in
            zip(starts, caches, strict=True)]  # fmt: skip
    more = [graph.model.greedy_run(run[:, -1:], 15, 6, cache) for run, cache in
            zip(runs, caches, strict=True)]  # fmt: skip
    for x, start, run, rest in zip(ids, starts, runs, more, strict=True):
        assert torch.equal(torch.cat((x, start, run, rest), 1), plain.generate(x, 13))
    assert graph.stats["graphs_captured"] == 3


def test_few_graphs_are_kept(place):
    """Caches that are never given back, as those that grow: the oldest graph makes room."""
    plain, graph = lean(place), captured(place)
    graph.new_cache = plain.new_cache
    ids = prompts(place, 1, 5)
    for _ in range(MOST_GRAPHS + 3):
        assert torch.equal(graph.generate(ids, 4), plain.generate(ids, 4))
    assert len(graph_step(graph).graphs) == MOST_GRAPHS


def test_longer_rotary_tables_leave_older_graphs_right(place, monkeypatch):
    from impl.models import decoder as lean_decoder

    monkeypatch.setattr(lean_decoder, "TABLE_POSITIONS", 64)
    plain, graph = lean(place), captured(place)
    for length in (5, 300, 5):
        ids = prompts(place, 1, length)
        assert torch.equal(graph.generate(ids, 8), plain.generate(ids, 8))
    assert graph.stats["graphs_captured"] == 2


def test_a_prompt_and_a_forward_without_a_cache_are_not_captured(place):
    plain, graph = lean(place), captured(place)
    ids = prompts(place, 2, 20)
    with torch.inference_mode():
        assert sqnr_db(plain.model(ids), graph.model(ids)) >= ROUNDING_DB["fp32"]
        columns = torch.tensor([3, 19], device=place.device)
        assert (
            sqnr_db(plain.model(ids, columns=columns), graph.model(ids, columns=columns))
            >= (ROUNDING_DB["fp32"])
        )
    assert graph.stats["graphs_captured"] == graph.stats["graph_replays"] == 0


# ---- who else calls the step ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["static_batching", "continuous_batching"])
@pytest.mark.parametrize("trace", ["more requests than slots", "no token for one",
                                   "late arrivals"])  # fmt: skip
def test_requests_get_the_tokens_they_get_alone(place, name, trace):
    plain, graph = lean(place), captured(place, batch=3)
    (scheduler,) = stack(name)
    graph = scheduler.apply(graph)
    answers = graph.serve(TRACES[trace])
    for request, answer in zip(TRACES[trace], answers, strict=True):
        ids = request.ids[None].to(place.device)
        want = plain.generate(ids, request.max_new_tokens)[0]
        assert torch.equal(answer.ids, want.to(answer.ids.device))
    assert graph.stats["graph_replays"] > 0
    # a step keeps its width; a batch is lent its cache while that of the one before is held
    assert graph.stats["graphs_captured"] <= (2 if name == "static_batching" else 1)


# ---- proofs --------------------------------------------------------------------------------


def test_the_proof_counts_graph_launches(place):
    graph, ids = captured(place, batch=2), prompts(place, 2, 20)
    prove = TECHNIQUES["decode_step"].effect
    proof = prove(graph, lambda: graph.generate(ids, 12))
    assert "11 fused steps in one call, 11 graph launches" in proof
    assert (graph.stats["kernels_per_step"] is None) == (place.device.type == "cpu")
    with pytest.raises(NotEngaged, match="ran no fused step"):
        prove(graph, lambda: graph.model(ids))
    graph.undo.close()
    with pytest.raises(NotEngaged, match="matrix products one by one"):
        prove(graph, lambda: graph.generate(ids, 12))


def test_steps_that_are_counted_but_not_launched_are_noticed(place):
    graph = captured(place)

    def run():
        graph.stats["fused_steps"] += 1

    with pytest.raises(NotEngaged, match="launched no graph"):
        TECHNIQUES["decode_step"].effect(graph, run)


def recorded_step(layers, kind, **shape):
    """The recording of a step of this kind: ``greedy`` or ``logits``."""
    record = Recorder()
    engine = captured(Place(HOST.device, lambda: record), num_layers=layers, **shape)
    engine.generate(prompts(HOST, 1, 5), 3, Sampling(temperature=float(kind == "logits")))
    return record.graphs[-1].kernels()


@pytest.mark.skipif(bool(build.lacks_compiler()), reason=build.lacks_compiler() or "")
@pytest.mark.parametrize(("shape", "a_layer"), [("grouped", 11), ("qk_norm", 14), ("odd", 11)])
def test_a_layer_is_so_many_launches(shape, a_layer):
    """Two norms, four products, rope, two writes to the cache, attention, SwiGLU; no more."""
    two, three = (recorded_step(n, "greedy", **SHAPES[shape]) for n in (2, 3))
    assert three.total() - two.total() == a_layer
    assert two["mm"] + two["addmm"] == 2 * 4
    assert two.total() - 2 * a_layer <= 9


@pytest.mark.gpu
def test_a_launch_has_fewer_than_half_the_kernels_of_the_decoder_s_step():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; this machine has none")
    device = torch.device("cuda")
    place = Place(device, lambda: CudaGraphs(device))
    counts = []
    for make in (lean, captured):
        engine = make(place, num_layers=8)
        cache, ids = engine.new_cache(1, 64), prompts(place, 1, 1)
        with torch.inference_mode():
            for _ in range(2):
                engine.model(ids, 5, cache)
            counts.append(kernels_of(lambda e=engine, c=cache, i=ids: e.model(i, 5, c), device))
    assert 0 < 2 * counts[1] < counts[0]


@pytest.mark.parametrize("name", [None, "int8_weight_only", "int8_dynamic", "int4_weight_only_g32"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("shape", ["grouped", "qk_norm"])
@torch.inference_mode()
def test_the_kernels_of_cuda_take_what_the_step_gives_them(name, batch, tokens, shape, monkeypatch):
    """Views, strides and alignment of a step, by the CUDA kernels themselves on the host shim."""
    if reason := kernel_tools.lacks_shim():
        pytest.skip(reason)
    sizes = {"num_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
             "num_kv_heads": 1, "head_dim": 16} | SHAPES[shape]  # fmt: skip
    names = (name,) if name else ()
    plain, graph = lean(HOST, *names, **sizes), lean(HOST, *names, **sizes)
    graph = step_by_graph(graph, lambda step, before: step)  # nothing but the launches
    cache, ids = graph.new_cache(batch, 16), prompts(HOST, batch, 5 + tokens)
    graph.model(ids[:, :5], 0, cache)
    at = torch.arange(5, 5 + tokens).expand(batch, -1)
    ran = []

    def launched(op, *args, impl=None):
        op.check(*args)
        ran.append(op.name)
        return op.functions["cuda"](*args)

    with kernel_tools.host_shim(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", launched)
        got = graph.model(ids[:, 5:], at, cache)
        if tokens == 1:
            cache_of_greedy = graph.new_cache(batch, 16)
            graph.model.greedy_run(ids[:, :1], 0, 1, cache_of_greedy)
    want = plain.model(ids)[:, 5:]
    # an activation on the edge between two int8 values may fall either way
    assert sqnr_db(want, got) >= ROUNDING_DB["fp32" if name != "int8_dynamic" else "bf16"]
    assert {"rms_norm", "add_rms_norm", "rope", "decode_attention", "swiglu"} <= set(ran)
    assert ("lm_head_argmax" in ran) == (tokens == 1 and not name)


# ---- refusals --------------------------------------------------------------------------------


@torch.inference_mode()
def test_what_it_does_not_hold_is_one_sentence(place):
    def step(**shape):
        return GraphStep(decoder(**shape).to(place.device), place.captures())

    with pytest.raises(KernelError, match="leave it out for a mixture of experts"):
        step(num_experts=2, experts_per_token=1)
    with pytest.raises(KernelError, match=r"float16, not torch.float64; take --precisions bf16"):
        GraphStep(decoder(torch.float64).to(place.device), place.captures())
    odd = decoder()
    odd.layers[0].mlp.up_proj = torch.nn.Bilinear(3, 3, 3)
    with pytest.raises(KernelError, match=r"not the Bilinear at layers.0.mlp.up_proj; leave one"):
        GraphStep(odd.to(place.device), place.captures())
    engine = captured(place)
    ids = prompts(place, 2, 1)
    cache = KVCache(engine.model.config, 1, 8, device=place.device)
    with pytest.raises(KernelError, match="holds 1 rows, the ids have 2; ask new_cache for 2"):
        engine.model(ids, 0, cache)
    one = ids[:1]
    with pytest.raises(KernelError, match="position 8 is outside the cache of 8 slots; ask new"):
        engine.model(one, 8, cache)
    with pytest.raises(KernelError, match="9 tokens from position 0 on do not fit into the cache"):
        engine.model.greedy_run(one, 0, 9, cache)
    with pytest.raises(KernelError, match="preallocated KVCache, not to Other; leave one"):
        engine.model(one, 0, type("Other", (KVCache,), {})(engine.model.config, 1, 8))
    half = KVCache(engine.model.config, 1, 8, torch.float16, place.device)
    with pytest.raises(KernelError, match=r"the model's torch.float32, not torch.float16; ask"):
        engine.model(one, 0, half)
