"""Rounds of models that do not fit together: loaded, sampled and let go in turn.

A side's call builds its engine when another has taken its place, so a block begins with calls that
nobody times.  The blocks of a round lie seconds apart: a fixed piece of work is timed around each,
and where it drifts the machine was not the same for both sides, and the round is dropped.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from tests.plugins.sampler import (
    CHUNK,
    FEWEST_PAIRS,
    Call,
    DoesNotFit,
    Limits,
    Rounds,
    no_collection,
)

DRIFT = 0.03  # of the yardstick around a block
MOST_ROUNDS = 4 * FEWEST_PAIRS  # a machine that never rests yields fewer pairs, and says so


def sample_blocks(
    sides: dict[str, Call], inputs: Sequence[Any], watch: Any, limits: Limits,
    yardstick: Callable[[], float], seed: int = 0,
) -> tuple[Rounds, int]:  # fmt: skip
    """(rounds, number dropped): a block of each side per round, its median call one sample.

    ``yardstick()`` times a fixed piece of work in seconds.  Raises `DoesNotFit` after the first
    round when six of them do not fit.
    """
    rng, start = random.Random(seed), time.perf_counter()
    rounds, restless = Rounds({side: [] for side in sides}), Rounds({"variant": []})
    while not rounds.stop:
        samples, steady = {}, True
        for side in rng.sample(list(sides), len(sides)):
            samples[side], drift = _block(sides[side], inputs, watch, limits, yardstick, rng)
            steady = steady and drift <= DRIFT
        spent = time.perf_counter() - start
        done = len(rounds) + len(restless) + 1
        needs = FEWEST_PAIRS * spent / done
        if done == 1 and needs > limits.seconds and not limits.overspend(needs - spent):
            raise DoesNotFit(needs, limits.seconds)
        if steady:
            for side, seconds in samples.items():
                rounds.seconds[side].append(seconds)
        else:
            restless.seconds["variant"].append(samples["variant"])
        enough = len(rounds) >= FEWEST_PAIRS and spent > limits.seconds
        if enough or done >= MOST_ROUNDS:
            rounds.stop = "budget"
    if not len(rounds):  # a time, and no ratio
        restless.stop = rounds.stop
        return restless, len(restless)
    return rounds, len(restless)


def _block(
    call: Call, inputs: Sequence[Any], watch: Any, limits: Limits,
    yardstick: Callable[[], float], rng: random.Random,
) -> tuple[float, float]:  # fmt: skip
    """Seconds of a call, and how far the yardstick drifted around the block."""
    for _ in range(2):  # the first builds the engine
        call(inputs[0])
    watch.synchronize()
    share, start = limits.seconds / FEWEST_PAIRS / 4, time.perf_counter()
    marks: list[Any] = []
    with no_collection():
        before = yardstick()
        while len(marks) < 2 or (len(marks) < CHUNK and time.perf_counter() - start < share):
            marks.append(watch.time(call, [rng.choice(inputs)]))
        seconds = statistics.median(watch.read(marks))
        after = yardstick()
    return seconds, abs(after / before - 1)


def matmul_yardstick(device: str) -> Callable[[], float]:
    """Seconds of the quickest of several products that fit the caches, on ``device``."""
    import torch

    a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).to(device)

    def quickest() -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            torch.mm(a, a)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return quickest
