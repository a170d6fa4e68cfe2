"""Who guesses: a look-up in the text so far, or a small model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from impl.core import Sampling

from .payoff import Payoff

STREAMS = 3  # of uniform numbers that ``DraftModel`` takes per row


class NgramIndex:
    """Where each n-gram of a row was last followed by something; O(1) per token and per look-up."""

    def __init__(self, tokens: Sequence[int] = (), sizes: Sequence[int] = (3, 2)):
        self.tokens: list[int] = []
        self.sizes = sizes  # longest first
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after it
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; the n-grams before each of them become known."""
        known = self.tokens
        for token in tokens:
            end = len(known)
            for n in self.sizes:
                if end >= n:
                    self.after[tuple(known[end - n :])] = end
            known.append(token)

    def guess(self, k: int) -> list[int] | None:
        """The k tokens that followed the longest known suffix, or None when none is known."""
        return self.match(k)[1]

    def match(self, k: int) -> tuple[int, list[int] | None]:
        """(length of the longest known suffix, the k tokens that followed it); (0, None): unknown.

        A match that ends where the text does is continued with what it has guessed so far.
        """
        known, end = self.tokens, len(self.tokens)
        for n in self.sizes:
            if end >= n and (start := self.after.get(tuple(known[end - n :]))) is not None:
                found = known[start : start + k]
                while len(found) < k:
                    found.append(found[start + len(found) - end])
                return n, found
        return 0, None


@dataclass
class Proposal:
    """Guesses (B, k) int64; the distributions (B, k, V) they were drawn from, or None when they
    are certain; and per row whether it has a guess at all (if not, its places are filler).
    """

    guesses: Tensor
    drawn_from: Tensor | None
    real: list[bool]


