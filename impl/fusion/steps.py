"""A whole step of the decoder as one operator."""

from __future__ import annotations

from impl.core import GREEDY, Engine, NotEngaged, technique
from impl.fidelity import same_tokens

from .proofs import PRODUCTS, operators_of


def _one_operator_per_step(engine: Engine, run) -> str:
    """Counts torch's operators in a step of the model, and the steps of ``run`` that were fused."""
    import torch

    if "fused_steps" not in engine.stats:
        raise NotEngaged("no fused step is installed on this engine")
    cache = engine.new_cache(engine.batch, 16)
    ids = torch.full((engine.batch, 1), 5)
    seen = operators_of(lambda: engine.model(ids, 0, cache))
    if products := sum(seen[name] for name in PRODUCTS):
        raise NotEngaged(f"a step dispatches {products} matrix products one by one")
    before = engine.stats["fused_steps"]
    run()
    steps = engine.stats["fused_steps"] - before
    if not steps:
        raise NotEngaged("the canonical call ran no fused step")
    return f"a step dispatches no matrix product; {steps} fused steps in one call"


MANY_SHORT = 64  # tokens of short rows: beyond, torch's bf16 products are faster than steps


@technique(phase="replace", needs={"generate", "lean"}, requires={"compiler"},
           replaces=("compiler", "prompt attention", "step attention", "norms", "qkv", "mlp"),
           precisions=("fp32", "bf16"), fidelity=same_tokens,
           effect=_one_operator_per_step, peer="peer_compiled_static")  # fmt: skip
def decode_step(engine: Engine) -> Engine:
    """time(step) = bytes of weights and cache / bandwidth: the whole step is one C++ call.

    Steps of up to 16 tokens a row (a token, or a draft to verify) run in one parallel region, over
    the model's own weights in fp32, bf16, int8 or int4; a verified draft has the bits of single
    steps.  Prompts take the same call, with a cache or without, in which panels of weights meet
    many rows at once.  Greedy generation is one call for all its tokens, unless somebody wants
    each as it comes.
    Helps: small models and small batches, where dispatching hundreds of operators takes longer
    than they do.  Does not where the arithmetic dominates: long prompts and large batches.
    Source: Spector et al. 2025, https://hazyresearch.stanford.edu/blog/2025-05-27-no-bubbles
    """
    import torch

    from impl.models.generation import generate as generate_stepwise
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

    own = {"forward": forward, "greedy_run": greedy_run}
    model.__dict__.update(own)
    engine.undo.callback(lambda: [model.__dict__.pop(name, None) for name in own])
    engine.generate = generate
    return engine
