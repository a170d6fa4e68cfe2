"""How far a technique's output may differ from the output without it, strictest first.

``bitwise``              the same bits.
``same_tokens``          every emitted token is the reference's greedy choice; a different one is
                         allowed only where the reference's logits of the two tokens are closer
                         than rounding can decide (``NEAR_TIE``, recorded).
``same_distribution``    sampled tokens follow the reference's distribution (chi-square).
``close(sqnr_db)``       signal to quantization noise of the output of at least so many dB.
``budget(metric, worst)``  a quality metric may be worse than the reference's by at most ``worst``:
                         a relative increase for perplexity, an absolute loss for the others.

Models without tokens (classifiers, encoders) read ``bitwise`` to ``same_distribution`` as
``close`` at the precision's rounding (``ROUNDING_DB``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ORDER = ("bitwise", "same_tokens", "same_distribution", "close", "budget")

# Two logits closer than this can change places when sums are taken in another order: twice the
# logit error seen between transformers' kernels at the precision and at fp32 on `lm_small`
# (fp32 2e-5, fp16 0.02, bf16 0.15), rounded up; tests/test_matrix.py measures it again.
NEAR_TIE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.4}

# Noise of a network computed in this precision: unit roundoff u gives -20 log10(u) dB, less the
# growth over some tens of layers (about 20 dB).
ROUNDING_DB = {"fp32": 100.0, "fp16": 40.0, "bf16": 25.0}

# Metrics where larger is worse, and whether the allowed loss is relative.
LARGER_IS_WORSE = {"perplexity": "relative", "kl": "absolute"}


@dataclass(frozen=True)
class Fidelity:
    """One entry of ``ORDER`` with its limit: dB for ``close``, worst loss for ``budget``."""

    kind: str
    limit: float = 0.0
    metric: str = ""
    also: tuple[tuple[str, float], ...] = ()
    near_tie: float = 0.0  # logits of a lossy model move this much with the order of sums

    @property
    def lossless(self) -> bool:
        """Whether the technique promises the same tokens (or their distribution)."""
        return self.kind in ORDER[:3]

    @property
    def budgets(self) -> dict[str, float]:
        """Metric -> worst loss allowed."""
        return dict([(self.metric, self.limit), *self.also]) if self.metric else {}

    def __str__(self) -> str:
        if self.kind == "close":
            return f"close({self.limit:g} dB)"
        return f"budget({self.metric} {self.limit:g})" if self.metric else self.kind


bitwise = Fidelity("bitwise")
same_tokens = Fidelity("same_tokens")
same_distribution = Fidelity("same_distribution")


def close(sqnr_db: float) -> Fidelity:
    """Output within ``sqnr_db`` decibel of the reference's."""
    return Fidelity("close", sqnr_db)


def budget(metric: str, worst: float, near_tie: float = 0.0, **also: float) -> Fidelity:
    """``metric`` at most ``worst`` worse than the reference's, and each of ``also`` likewise.

    ``near_tie``: rounding activations to few bits turns a difference in the last bit into a
    step of the quantizer; logits then differ by up to this much between two exact schedules.
    """
    return Fidelity("budget", worst, metric, tuple(sorted(also.items())), near_tie)


def loosest(fidelities) -> Fidelity:
    """What a stack promises: the loosest of its members; budgets of one metric add up."""
    ordered = sorted(fidelities, key=lambda f: (ORDER.index(f.kind), -f.limit))
    budgets: dict[str, float] = {}
    for f in ordered:
        for metric, worst in f.budgets.items():
            budgets[metric] = budgets.get(metric, 0.0) + worst
    if not budgets:
        if ordered[-1].kind == "close":
            return min((f for f in ordered if f.kind == "close"), key=lambda f: f.limit)
        return ordered[-1]
    (metric, worst), *also = budgets.items()
    return budget(metric, worst, **dict(also))


def sqnr_db(reference: torch.Tensor, output: torch.Tensor) -> float:
    """10 log10(|reference|^2 / |reference - output|^2) in dB; -inf for a non-finite output."""
    reference, output = reference.double(), output.double()
    if not output.isfinite().all():
        return -math.inf
    noise = (reference - output).square().sum().item()
    signal = reference.square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def loss_of(metric: str, value: float, baseline: float) -> float:
    """How much worse ``value`` is than ``baseline``, in the unit of the metric's budget."""
    kind = LARGER_IS_WORSE.get(metric)
    if kind == "relative":
        return value / baseline - 1
    return value - baseline if kind else baseline - value
