"""What a user has today, and what removing overhead alone gives."""

from __future__ import annotations

import time

import torch

from .core import GREEDY, Engine, NotEngaged, Request, Response, Sampling, technique
from .fidelity import bitwise, same_tokens
from .machine import finish


def hf_generate(model, **defaults):
    """``generate`` of the contract through transformers' own ``model.generate``.

    ``defaults`` are passed on to every call (``use_cache=False``, ``assistant_model=...``).
    ``real`` (B, T) is 0 where ids are padding.
    """
    from transformers import GenerationConfig

    def generate(ids, max_new_tokens, sampling: Sampling = GREEDY, on_token=None, real=None):
        drawn = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.temperature
            else {"do_sample": False}
        )
        options = {**drawn, "pad_token_id": 0, "eos_token_id": None, **defaults}
        passed = {k: options.pop(k) for k in ("assistant_model",) if k in options}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, **options
        )
        if sampling.temperature:
            torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            return model.generate(
                ids, attention_mask=torch.ones_like(ids) if real is None else real,
                generation_config=config,
                streamer=_Marks(on_token) if on_token else None, **passed)  # fmt: skip

    return generate


class _Marks:
    """A transformers streamer that hands every new token on and ignores the prompt."""

    def __init__(self, on_token):
        self.on_token, self.started = on_token, False

    def put(self, tokens):
        if self.started:
            self.on_token(tokens.reshape(len(tokens) if tokens.dim() else 1, -1))
        self.started = True

    def end(self):
        pass


def serve_one_by_one(engine: Engine):
    """``serve`` that answers requests in order of arrival, one by one, by ``engine.generate``."""

    def serve(requests: list[Request]) -> list[Response]:
        start, answers = time.perf_counter(), {}
        for request in sorted(requests, key=lambda r: (r.arrival_s, r.id)):
            while time.perf_counter() - start < request.arrival_s:
                time.sleep(0.0005)
            first: list[float] = []

            def mark(_, first=first):
                if not first:
                    finish(engine.device)
                    first.append(time.perf_counter() - start)

            prompt = request.ids[None].to(engine.device)
            ids = engine.generate(prompt, request.max_new_tokens, on_token=mark)[0]
            ids = ids.to(request.ids.device)  # waits for the last token
            now = time.perf_counter() - start
            answers[request.id] = Response(request.id, ids, first[0] if first else now, now)
        return [answers[r.id] for r in requests]

    return serve


def _transformers_at_its_defaults(engine: Engine, run) -> str:
    if not type(engine.model).__module__.startswith("transformers.") and engine.generate:
        raise NotEngaged(f"the model is {type(engine.model).__name__}, not transformers' own")
    if "generate" in engine.spec.needs and engine.generate is None:
        raise NotEngaged("transformers' generate is not installed on the engine")
    if engine.stats.get("host") != "transformers":
        raise NotEngaged("the engine was not set up as transformers' own")
    attention = getattr(getattr(engine.model, "config", None), "_attn_implementation", "none")
    return f"{type(engine.model).__name__}, attention {attention}, {engine.dtype}"


@technique(phase="load", host="transformers", replaces="host", fidelity=bitwise,
           effect=_transformers_at_its_defaults)  # fmt: skip
def eager(engine: Engine) -> Engine:
    """transformers as a user has it: SDPA attention, dynamic cache, inference mode.

    The yardstick of every group.  Helps: nothing to install, every architecture.  Costs: for a
    small model its Python takes longer than its arithmetic.
    Source: Wolf et al. 2020, https://aclanthology.org/2020.emnlp-demos.6
    """
    engine.stats["host"] = "transformers"
    if "generate" in engine.spec.needs:
        engine.generate = hf_generate(engine.model)
        engine.serve = serve_one_by_one(engine)
    return engine


def _recomputes_the_prefix(engine: Engine, run) -> str:
    """Counts the tokens that pass through the first layer while four tokens are generated."""
    seen: list[int] = []
    hook = engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[-1])
    )
    try:
        engine.generate(torch.full((1, 8), 5, device=engine.device), 4)
    finally:
        hook.remove()
    if seen != [8, 9, 10, 11]:
        raise NotEngaged(f"forward passes saw {seen} tokens, not the whole prefix each time")
    return "the whole prefix passes through the model at every step: 8, 9, 10, 11 tokens"


@technique(phase="load", host="transformers", replaces=("host", "cache"), needs={"generate"},
           fidelity=same_tokens, effect=_recomputes_the_prefix)  # fmt: skip
def no_kv_cache(engine: Engine) -> Engine:
    """cost(token n) = cost(forward of n tokens): the prefix is recomputed for every token.

    The KV-cache lesson: keys and values of earlier tokens never change, so keeping them makes
    the cost of a token constant (plus reading the cache) instead of linear in the prefix.
    Source: Pope et al. 2022, https://arxiv.org/abs/2211.05102
    """
    engine.stats["host"] = "transformers"
    engine.generate = hf_generate(engine.model, use_cache=False)
    engine.serve = serve_one_by_one(engine)
    return engine


def _runs_on_the_lean_decoder(engine: Engine, run) -> str:
    from .models.decoder import LeanDecoder

    if not isinstance(engine.model, LeanDecoder) or engine.new_cache is None:
        raise NotEngaged(f"the model is {type(engine.model).__name__}, not LeanDecoder")
    return f"{type(engine.model).__name__}: {engine.model.config.num_layers} layers, shared weights"


@technique(phase="load", replaces="host", needs={"generate", "lean"}, fidelity=same_tokens,
           effect=_runs_on_the_lean_decoder, peer="peer_static_cache")  # fmt: skip
def lean_decoder(engine: Engine) -> Engine:
    """The same weights and arithmetic in a decoder without framework overhead.

    Helps when the step is short against the interpreter's work around it (small models, batch
    1).  Does not when the arithmetic dominates (large models, long prompts).
    Source: gpt-fast, https://pytorch.org/blog/accelerating-generative-ai-2
    """
    from .models.decoder import GrowingCache, from_transformers
    from .models.generation import generate

    engine.model = from_transformers(engine.model)
    config = engine.model.config

    def new_cache(batch, max_len):
        return GrowingCache(config, batch, max_len, engine.dtype, engine.device)

    engine.new_cache = new_cache
    engine.generate = lambda ids, n, sampling=GREEDY, on_token=None: generate(
        engine.model, engine.new_cache, ids, n, sampling, on_token
    )
    engine.serve = serve_one_by_one(engine)
    return engine
