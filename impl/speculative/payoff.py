"""When is a guess worth verifying?  What it is expected to bring, against what it costs."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Sequence

LEARNING_RATE = 0.15
REMEMBERED = 16  # steps of each width
TRIALS = 3  # guesses verified before times count: the first may compile


class Payoff:
    """Whether verifying k guesses emits more tokens per second than plain steps do.

    Worth it when  sum over rows (1 + E) / time(k + 1)  >  rows / time(1),  E the expected number of
    guesses kept.  E is a running mean per kind of guess over *every* guess, those not verified
    too: the text that follows tells what they would have brought, so trying costs nothing.  Times
    are the shortest of the last steps of a width: neither a compilation nor a burst of other load
    counts.  The choice changes when tokens come, never which.
    """

    def __init__(self, k: int):
        self.k = k
        self.kept: defaultdict[Hashable, float] = defaultdict(lambda: k / 2)  # hopeful at first
        self.times: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def took(self, width: int, seconds: float) -> None:
        """A step of ``width`` tokens per row took so long."""
        self.times[width].append(seconds)

    def patience(self, spare: int = 16, hopeless: int = 64) -> int:
        """Plain steps to take before the text is asked again, where several are one call.

        One until the cost of a guess is known; ``hopeless`` while even k kept ones would cost
        more than the plain steps they save.
        """
        plain, wide = self.times[1], self.times[self.k + 1]
        if len(wide) < TRIALS or not plain:
            return 1
        never = (1 + self.k) * min(plain) <= min(wide)
        return hopeless if never else spare

    def learn(self, kind: Hashable, kept: int) -> None:
        """``kept`` of the k guesses of this kind were what the text went on with."""
        self.kept[kind] += LEARNING_RATE * (kept - self.kept[kind])

    def worth(self, kinds: Sequence[Hashable | None]) -> bool:
        """Verify now?  ``kinds``: of each row's guess, None where it has none."""
        plain, wide = self.times[1], self.times[self.k + 1]
        if len(wide) < TRIALS or not plain:
            return len(wide) < TRIALS
        emitted = sum(1 + (0.0 if kind is None else self.kept[kind]) for kind in kinds)
        return emitted * min(plain) > len(kinds) * min(wide)
