"""A claim is a ratio: the median over rounds of log(other / variant), with an interval.

The interval lies between two order statistics: distribution-free, of exact binomial coverage.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def interval_rank(n: int, confidence: float = 0.95) -> int:
    """Largest k such that [x(k), x(n+1-k)] covers the median; 0 if n is too small (< 6).

    Coverage is exact for any continuous distribution (Thompson 1936): the number of samples
    below the median is binomial(n, 1/2).
    """
    k, outside = 0, 2 / 2**n  # chance that [x(k+1), x(n-k)] misses the median
    while k < n // 2 and outside <= 1 - confidence:
        k += 1
        outside += 2 * math.comb(n, k) / 2**n
    return k


def verdict(low: float | None, high: float | None, margin: float) -> str:
    """same, faster, slower or ambiguous, of a speed-up's interval.

    ``margin``: twice the precision aimed at, or the A/A noise floor if that is larger.
    """
    if low is None or high is None:
        return "ambiguous"
    if 1 / (1 + margin) <= low and high <= 1 + margin:
        return "same"
    return "faster" if low > 1 else "slower" if high < 1 else "ambiguous"


@dataclass(frozen=True)
class Ratio:
    """A speed-up and its 95 % interval; bounds are None below six pairs."""

    middle: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float:
        """Relative half-width of the interval."""
        if self.low is None or self.high is None:
            return math.inf
        return (self.high - self.low) / 2 / self.middle


def paired_ratio(other: Sequence[float], variant: Sequence[float]) -> Ratio:
    """Median of other/variant over pairs: above 1 the variant is faster."""
    logs = sorted(math.log(o / v) for o, v in zip(other, variant, strict=True))
    middle, k = math.exp(statistics.median(logs)), interval_rank(len(logs))
    if not k:
        return Ratio(middle, None, None)
    return Ratio(middle, math.exp(logs[k - 1]), math.exp(logs[-k]))
