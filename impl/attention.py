"""softmax(q k^T) v: how scores are kept out of memory, and the cache is read once."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .core import Engine, NotEngaged, technique
from .fidelity import same_tokens
from .fusion.norms import in_dtype
from .fusion.proofs import operators_of, operators_of_a_step, remember

PROMPT = 24  # tokens of the prompt that the proof looks into


class Attentions(TorchDispatchMode):
    """Counts the operators that compute attention: ``ours``, ``theirs`` (SDPA or its parts)."""

    def __init__(self):
        super().__init__()
        self.ours = self.theirs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        self.ours += name == "flash_attention"
        self.theirs += name.startswith(("_scaled_dot_product", "scaled_dot_product", "_softmax"))
        self.theirs += name == "_safe_softmax"
        return func(*args, **(kwargs or {}))


def attentions_of_a_prompt(engine: Engine) -> Attentions:
    """Runs a prompt of one row and counts its operators."""
    ids = torch.full((1, PROMPT), 5, device=engine.device)
    with torch.inference_mode(), Attentions() as count:
        engine.model(ids, 0, engine.new_cache(1, PROMPT))
    return count


def _prompts_use_our_operator(engine: Engine, run) -> str:
    """Every layer of a prompt dispatches our operator, none SDPA's, and ``run`` uses it too."""
    if "flash_calls" not in engine.stats:
        raise NotEngaged("no attention of ours is installed on this engine")
    layers = engine.model.config.num_layers
    count = attentions_of_a_prompt(engine)
    if count.ours != layers or count.theirs:
        raise NotEngaged(
            f"a prompt of {layers} layers dispatches {count.ours} flash_attention and "
            f"{count.theirs} operators of another attention"
        )
    before = engine.stats["flash_calls"]
    run()
    calls = engine.stats["flash_calls"] - before
    if not calls:
        raise NotEngaged("the canonical call ran no prompt through flash_attention")
    return f"all {layers} layers of a prompt dispatch flash_attention; {calls} calls in one run"


@technique(phase="replace", needs={"generate", "lean", "attention"}, requires={"kernels"},
           replaces="prompt attention", fidelity=same_tokens,
           effect=_prompts_use_our_operator)  # fmt: skip
def flash_attention(engine: Engine) -> Engine:
    """bytes of attention = q, k, v and y, O(T) where the scores are O(T^2): ours for prompts.

    Prompts whose tokens see one another causally from the start go through ``kernels``'
    flash_attention; steps and prompts under a mask (a window, a prefix in the cache) stay with
    torch's scaled_dot_product_attention, which the plain lean decoder uses throughout and which is
    therefore this technique's baseline.
    Helps long prompts, in bf16 most: torch's CPU kernel multiplies in fp32 there.  Does not at
    short prompts, where attention is a few percent of the work, nor in decode steps.
    Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135
    """
    from kernels.flash_attention import MOST_DIM
    from kernels.flash_attention import flash_attention as flash

    if engine.model.config.head_dim > MOST_DIM:
        return engine
    engine.stats["flash_calls"] = 0

    def replaced(attention):
        plain = attention.attend

        def attend(q, k, v, mask):
            if mask is not None or q.shape[2] == 1 or q.shape[2] != k.shape[2]:
                return plain(q, k, v, mask)
            if not torch.compiler.is_compiling():
                engine.stats["flash_calls"] += 1
            return flash(q, k.to(q.dtype), v.to(q.dtype))  # the dtypes differ under autocast

        return attend

    for layer in engine.model.layers:
        layer.attention.attend = replaced(layer.attention)
        engine.undo.callback(layer.attention.__dict__.pop, "attend", None)
    return engine


# ---- decode steps ------------------------------------------------------------------------

STEP = "study::decode_attention"


