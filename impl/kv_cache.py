"""Where keys and values of earlier tokens are kept."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch

from .baseline import hf_generate, serve_one_by_one
from .core import Engine, NotEngaged, technique
from .fidelity import same_tokens

BUCKET = 64  # slots; lengths are rounded up to a multiple, so that few shapes exist


def round_up(length: int, multiple: int = BUCKET) -> int:
    """The smallest multiple of ``multiple`` that holds ``length``."""
    return -(-length // multiple) * multiple


def preallocated(engine: Engine, size: Callable[[int], int] = round_up,
                 spare: int = 0) -> Callable[[int, int], object]:  # fmt: skip
    """``new_cache(batch, max_len)`` that lends preallocated caches and takes them back.

    size   how many slots a cache of ``max_len`` is given: few sizes are few shapes
    spare  slots of memory behind them that belong to no position: nobody writes there

    A cache belongs to its caller until the caller lets go of it; then the next call of the same
    shape gets the same memory.  What an earlier owner left in it is never seen: a query at
    position p reads the slots up to p, all of them written by then.
    """
    from .models.kv_cache import KVCache

    idle: dict[tuple[int, int], list[KVCache]] = defaultdict(list)
    config, dtype, device = engine.model.config, engine.dtype, engine.device

    def new_cache(batch: int, max_len: int) -> KVCache:
        shape = batch, size(max_len)
        if idle[shape]:
            kept = idle[shape].pop()
        else:
            kept = KVCache(config, batch, shape[1] + spare, dtype, device)
            kept.max_len = kept.slots = shape[1]
        lent = copy.copy(kept)  # the same tensors
        weakref.finalize(lent, idle[shape].append, kept)
        engine.stats["kv_bytes"] = kept.nbytes
        return lent

    return new_cache


def _nothing_is_allocated(engine: Engine, run) -> str:
    """A generation fills the cache it is lent and moves none of it; the next one gets the same."""
    from .models.generation import generate

    def addresses(cache):
        return [t.data_ptr() for t in (*cache.keys, *cache.values)]

    cache = engine.new_cache(engine.batch, 16)
    if cache.lockstep:
        raise NotEngaged("the engine hands out caches that grow")
    before = addresses(cache)
    ids = torch.full((engine.batch, 8), 5, device=engine.device)
    model = getattr(engine.model, "eager", engine.model)  # not worth compiling for 16 slots
    generate(model, lambda *_, lent=cache: lent, ids, 8)
    if addresses(cache) != before or not all(k[:, :, :15].any(-1).all() for k in cache.keys):
        raise NotEngaged("a generation wrote its keys somewhere else than in the cache it was lent")
    del cache
    if addresses(engine.new_cache(engine.batch, 16)) != before:
        raise NotEngaged("two generations of one shape used different memory")
    run()
    return f"{engine.stats['kv_bytes']} B of keys and values, at the same addresses in every call"


@technique(phase="replace", replaces="cache", needs={"generate", "lean"}, fidelity=same_tokens,
           effect=_nothing_is_allocated, peer="peer_static_cache")  # fmt: skip
def static_kv_cache(engine: Engine) -> Engine:
    """KV bytes = 2 L B Hkv S D itemsize, allocated once; a step writes one slot and copies none.

    Helps: every step has the same shapes, which compilation and graphs need; no copying of the
    prefix.  Does not when the length is unknown: attention reads all S slots under a mask, so in
    eager mode a short context in a long cache is slower than a growing one.
    Source: gpt-fast, https://pytorch.org/blog/accelerating-generative-ai-2
    """
    engine.new_cache = preallocated(engine)
    return engine


def _static_cache_made(engine: Engine, run) -> str:
    """The cache that transformers' own attention receives has all its slots from the start."""
    lengths: list[int] = []

    def look(_, args, kwargs):
        cache = kwargs.get("past_key_values")
        if type(cache).__name__ == "StaticCache":
            lengths.append(min(layer.max_cache_len for layer in cache.layers))

    hook = engine.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        engine.generate(torch.full((1, 8), 5, device=engine.device), 4)
    finally:
        hook.remove()
    if not lengths or min(lengths) < 11:
        raise NotEngaged("transformers' generate did not use a StaticCache")
    return f"transformers' StaticCache of {lengths[0]} slots in {len(lengths)} forwards"


@technique(phase="load", host="transformers", replaces=("host", "cache"), needs={"generate"},
           fidelity=same_tokens, effect=_static_cache_made)  # fmt: skip
def peer_static_cache(engine: Engine) -> Engine:
    """transformers' ``generate(cache_implementation="static")``.

    transformers compiles the step of a static cache by itself on accelerators, not on CPUs
    (``GenerationConfig.disable_compile``); ``stats["compiled_by_generate"]`` records it.
    Source: https://huggingface.co/docs/transformers/kv_cache#static-cache
    """
    engine.stats["host"] = "transformers"
    engine.stats["compiled_by_generate"] = engine.device.type != "cpu"
    engine.generate = hf_generate(engine.model, cache_implementation="static")
    engine.serve = serve_one_by_one(engine)
    return engine
