"""Tokens of several requests in one row: what each may see, and where its keys stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from impl.core import Request
from impl.models.kv_cache import causal_mask


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


class Step(NamedTuple):
    """The tokens of one forward: a single one of each request that goes on, then whole prompts."""

    at: list[int]  # slot of each token
    positions: list[int]  # its place in its request
    columns: list[int]  # which tokens end their requests, in the order of the seats
    prompts: list[int]  # tokens of each prompt


def next_step(seats: list[Seat]) -> Step:
    """What to compute next for ``seats``, those that go on before those that begin."""
    going, new = [s for s in seats if s.fed], [s for s in seats if not s.fed]
    at, positions = [s.place + s.fed for s in going], [s.fed for s in going]
    columns = list(range(len(going)))
    for seat in new:
        at += range(seat.place, seat.place + seat.length)
        positions += range(seat.length)
        columns.append(len(at) - 1)
    return Step(at, positions, columns, [s.length for s in new])


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

    A step is one row of tokens: single ones, then whole prompts.  Attention takes them apart.  A
    single token reads its request's span, in pages of one slot where ``paged_attention`` can run,
    else gathered and padded; a prompt's tokens see one another, all of them in the step.
    """

    lockstep = True  # shapes change from step to step

    def __init__(self, cache):
        self.cache, self.window = cache, cache.window
        self.paged = own_span_operator(cache.keys[0])

    @property
    def max_len(self) -> int:
        return self.cache.max_len

    def point(self, at: Tensor, positions: Tensor, prompts: list[int], longest: int) -> None:
        """Say where the next step's tokens stand: single ones, then whole prompts.

        at, positions  (N,) int64: slots of the cache, and places in the tokens' own requests
        prompts        tokens of each prompt
        longest        slots in use of the longest span, or more
        """
        self.at, self.starts, self.prompts = at[None], at - positions, prompts
        self.singles, self.longest, self.table = len(at) - sum(prompts), longest, None

    def _look_up(self) -> None:
        """Slots that each single token sees, ``seen`` (n,) of them first in a row of ``table``."""
        starts, longest = self.starts[: self.singles], self.longest
        first, last = starts, self.at[0, : self.singles]
        if self.window is not None:
            first = torch.maximum(starts, last - self.window + 1)
            longest = min(longest, self.window)
        place = torch.arange(longest, device=last.device)
        table = (first[:, None] + place).clamp_(max=self.max_len - 1)  # (n, longest)
        self.table, self.seen = table.to(torch.int32), last - first + 1
        self.hidden = place >= self.seen[:, None]

    def mask(self, positions: Tensor, T: int, dtype: torch.dtype) -> None:
        """None: ``attend`` knows who sees whom."""

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor):
        self.cache.update(layer, k, v, self.at)
        return k, v

    def attend(self, attend, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the step, by ``attend(q, k, v, mask)`` where it is that of a prompt.

        q (1, H, N, D), k and v (1, Hkv, N, D), all of this step; returns (1, H, N, D).
        """
        end, parts = self.singles, []
        if end:
            if self.table is None:  # the same for all layers
                self._look_up()
            parts.append(self._single_tokens(layer, q[0, :, :end].transpose(0, 1)))
        for T in self.prompts:
            q_, k_, v_ = (t[:, :, end : end + T] for t in (q, k, v))
            y = attend(q_, k_, v_, causal_mask(T, T, self.window, q))
            parts.append(y[0].transpose(0, 1))
            end += T
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # (N, H, D)
        return y.transpose(0, 1)[None]

    def _single_tokens(self, layer: int, q: Tensor) -> Tensor:
        """Each of q (n, H, D) over its own span; returns (n, H, D)."""
        keys, values = self.cache.keys[layer][0], self.cache.values[layer][0]  # (Hkv, slots, D)
        if self.paged and q.dtype == keys.dtype:  # under autocast they differ
            keys, values = (t.transpose(0, 1)[:, :, None] for t in (keys, values))
            y = self.paged(q[:, :, None], keys, values, self.table, self.seen)
            return y[:, :, 0]
        keys, values = (t[:, self.table].transpose(0, 1) for t in (keys, values))
        mask = torch.zeros(self.hidden.shape, dtype=q.dtype, device=q.device)
        mask = mask.masked_fill_(self.hidden, -torch.inf)[:, None, None]  # (n, 1, 1, longest)
        y = F.scaled_dot_product_attention(
            q[:, :, None], keys.to(q.dtype), values.to(q.dtype), mask, enable_gqa=True
        )
        return y[:, :, 0]


def own_span_operator(keys: Tensor):
    """``kernels``' ``paged_attention`` where it is compiled and takes these keys, or None."""
    from kernels.op import OPS
    from kernels.paged_attention import paged_attention

    compiled = OPS["paged_attention"].fastest(keys.device.type) != "reference"
    return paged_attention if compiled and keys.shape[-1] <= 128 else None


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
