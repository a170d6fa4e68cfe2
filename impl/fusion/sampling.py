"""The end of a step, from the last hidden state to a token, without the logits in between."""

from __future__ import annotations

import torch
from torch import Tensor

from impl.core import GREEDY, Engine, NotEngaged, Sampling, technique
from impl.fidelity import same_tokens

from .proofs import operators_of

ARGMAX, TOP_P = "study::lm_head_argmax", "study::top_p_sampling"
TOKENS = 4  # that the proof generates


def _tokens_without_logits(engine: Engine, run) -> str:
    """Counts operators of our loop and the plain one over the same model, greedy and drawn."""
    from impl.models.generation import generate

    ids, n = torch.full((1, 8), 5, device=engine.device), TOKENS
    proofs = []
    for sampling, ours, theirs in (
        (GREEDY, ARGMAX, "argmax"),
        (Sampling(0.8, 0.9), TOP_P, "sort"),
    ):
        now = operators_of(lambda s=sampling: engine.generate(ids, n, s))
        plain = operators_of(lambda s=sampling: generate(engine.model, engine.new_cache, ids, n, s))
        if now[ours] != n or now[theirs] or not plain[theirs]:
            raise NotEngaged(f"{n} tokens dispatch {now[ours]} {ours}, {now[theirs]} {theirs}")
        if now.total() >= plain.total():
            raise NotEngaged(f"{now.total()} operators, {plain.total()} in the plain loop")
        proofs.append(f"{ours}: {now.total() / n:.0f} operators a token, {plain.total() / n:.0f}")
    if not (used := operators_of(run)[ARGMAX]):
        raise NotEngaged("the canonical call chose no token by lm_head_argmax")
    return f"{' without; '.join(proofs)} without; {used} tokens in one run"


@technique(phase="decode", needs={"generate", "lean"}, requires={"kernels"},
           replaces=("decode", "compiler", "weights", "head"), fidelity=same_tokens,
           effect=_tokens_without_logits)  # fmt: skip
def fused_sampling(engine: Engine) -> Engine:
    """token = argmax_v x . w_v in one pass over the head's weights: no logit is stored.

    Drawn tokens take the logits, and one operator that searches the nucleus' border where torch
    sorts the vocabulary: with the same numbers the same tokens, but for those within rounding of
    a border.  Reads the head's own float weights, so it stands without quantized or compiled ones.
    Helps where the vocabulary is large beside the model: no logits are written and read, nothing is
    sorted.  Measured on `lm_small`, 3,840 tokens: 1.01 to 1.05 of the plain loop's speed.  Does not
    at large batches, whose product is the library's best, nor beside a large model.
    Source: Holtzman et al. 2020 (nucleus), https://arxiv.org/abs/1904.09751; Xing et al. 2025 (no
    sort), https://flashinfer.ai/2025/03/10/sampling.html
    """
    from impl.models.generation import generate
    from kernels.lm_head_argmax import lm_head_argmax
    from kernels.top_p_sampling import top_p_sampling

    model = engine.model

    def best(x: Tensor) -> Tensor:
        return lm_head_argmax(x.contiguous(), model.lm_head.weight)[1]  # (B, 1)

    def fused_generate(ids, max_new_tokens, sampling=GREEDY, on_token=None):
        def choose(ids, positions, cache, u):
            if not sampling.temperature:
                return model(ids, positions, cache, last_only=True, head=best)
            logits = model(ids, positions, cache, last_only=True)  # (B, 1, V)
            u = u.to(torch.float32).contiguous()  # (B, 1)
            return top_p_sampling(logits, u, sampling.temperature, sampling.top_p)

        return generate(
            model, engine.new_cache, ids, max_new_tokens, sampling, on_token, choose=choose
        )

    engine.generate = fused_generate
    return engine
