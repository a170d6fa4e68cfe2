"""A whole step of the decoder as one operator, or as one graph of launches."""

from __future__ import annotations

import os

import torch

from impl.core import GREEDY, Engine, NotEngaged, technique
from impl.fidelity import same_tokens
from impl.kv_cache import preallocated
from impl.machine import finish

from .proofs import PRODUCTS, operators_of


def _one_call_per_step(engine: Engine, run) -> str:
    """Counts torch's operators in a step of the model, and the steps of ``run`` that were fused."""
    if "fused_steps" not in engine.stats:
        raise NotEngaged("no fused step is installed on this engine")
    cache = engine.new_cache(engine.batch, 16)
    ids = torch.full((engine.batch, 1), 5, device=engine.device)
    graphs = "graph_replays" in engine.stats

    def step():
        return engine.model(ids, 0, cache)

    if graphs:
        step()  # captured, if it was not
    seen = operators_of(step)
    if products := sum(seen[name] for name in PRODUCTS):
        raise NotEngaged(f"a step dispatches {products} matrix products one by one")
    counts = ("fused_steps", "graph_replays") if graphs else ("fused_steps",)
    before = [engine.stats[name] for name in counts]
    run()
    steps, *replays = (engine.stats[n] - b for n, b in zip(counts, before, strict=True))
    if not steps:
        raise NotEngaged("the canonical call ran no fused step")
    proof = f"a step dispatches no matrix product; {steps} fused steps in one call"
    if not graphs:
        return proof
    if not replays[0]:
        raise NotEngaged("the canonical call launched no graph")
    kernels = kernels_of(step, engine.device)
    engine.stats["kernels_per_step"] = kernels
    of = "" if kernels is None else f" of {kernels} kernels"
    return f"{proof}, {replays[0]} graph launches{of}"


def kernels_of(call, device: torch.device) -> int | None:
    """Kernels that the profiler sees in ``call()``; None without CUDA, and under Nsight Compute."""
    if device.type != "cuda" or os.environ.get("NCU_CHILD") == "1":
        return None
    finish(device)
    cuda = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=cuda, acc_events=True) as trace:
        call()
        finish(device)
    events = trace.profiler.kineto_results.events()
    names = [e.name() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


MANY_SHORT = 64  # tokens of short rows: beyond, torch's bf16 products are faster than steps


@technique(phase="replace", needs={"generate", "lean"}, requires={"kernels"},
           replaces=("compiler", "prompt attention", "step attention", "norms", "qkv", "mlp"),
           fidelity=same_tokens, effect=_one_call_per_step,
           peer="peer_compiled_static")  # fmt: skip
def decode_step(engine: Engine) -> Engine:
    """time(step) = bytes of weights and cache / bandwidth: the whole step is one call.

    On a CPU a C++ function: steps of up to 16 tokens a row (a token, or a draft to verify) run in
    one parallel region, over the model's own weights in fp32, bf16, int8 or int4; a verified draft
    has the bits of single steps.  Prompts take the same call, with a cache or without, in which
    panels of weights meet many rows at once.  Greedy generation is one call for all its tokens,
    unless somebody wants each as it comes.
    On CUDA a graph: the step is made of our fused kernels and torch's float products over joined
    weights, captured once per batch, tokens of a row and cache, and launched per token.  Greedy
    tokens stay on the device until the last.  Prompts run through the same kernels, uncaptured.
    Helps: small models and small batches, where dispatching hundreds of operators takes longer
    than they do.  Does not where the arithmetic dominates: long prompts and large batches.
    Source: Spector et al. 2025, https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles
    """
    if engine.device.type == "cuda":
        from .graphs import CudaGraphs

        return step_by_graph(engine, CudaGraphs(engine.device))
    return step_by_call(engine)


def step_by_call(engine: Engine) -> Engine:
    """Steps and prompts as one C++ call each."""
    from kernels.decode_step import MOST_TOKENS, DecodeStep

    model, prompt = engine.model, engine.model.forward
    step = DecodeStep(model)
    engine.stats["fused_steps"] = 0

    def takes_whole(ids, positions) -> bool:
        """Whether a forward without a cache is one call: not many short rows, which torch joins."""
        rows, tokens = ids.shape
        few = tokens > MOST_TOKENS or rows * tokens <= MANY_SHORT
        return isinstance(positions, int) and positions == 0 < tokens and few

    def forward(ids, positions=None, cache=None, last_only=False, columns=None):
        positions = 0 if positions is None else positions
        if columns is not None and hasattr(cache, "starts"):  # several requests in one row
            engine.stats["fused_steps"] += 1
            logits = step.packed(ids[0], positions[0], cache.starts, columns, cache.cache)
            return logits[None].to(engine.dtype)
        if columns is not None or (cache is None and not takes_whole(ids, positions)):
            return prompt(ids, positions, cache, last_only, columns)
        engine.stats["fused_steps"] += 1
        return step(ids, positions, cache, last_only).to(engine.dtype)

    return _install(engine, step, forward)


def step_by_graph(engine: Engine, capture) -> Engine:
    """Steps as one graph each, by ``capture`` (see ``graphs``); prompts as they come."""
    from .graphs import SPARE, GraphStep, power_of_two

    model = engine.model
    step = GraphStep(model, capture, engine.stats)
    prompt = model.forward
    engine.stats["fused_steps"] = 0
    if engine.new_cache(1, 1).lockstep:  # caches that come back with the same memory
        most = model.config.max_positions
        engine.new_cache = preallocated(engine, lambda n: power_of_two(n, most), SPARE)

    def forward(ids, positions=None, cache=None, last_only=False, columns=None):
        positions = 0 if positions is None else positions
        if columns is not None or not step.takes(ids, positions, cache, last_only):
            return prompt(ids, positions, cache, last_only, columns)
        engine.stats["fused_steps"] += 1
        return step(ids, positions, cache)

    return _install(engine, step, forward)


def _install(engine: Engine, step, forward) -> Engine:
    """Give the engine's model this ``forward``, and greedy generation all its steps at once."""
    from impl.models.generation import generate as generate_stepwise

    @torch.inference_mode()
    def generate(ids, max_new_tokens, sampling=GREEDY, on_token=None):
        if sampling.temperature or max_new_tokens < 2:
            return generate_stepwise(
                engine.model, engine.new_cache, ids, max_new_tokens, sampling, on_token
            )
        T = ids.shape[1]
        lent = engine.new_cache(len(ids), T + max_new_tokens)
        start = generate_stepwise(engine.model, lambda *_: lent, ids, 1, sampling, on_token)
        rest = greedy_run(start[:, -1:], T, max_new_tokens - 1, lent, on_token)
        return torch.cat((start, rest), 1)

    def greedy_run(token, position, count, cache, on_token=None):
        engine.stats["fused_steps"] += count
        return step.generate(token, position, count, cache, on_token)

    model, own = engine.model, {"forward": forward, "greedy_run": greedy_run}
    model.__dict__.update(own)
    engine.undo.callback(lambda: [model.__dict__.pop(name, None) for name in own])
    engine.generate = generate
    return engine
