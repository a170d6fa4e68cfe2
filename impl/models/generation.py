"""The generation loop of the lean decoder, and how a token is drawn.

Drawing is reproducible row by row: new token number i of row b is drawn with the i-th number of
a stream seeded by (seed, b), by inverting the cumulative distribution.  So a row's tokens depend
neither on the batch it runs in nor on how many tokens a step emits: a scheduler passes its own
row numbers (a request's id) and gets the same draws in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from impl.core import GREEDY, Sampling, StudyError


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (..., V) fp32 that ``sampling`` gives these logits (temperature > 0).

    softmax(logits / temperature), cut to the nucleus (the fewest most probable tokens that reach
    ``top_p`` together, at least one) and renormalized.
    Source of the nucleus: Holtzman et al. 2020, https://arxiv.org/abs/1904.09751
    """
    probs = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p >= 1.0:
        return probs
    ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # mass of the more probable tokens
    dropped = before >= sampling.top_p
    dropped[..., 0] = False
    probs = probs.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """Token (...) int64 whose cumulative probability is the first above u (...) in [0, 1)."""
    cumulative = probs.double().cumsum(-1)
    total = cumulative[..., -1]
    point = torch.minimum(u.double() * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point[..., None], right=True)[..., 0]


def uniforms(sampling: Sampling, rows: Sequence[int], count: int, device="cpu") -> Tensor:
    """The first ``count`` numbers in [0, 1) of each row's stream: (len(rows), count) fp64."""
    streams = []
    for row in rows:
        # an odd multiplier keeps (seed, row) pairs apart: streams of nearby seeds do not meet
        seed = (sampling.seed * 0x9E3779B97F4A7C15 + row) % 2**63
        generator = torch.Generator().manual_seed(seed)
        streams.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(streams).to(device)


def next_tokens(logits: Tensor, sampling: Sampling, u: Tensor | None = None) -> Tensor:
    """Tokens (...) int64 from logits (..., V): the largest, or drawn with u (...)."""
    if not sampling.temperature:
        return logits.argmax(-1)
    return draw(distribution(logits, sampling), u)


@torch.inference_mode()
def generate(model, new_cache: Callable, ids: Tensor, max_new_tokens: int,
             sampling: Sampling = GREEDY, on_token: Callable[[Tensor], None] | None = None,
             rows: Sequence[int] | None = None, choose: Callable | None = None
             ) -> Tensor:  # fmt: skip
    """ids (B, T) int64 -> (B, T + max_new_tokens): one forward over the prompt, then one a token.

    model       ``LeanDecoder``, or anything called like it (a compiled or quantized one)
    new_cache   ``new_cache(batch, max_len)`` gives the cache to write to
    on_token    called with (B, 1) new tokens as soon as they are known
    rows        numbers of the rows in the sampling streams (default 0 .. B-1)
    choose      ``choose(ids, positions, cache, u) -> (B, 1)`` makes the token after ids in place
                of the model's logits and ``next_tokens``
    No end token ends a row.  Raises ``StudyError`` when there is no prompt or no room in the cache.
    """
    B, T = ids.shape
    if T == 0:
        raise StudyError("the prompt is empty; give at least one token")
    length = T + max_new_tokens
    out = torch.empty(B, length, dtype=torch.int64, device=ids.device)
    out[:, :T] = ids
    if max_new_tokens == 0:
        return out
    if hasattr(model, "extend_positions"):
        model.extend_positions(length)
    cache = new_cache(B, length)
    if cache.max_len < length:
        raise StudyError(
            f"{T} prompt and {max_new_tokens} new tokens need {length} slots, the cache has "
            f"{cache.max_len}; ask for fewer new tokens"
        )
    u = None
    if sampling.temperature:
        u = uniforms(sampling, rows if rows is not None else range(B), max_new_tokens, ids.device)
    if choose is None:

        def choose(ids, positions, cache, u):
            # the step that is compiled gives the logits of all its tokens
            logits = model(ids, positions, cache, last_only=ids.shape[1] > 1)
            return next_tokens(logits, sampling, u)

    everywhere = torch.arange(length, device=ids.device).expand(B, -1)  # (B, length)
    token, position = ids, 0
    for at in range(T, length):
        token = choose(token, position, cache, None if u is None else u[:, at - T : at - T + 1])
        out[:, at : at + 1] = token  # (B, 1)
        if on_token is not None:
            on_token(token)
        position = at if cache.lockstep else everywhere[:, at : at + 1]
    return out
