"""The key-value cache of the lean decoder: slot = position, nothing is ever erased.

Other caches (paged, quantized, sliding) are classes with the same members: ``lockstep``,
``max_len``, ``slots``, ``mask`` and ``update``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .decoder import DecoderConfig


def causal_mask(T: int, S: int, window: int | None, like: Tensor) -> Tensor | None:
    """Additive mask (T, S), 0 or -inf, of T queries that end a row of S keys.

    None where scaled_dot_product_attention needs none: one query that sees all keys, or as many
    queries as keys (plain causal attention).
    """
    window = S if window is None else window
    if window >= S and T in (1, S):
        return None
    visible = torch.ones(T, S, dtype=torch.bool, device=like.device).tril(S - T)
    if window < S:
        visible = visible.triu(S - T - window + 1)
    return torch.zeros(T, S, dtype=like.dtype, device=like.device).masked_fill(~visible, -torch.inf)


class KVCache:
    """Keys and values of every layer, preallocated: L x (B, Hkv, S, D), slot = position.

    Nothing is ever erased: a query at position p sees slots <= p only, so a row goes back (a
    rejected draft, a new request in its place) by writing over what it has.  Another cache has the
    same four members: ``lockstep``, ``slots``, ``mask`` and ``update``.

    ``lockstep`` False: ``generate`` steps with positions (B, T) in a tensor, attention reads the
    first ``slots`` slots under a mask, and shapes never change: safe for graphs and compilation.
    """

    lockstep = False

    def __init__(self, config: DecoderConfig, batch: int, max_len: int, dtype=torch.float32,
                 device="cpu"):  # fmt: skip
        self.batch, self.max_len, self.window = batch, max_len, config.sliding_window
        shape = (batch, config.num_kv_heads, max_len, config.head_dim)
        # one tensor per layer: views of a single one would be aliased inputs of a compiled graph
        self.keys = [torch.zeros(shape, dtype=dtype, device=device)
                     for _ in range(config.num_layers)]  # fmt: skip
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1)
        self.slot_numbers = torch.arange(max_len, device=device)
        self.slots = max_len  # attention reads this many; a loop with tensor positions may lower it

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def mask(self, positions: Tensor | int, T: int, dtype: torch.dtype) -> Tensor | None:
        """Additive mask for one forward, broadcast to (B, H, T, S), or None; asked once per step.

        None means what ``causal_mask`` says: all keys for one query, else plain causal.
        """
        if not isinstance(positions, Tensor):
            if T == 1:
                return None  # ``update`` returns just the slots that the query sees
            like = torch.empty(0, dtype=dtype, device=self.rows.device)
            return causal_mask(T, positions + T, self.window, like)
        slots = self.slot_numbers[: self.slots]
        position = positions[:, None, :, None]  # (B, 1, T, 1)
        hidden = slots > position
        if self.window is not None:
            hidden = hidden | (slots <= position - self.window)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
            hidden, -torch.inf
        )

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | int):
        """Write k, v (B, Hkv, T, D) at ``positions``; keys and values (B, Hkv, S, D) to attend to.

        S is ``slots`` for tensor positions (B, T), the slots in use for an int.
        """
        keys, values = self.keys[layer], self.values[layer]
        if not isinstance(positions, Tensor):
            T = k.shape[2]
            end = positions + T
            keys[:, :, positions:end] = k
            values[:, :, positions:end] = v
            start = max(0, end - self.window) if self.window and T == 1 else 0
            return keys[:, :, start:end], values[:, :, start:end]
        k, v = k.to(keys.dtype), v.to(values.dtype)  # differ under autocast
        if self.batch == 1:
            keys.index_copy_(2, positions[0], k)
            values.index_copy_(2, positions[0], v)
        else:
            keys[self.rows, :, positions] = k.transpose(1, 2)  # indexed: (B, T, Hkv, D)
            values[self.rows, :, positions] = v.transpose(1, 2)
        return keys[:, :, : self.slots], values[:, :, : self.slots]

    def narrow(self, start: int, rows: int) -> KVCache:
        """A cache of ``rows`` rows from row ``start`` on, over the same memory."""
        view = copy.copy(self)
        view.batch, view.rows = rows, self.rows[:rows]
        view.keys = [k[start : start + rows] for k in self.keys]
        view.values = [v[start : start + rows] for v in self.values]
        return view


class GrowingCache(KVCache):
    """A ``KVCache`` whose rows advance together: attention reads the slots in use, without a mask.

    Cheapest in eager mode; every step has a new shape, so it is not for compiled steps.
    """

    lockstep = True
