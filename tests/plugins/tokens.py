"""Token-level figures: time to first token, time per token, latencies of served requests.

Tokens are counted from the ids returned, never from what a stream delivers: a speculative step
emits several at once.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class TokenClock:
    """Pass as ``on_token``: notes when tokens are there, device work included.

    clock = TokenClock(synchronize); clock.start()
    engine.generate(ids, 128, on_token=clock)
    clock.ttft_ms, clock.tpot_ms
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.synchronize = synchronize
        self.start()

    def start(self) -> None:
        """Begin a generation."""
        self.synchronize()
        self._start, self._steps = time.perf_counter(), []

    _steps: list[tuple[float, int]]  # (seconds since the start, tokens emitted per row)

    def __call__(self, tokens: Any) -> None:
        """``tokens`` (B, n) or (B,) have just been emitted."""
        self.synchronize()
        emitted = tokens.shape[1] if getattr(tokens, "ndim", 0) > 1 else 1
        self._steps.append((time.perf_counter() - self._start, emitted))

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds to the first token."""
        return self._steps[0][0] * 1e3 if self._steps else None

    @property
    def inter_token_ms(self) -> list[float]:
        """Milliseconds of each later token; a step that emits n gives each an n-th of its time."""
        gaps, before = [], None
        for at, emitted in self._steps:
            if before is None:
                gaps += [0.0] * (emitted - 1)  # came with the first one
            else:
                gaps += [(at - before) / emitted * 1e3] * emitted
            before = at
        return gaps

    @property
    def tpot_ms(self) -> float | None:
        """Median milliseconds of a later token."""
        gaps = self.inter_token_ms
        return statistics.median(gaps) if gaps else None

    @property
    def tokens(self) -> int:
        """Tokens announced per row; the ids returned are what counts."""
        return sum(emitted for _, emitted in self._steps)


def samples_for(percentile: float, confidence: float = 0.99) -> int:
    """Fewest samples whose maximum lies above the percentile: ceil(ln(1-confidence) / ln p).

    p50 7, p90 44, p95 90, p99 459.
    """
    return math.ceil(math.log(1 - confidence) / math.log(percentile / 100))


def percentile_ms(latencies_s: Sequence[float], percentile: float) -> float | None:
    """A percentile in ms (nearest rank), or None when the samples cannot support it."""
    if len(latencies_s) < samples_for(percentile):
        return None
    rank = math.ceil(percentile / 100 * len(latencies_s))
    return sorted(latencies_s)[rank - 1] * 1e3


def serving_figures(
    requests: Sequence[Any], responses: Sequence[Any], objective_s: float | None = None
) -> dict[str, float | None]:
    """Record keys of one replay: latency from the *scheduled* arrival, queueing included.

    ``objective_s``: a request counts as good when its latency is at most this.
    """
    latencies = [a.done_s - r.arrival_s for r, a in zip(requests, responses, strict=True)]
    first = [a.first_token_s - r.arrival_s for r, a in zip(requests, responses, strict=True)]
    later = [
        (a.done_s - a.first_token_s) / (n - 1)
        for r, a in zip(requests, responses, strict=True)
        if (n := len(a.ids) - len(r.ids)) > 1
    ]
    span = max(a.done_s for a in responses)
    good = None
    if objective_s is not None:
        good = sum(latency <= objective_s for latency in latencies) / span
    return {
        "ttft_ms": statistics.median(first) * 1e3,
        "tpot_ms": statistics.median(later) * 1e3 if later else None,
        "p50_ms": percentile_ms(latencies, 50),
        "p95_ms": percentile_ms(latencies, 95),
        "p99_ms": percentile_ms(latencies, 99),
        "requests_per_s": len(responses) / span,
        "goodput_rps": good,
    }


def new_tokens(output: Any, given: Any) -> list[int] | None:
    """New tokens per row (or request) in ids returned for ids given; None when neither is ids."""
    if isinstance(output, list | tuple) and output and hasattr(output[0], "ids"):
        return [len(a.ids) - len(r.ids) for a, r in zip(output, given, strict=True)]
    if _is_ids(output) and _is_ids(given) and len(output) == len(given):
        return [int(output.shape[1] - given.shape[1])] * len(output)
    return None


def _is_ids(value: Any) -> bool:
    ndim, dtype = getattr(value, "ndim", 0), str(getattr(value, "dtype", ""))
    return ndim == 2 and "int" in dtype


# ---- inputs changed in place -------------------------------------------------------------


def contents(value: Any) -> list[Any]:
    """The tensors of an input whose values a call reads; masks and positions left out."""
    if isinstance(value, Mapping):
        fixed = ("mask", "type", "position")
        return [t for k, v in value.items() if not any(w in k for w in fixed) for t in contents(v)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in contents(item)]
    if hasattr(value, "ids"):
        return contents(value.ids)
    return [value] if hasattr(value, "roll") else []


def change_in_place(value: Any) -> Callable[[], None]:
    """Give an input new content in the same storage; returns what restores it.

    Every tensor is rolled by one along its last dimension, so it stays in its distribution
    (a tensor that several items share is rolled once).
    """
    import torch

    with torch.inference_mode():  # inference tensors change nowhere else
        distinct = {tensor.data_ptr(): tensor for tensor in contents(value)}
        before = [(tensor, tensor.clone()) for tensor in distinct.values()]
        for tensor, old in before:
            tensor.copy_(old.roll(1, dims=-1) if old.ndim else old + 1)

    def restore() -> None:
        with torch.inference_mode():
            for tensor, old in before:
                tensor.copy_(old)

    return restore