def _steps_read_their_spans(engine: Engine, run) -> str:
    """Every layer of a step dispatches our operator, none SDPA's, and ``run``'s steps do too."""
    layers = engine.model.config.num_layers
    if (before := engine.stats.get("unfused", {}).get("decode_attention")) is None:
        raise NotEngaged("decode_attention is not installed on this engine")
    for grows in (True, False):
        step = operators_of_a_step(engine, grows)
        others = sum(n for name, n in step.items() if "scaled_dot_product" in name)
        if step[STEP] != layers or others:
            raise NotEngaged(
                f"a step of {layers} layers dispatches {step[STEP]} decode_attention and {others} "
                "operators of another attention"
            )
    if step.total() >= before.total():
        raise NotEngaged(f"a step dispatches {step.total()} operators, {before.total()} before")
    run()  # whatever is compiled is compiled now
    calls = operators_of(run)[STEP]
    if not calls:
        raise NotEngaged("the canonical call ran no step through decode_attention")
    return (
        f"all {layers} layers of a step dispatch decode_attention, {calls} in one run; over a "
        f"preallocated cache {step.total()} operators a step, {before.total()} with SDPA and a mask"
    )


def slots_seen(positions, tokens: int, cache) -> torch.Tensor | None:
    """(B,) int64: how many of the slots that ``cache.update`` returns each row's query sees.

    None where ``decode_attention`` does not take over: prompts, caches that are no rows of slots,
    and a window within rows that stand at different lengths.
    """
    from .models.kv_cache import GrowingCache, KVCache

    if tokens != 1 or type(cache) not in (KVCache, GrowingCache):
        return None
    if isinstance(positions, torch.Tensor):
        return None if cache.window else positions[:, -1] + 1
    seen = min(positions + 1, cache.window or positions + 1)
    return torch.full((cache.batch,), seen, device=cache.rows.device)


def _packed_steps_do_it_already(names: frozenset[str]) -> str | None:
    """A scheduler that packs its steps has no rows of slots, and an operator of its own."""
    if "continuous_batching" not in names or names & {"static_kv_cache", "torch_compile"}:
        return None
    return (
        "continuous_batching packs its steps, whose single tokens read their own spans by "
        "paged_attention: decode_attention has nothing to do there; leave it out, or add "
        "static_kv_cache"
    )


@technique(phase="replace", needs={"generate", "lean", "attention"}, requires={"kernels"},
           replaces="step attention", fidelity=same_tokens, idle=_packed_steps_do_it_already,
           effect=_steps_read_their_spans)  # fmt: skip
def decode_attention(engine: Engine) -> Engine:
    """time = bytes of the slots in use / bandwidth: a step reads each row's span of the cache once.

    The one query of each row goes through ``kernels``' decode_attention, which is given how many
    slots its row uses: no mask is made, no slot beyond them is read, the queries of a group share
    one read of their keys, and the keys are split over the threads.  Prompts stay as they are.
    Helps long contexts, in bf16 most (a step of `lm_small` at 4,096 tokens 3.1 times as fast, in
    fp32 1.2), and a preallocated cache that is mostly empty, all of whose slots SDPA reads under a
    mask.  Does not at short contexts: at 64 tokens it is as fast as SDPA (0.99, in bf16 1.06).
    ``continuous_batching`` without a static cache does the same by itself, with paged_attention.
    Source: Dao et al. 2023, https://pytorch.org/blog/flash-decoding
    """
    from kernels.decode_attention import decode_attention as over_spans

    model = engine.model
    plain_mask = model.mask
    remember(engine, "decode_attention", grows=False)

    def mask(positions, x, cache=None):
        seen = slots_seen(positions, x.shape[1], cache)
        return plain_mask(positions, x, cache) if seen is None else seen

    def replaced(plain):
        def attend(q, k, v, mask):
            if mask is None or mask.dtype != torch.int64:
                return plain(q, k, v, mask)
            return over_spans(in_dtype(q, k), k, v, mask)

        return attend

    model.mask = mask
    engine.undo.callback(model.__dict__.pop, "mask", None)
    for layer in model.layers:
        layer.attention.attend = replaced(layer.attention.attend)
        engine.undo.callback(layer.attention.__dict__.pop, "attend", None)
    return engine
