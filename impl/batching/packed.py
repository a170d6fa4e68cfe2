"""Tokens of several requests in one row: what each may see, and where its keys stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from impl.core import Request


@dataclass
class Seat:
    """A request that is being answered; ``length`` of its tokens are known, ``fed`` in the cache.

    place  its row of a cache of rows, or its first slot of a shared one
    """

    request: Request
    place: int
    length: int
    fed: int = 0
    first_token_s: float = 0.0

    @property
    def end(self) -> int:
        return len(self.request.ids) + self.request.max_new_tokens


def visible(owner: Tensor, at: Tensor, window: int | None, slots: int, dtype) -> Tensor:
    """Additive mask (1, 1, N, slots), 0 or -inf: token n sees slots ``owner[n]`` .. ``at[n]``.

    owner, at  (N,) int64: the first slot of the token's request, and the token's own
    window     the nearest slots that a token sees (None: all of its request)
    """
    slot = torch.arange(slots, device=at.device)
    first = owner if window is None else torch.maximum(owner, at - window + 1)
    hidden = (slot < first[:, None]) | (slot > at[:, None])  # (N, slots)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=at.device)
    return mask.masked_fill_(hidden, -torch.inf)[None, None]


class SharedSlots:
    """A cache of one row whose slots are shared out: every request has a span of its own.

    A step is one row of tokens, those of a prompt beside single ones; a token sees its request's
    span up to itself.  Attention reads the slots up to the end of the last span.
    """

    lockstep = True  # shapes change from step to step

    def __init__(self, cache):
        self.cache, self.window = cache, cache.window

    @property
    def max_len(self) -> int:
        return self.cache.max_len

    def point(self, owner: Tensor, at: Tensor, slots: int) -> None:
        """The next step's tokens stand in slots ``at`` (N,) of spans from ``owner`` (N,) on."""
        self.owner, self.at, self.cache.slots = owner, at[None], slots

    def mask(self, positions: Tensor, T: int, dtype: torch.dtype) -> Tensor:
        return visible(self.owner, self.at[0], self.window, self.cache.slots, dtype)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor):
        return self.cache.update(layer, k, v, self.at)


def first_fit(seats: list[Seat], need: int, capacity: int) -> int | None:
    """The first slot of the lowest gap of ``need`` slots between the seats' spans, if any."""
    at = 0
    for seat in sorted(seats, key=lambda s: s.place):
        if seat.place - at >= need:
            return at
        at = seat.place + seat.end
    return at if capacity - at >= need else None


class PackedPrompts:
    """Whole prompts behind one another in one row, each written to its own row of ``cache``.

    Prompts start at position 0, so that all a token sees is in the packed row itself.
    """

    lockstep = True

    def __init__(self, cache, rows: list[int], lengths: list[int]):
        self.cache, self.lengths, self.max_len = cache, lengths, cache.max_len
        counts = torch.tensor(lengths)
        self.rows = torch.tensor(rows).repeat_interleave(counts).to(cache.rows.device)  # (N,)
        starts = counts.cumsum(0) - counts
        self.owner = starts.repeat_interleave(counts).to(self.rows.device)  # (N,)

    def mask(self, positions: Tensor, T: int, dtype: torch.dtype) -> Tensor | None:
        window = self.cache.window
        if len(self.lengths) == 1 and (window is None or window >= T):
            return None  # plain causal attention
        at = torch.arange(T, device=self.owner.device)
        return visible(self.owner, at, window, T, dtype)

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor):
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, positions[0]] = k[0].transpose(0, 1).to(keys.dtype)  # (N, Hkv, D)
        values[self.rows, :, positions[0]] = v[0].transpose(0, 1).to(values.dtype)
        return k, v
