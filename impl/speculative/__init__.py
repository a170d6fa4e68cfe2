"""Several tokens per pass over the weights: guess, verify in one forward, keep what agrees.

A step feeds the last token and k guesses; the target's logits at all k + 1 places come from one
forward.  Guesses are kept up to the first that the target would not have emitted, and one token
of the target's own follows.  Rows of a batch accept different numbers: each stands at its own
position, and a rejected guess needs no erasing because its slots are written again.

Expected tokens per pass with acceptance rate a: (1 - a^(k+1)) / (1 - a).

Randomness when sampling.  New token number i of row b is decided by numbers of row b's own stream
(``generation.uniforms``), whatever the batch, k, and the steps in which the places were visited:
``prompt_lookup`` draws with the i-th number, as ``generate`` does, so it emits the very same
tokens; ``draft_model`` uses three streams, for the draft's draw, for accepting it, and for the
target's own draw, so it follows the same distribution with other tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from impl.baseline import hf_generate, serve_one_by_one
from impl.core import GREEDY, Engine, NotEngaged, StudyError, technique
from impl.fidelity import same_tokens
from impl.kv_cache import preallocated

from .drafters import DraftModel, NgramIndex, PromptLookup, Proposal
from .verify import accept_drawn, agreed, speculate

__all__ = ["DraftModel", "NgramIndex", "PromptLookup", "Proposal", "accept_drawn", "agreed",
           "draft_model", "peer_assisted", "peer_prompt_lookup", "prompt_lookup",
           "speculate"]  # fmt: skip

PROMPT_LOOKUP_K, DRAFT_K = 4, 3


def _guesses_verified(engine: Engine, run) -> str:
    """The target really sees k + 1 tokens at once, and emits more than one a step."""
    widths: list[int] = []
    lengths: list[int] = []  # of the caches: steps are compiled for one length

    def look(_, args):
        widths.append(args[0].shape[1])
        lengths.extend(cache.max_len for cache in args[2:3] if hasattr(cache, "max_len"))

    hook = engine.model.register_forward_pre_hook(look)
    drafter = getattr(engine.generate, "drafter", None)
    try:
        engine.stats.pop("drafted", None)
        run()
        if not engine.stats.get("accepted"):  # a text that repeats itself, with room to agree
            if hasattr(drafter, "forget"):  # that guesses do not pay here is no reason not to look
                drafter.forget()
            length = max([32, *lengths])
            text = torch.arange(8, device=engine.device).repeat(1, length // 16)
            engine.generate(text, length - text.shape[1])
    finally:
        hook.remove()
    s = engine.stats
    if not s.get("drafted") or s["k"] + 1 not in widths:
        raise NotEngaged("the target never verified a guess")
    if not engine.spec.random_weights and not s["accepted"]:
        raise NotEngaged("not one guess was accepted, on a text that repeats itself")
    return (
        f"{s['accepted']} of {s['drafted']} guesses accepted, {s['mean_accepted']:.2f} tokens "
        f"per step of {s['k'] + 1} tokens"
    )


def _verify_with(engine: Engine, drafter) -> Engine:
    if engine.new_cache(1, 1).lockstep:  # rows of a batch come to stand at different places
        engine.new_cache = preallocated(engine)

    def generate(ids, max_new_tokens, sampling=GREEDY, on_token=None):
        return speculate(engine, drafter, ids, max_new_tokens, sampling, on_token)

    generate.drafter = drafter
    engine.generate = generate
    return engine


@technique(phase="decode", replaces="decode", needs={"generate", "lean"}, fidelity=same_tokens,
           effect=_guesses_verified, peer="peer_prompt_lookup")  # fmt: skip
def prompt_lookup(engine: Engine) -> Engine:
    """time per token = step(k + 1) / mean_accepted: guesses are what followed these tokens before.

    Helps on text that copies (code, editing, summaries) while a step of k + 1 tokens costs about
    what one token does.  Does not on text without repetition: it then takes plain steps.  When
    sampling, the same tokens as without it.
    Source: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding
    """
    return _verify_with(engine, PromptLookup(PROMPT_LOOKUP_K))


@technique(phase="decode", replaces="decode", needs={"generate", "lean", "draft"},
           fidelity=same_tokens, effect=_guesses_verified, peer="peer_assisted")  # fmt: skip
def draft_model(engine: Engine) -> Engine:
    """speed-up = (1 - a^(k+1)) / (1 - a) / (1 + c k + v): a draft guesses, the target verifies.

    a acceptance, c cost of a draft step, v extra cost of k + 1 tokens over one, in target steps.
    Helps when the target is bound by reading its weights and the draft is a tenth of it or less.
    Does not at large batches (v grows) or with a draft as slow as the target.
    Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192;
    Chen et al. 2023, https://arxiv.org/abs/2302.01318
    """
    from impl.models.decoder import from_transformers

    draft = from_transformers(_draft_of(engine))
    shadow = Engine(engine.spec, draft, engine.dtype, engine.device, engine.batch)
    drafter = DraftModel(draft, preallocated(shadow), DRAFT_K, lambda: engine.model)
    return _verify_with(engine, drafter)


def _draft_of(engine: Engine) -> nn.Module:
    """transformers' ``lm_draft`` in the engine's precision; it must share the vocabulary."""
    from impl.models import load

    _, draft = load("lm_draft", engine.dtype, engine.device)
    if draft.config.vocab_size != engine.spec.config["vocab_size"]:
        raise StudyError(
            f"{engine.spec.name} has {engine.spec.config['vocab_size']} tokens, lm_draft "
            f"{draft.config.vocab_size}; draft_model needs a draft with the same tokenizer"
        )
    return draft


def _rows_apart(generate):
    """Row after row: transformers speculates at batch 1 only."""

    def one_by_one(ids, max_new_tokens, sampling=GREEDY, on_token=None):
        return torch.cat([generate(row[None], max_new_tokens, sampling, on_token) for row in ids])

    return one_by_one


def _fewer_forwards_than_tokens(engine: Engine, run) -> str:
    widths: list[int] = []

    def look(_, args, kwargs):
        widths.append((kwargs.get("input_ids") if not args else args[0]).shape[1])

    hook = engine.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        engine.generate(torch.arange(8, device=engine.device).repeat(1, 8), 64)
    finally:
        hook.remove()
    if not any(1 < w < 64 for w in widths[1:]):
        raise NotEngaged("transformers' generate fed one token at a time: no candidates")
    return f"transformers verified candidates: 64 tokens in {len(widths)} forwards"


@technique(phase="load", host="transformers", replaces=("host", "decode"),
           needs={"generate", "draft"}, effect=_fewer_forwards_than_tokens)  # fmt: skip
def peer_assisted(engine: Engine) -> Engine:
    """transformers' assisted generation with the same draft, its adaptive number of guesses.

    Batch 1 only: rows of a batch run one after another.
    Source: https://huggingface.co/docs/transformers/assisted_decoding
    """
    return _peer(engine, assistant_model=_draft_of(engine))


@technique(phase="load", host="transformers", replaces=("host", "decode"), needs={"generate"},
           effect=_fewer_forwards_than_tokens)  # fmt: skip
def peer_prompt_lookup(engine: Engine) -> Engine:
    """transformers' prompt look-up with as many guesses per step as ours.

    Batch 1 only: rows of a batch run one after another.
    Source: https://huggingface.co/docs/transformers/assisted_decoding#prompt-lookup-decoding
    """
    return _peer(engine, prompt_lookup_num_tokens=PROMPT_LOOKUP_K)


def _peer(engine: Engine, **options) -> Engine:
    engine.stats["host"] = "transformers"
    engine.generate = _rows_apart(hf_generate(engine.model, **options))
    engine.serve = serve_one_by_one(engine)
    return engine
