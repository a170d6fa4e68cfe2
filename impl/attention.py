"""softmax(q k^T) v: how the scores of a prompt are kept out of memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .core import Engine, NotEngaged, technique
from .fidelity import same_tokens

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


@technique(phase="replace", needs={"generate", "lean", "attention"}, requires={"compiler"},
           fidelity=same_tokens, effect=_prompts_use_our_operator)  # fmt: skip
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