class Row:
    """A row's text, and the guess whose worth the text is about to tell."""

    def __init__(self, tokens: Sequence[int], payoff: Payoff):
        self.text, self.payoff = NgramIndex(tokens), payoff
        self.open: list[int] | None = None  # guesses not yet met
        self.kind: tuple[int, bool] = (0, False)  # length of the match, was the last guess right
        self.met, self.copying = 0, False

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on; the open guess is judged by it."""
        self.text.extend(tokens)
        for token in tokens:
            if self.open is None:
                return
            right = token == self.open[self.met]
            self.met += right
            if not right or self.met == len(self.open):
                self.payoff.learn(self.kind, self.met)
                self.copying, self.open = right, None

    def guess(self, k: int) -> tuple[tuple[int, bool] | None, list[int] | None]:
        """(kind, the k tokens expected next); (None, None) where the text says nothing."""
        length, found = self.text.match(k)
        if found is None:
            return None, None
        kind = length, self.copying
        if self.open is None:
            self.open, self.kind, self.met = found, kind, 0
        return kind, found


class PromptLookup:
    """Proposes what followed the last tokens when they stood in the text before, if that pays."""

    k: int
    exact_draws = True  # a proposal is certain, so drawing from the target and comparing is exact

    def __init__(self, k: int):
        self.k, self.payoffs = k, dict[int, Payoff]()

    def start(self, ids: Tensor, length: int, sampling: Sampling, rows: Sequence[int]) -> None:
        self.payoff = self.payoffs.setdefault(len(ids), Payoff(self.k))  # of this batch
        self.rows = [Row(row, self.payoff) for row in ids.tolist()]

    def forget(self) -> None:
        """What guesses cost and bring is to be learned again: the next ones are verified."""
        self.payoffs.clear()

    def took(self, width: int, seconds: float) -> None:
        """A step of ``width`` tokens per row took so long."""
        self.payoff.took(width, seconds)

    def patience(self) -> int:
        """How many plain steps may be taken at once."""
        return self.payoff.patience()

    def propose(self, emitted: list[list[int]]) -> Proposal | None:
        """Guesses (B, k) after the tokens just emitted; None when no row has one worth its time."""
        for row, tokens in zip(self.rows, emitted, strict=True):
            row.extend(tokens)
        kinds, guesses = zip(*(row.guess(self.k) for row in self.rows), strict=True)
        if not any(guesses) or not self.payoff.worth(kinds):
            return None
        filled = torch.tensor([g or [0] * self.k for g in guesses])
        return Proposal(filled, None, [g is not None for g in guesses])


class DraftSteps(nn.Module):
    """k greedy steps of the draft as one module, so that they compile to one graph."""

    def __init__(self, draft: nn.Module, k: int):
        super().__init__()
        self.draft, self.k = draft, k

    def forward(self, pair: Tensor, positions: Tensor, cache) -> Tensor:
        """The last two tokens (B, 2) at the first two of positions (B, k + 1) -> (B, k)."""
        found = [self.draft(pair, positions[:, :2], cache)[:, -1:].argmax(-1)]
        for i in range(1, self.k):
            logits = self.draft(found[-1], positions[:, i + 1 : i + 2], cache)
            found.append(logits.argmax(-1))
        return torch.cat(found, 1)


class DraftModel:
    """Proposes what a small model would say; its cache follows the target's positions."""

    exact_draws = False

    def __init__(self, draft: nn.Module, new_cache, k: int, target: Callable[[], nn.Module]):
        self.draft, self.new_cache, self.k, self.target = draft, new_cache, k, target
        self.steps = DraftSteps(draft, k)
        self.compiled: tuple[nn.Module, Callable] | None = None

    def start(self, ids: Tensor, length: int, sampling: Sampling, rows: Sequence[int]) -> None:
        self.draft.extend_positions(length)
        self.cache = self.new_cache(len(ids), length)
        self.sampling, self.last = sampling, length - 1
        self.draft(ids, 0, self.cache, last_only=True)
        self.texts = ids.tolist()
        self.u = (
            streams(sampling, rows, length - ids.shape[1], ids.device)[0]
            if sampling.temperature
            else None
        )
        self.prompt = ids.shape[1]

    def propose(self, emitted: list[list[int]]) -> Proposal:
        """Guesses after the tokens just emitted, with their distributions when sampling."""
        for text, tokens in zip(self.texts, emitted, strict=True):
            text.extend(tokens)
        # The last guess kept was never fed: the first step feeds two tokens, in every row alike.
        device = self.draft.embed.weight.device
        pair = torch.tensor([t[-2:] for t in self.texts], device=device)
        starts = torch.tensor([len(t) - 2 for t in self.texts], device=device)
        positions = starts[:, None] + torch.arange(self.k + 1, device=device)
        positions = positions.clamp_(max=self.last)  # (B, k + 1)
        if self.u is None:
            guesses = self._steps()(pair, positions, self.cache)
            return Proposal(guesses, None, [True] * len(pair))
        from impl.models.generation import distribution, draw

        guesses, drawn_from, token = [], [], pair
        for i in range(self.k):
            at = positions[:, :2] if i == 0 else positions[:, i + 1 : i + 2]
            logits = self.draft(token, at, self.cache)[:, -1]
            probs = distribution(logits, self.sampling)  # (B, V)
            place = (starts + 2 + i - self.prompt).clamp(max=self.u.shape[1] - 1)
            token = draw(probs, self.u.gather(1, place[:, None])[:, 0])[:, None]  # (B, 1)
            guesses.append(token)
            drawn_from.append(probs)
        return Proposal(torch.cat(guesses, 1), torch.stack(drawn_from, 1), [True] * len(pair))

    def _steps(self) -> Callable:
        """The k steps, compiled in the way the target is when it is."""
        target = self.target()
        if not hasattr(target, "compile_like"):
            return self.steps
        if self.compiled is None or self.compiled[0] is not target:
            self.compiled = target, target.compile_like(self.steps)
        return self.compiled[1]


def streams(sampling: Sampling, rows: Sequence[int], count: int, device) -> list[Tensor]:
    """Three independent (B, count) tensors of numbers in [0, 1): draft, accept, target."""
    from impl.models.generation import uniforms

    drawn = uniforms(sampling, rows, STREAMS * count, device)
    return [drawn[:, i::STREAMS] for i in range(STREAMS)]
