"""Paired sampling: all sides of a cell timed in rounds of random order, and the statistics.

A claim is a ratio (intervals.py).  Bursts of load and drift fall on all sides of a round alike, so
ratios hold on machines where milliseconds do not.
"""

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.plugins.intervals import Ratio, paired_ratio

FEWEST_PAIRS = 6  # below it no interval covers 95 %
PRECISE_PAIRS = 20
MOST_PAIRS = 400
CHUNK = 8
SHORTEST_SAMPLE = 200e-6  # s; shorter calls repeat to fill it
LONGEST_REPEAT = 20e-3  # s; repeating must not make a sample of the slowest side longer
LEAST_OF_ROUND = 0.05  # quick sides are called several times in a round, till they fill as much,
MUCH_OF_ROUND = 0.1  # or as much where there is time for 20 such rounds,
MOST_OF_SIDE = 8  # or so many times

Call = Callable[[Any], Any]


class Device(Protocol):
    """What a watch needs of a device; ``torch.cuda`` is one."""

    def synchronize(self) -> None: ...


class Host:
    """A device whose calls return when their work is done: the CPU."""

    def synchronize(self) -> None:
        """Nothing is ever outstanding."""


class ReplayClock:
    """Idle: wall seconds after a device sync.  Replaying: 0.0 and one sample per round.

    pytest-benchmark's timer (``config.option.benchmark_timer``), so that a plain ``benchmark``
    is right on asynchronous devices, and our samples enter its statistics to the last bit.
    """

    __module__, __name__ = "tests.plugins.sampler", "clock"  # options.timer in the JSON

    def __init__(self) -> None:
        self._tape: Iterator[float] | None = None

    def __call__(self) -> float:
        if self._tape is not None:
            return next(self._tape)
        synchronize_all()
        return time.perf_counter()

    def replay(self, benchmark: Any, seconds: Sequence[float], result: Any = None) -> Any:
        """File ``seconds`` as the rounds of the ``benchmark`` fixture; returns ``result``."""
        self._tape = (reading for s in seconds for reading in (0.0, s))
        try:
            return benchmark.pedantic(lambda: result, rounds=len(seconds), iterations=1)
        except BaseException:
            benchmark.has_error = True  # Ctrl-C half-way: no half record
            raise
        finally:
            self._tape = None


clock = ReplayClock()


def synchronize_all() -> None:
    """Wait for the accelerator of this process, if it has used one."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- watches -----------------------------------------------------------------------------


class WallWatch:
    """What a caller waits for: launches, device work, and the final synchronization."""

    mode, cold = "wall", False

    def __init__(self, device: Device | None = None) -> None:
        self.synchronize = (device or Host()).synchronize

    def time(self, call: Call, inputs: Sequence[Any]) -> float:
        """Seconds per call."""
        self.synchronize()
        start = time.perf_counter()
        for x in inputs:
            call(x)
        self.synchronize()
        return (time.perf_counter() - start) / len(inputs)

    def read(self, marks: list[float]) -> list[float]:
        """The samples themselves."""
        return marks


class EventWatch:
    """Device time between two events; nothing waits until a chunk of samples is read.

    With ``flush`` each sample is one call on cold caches.
    """

    mode = "event"

    def __init__(self, device: Any, flush: Callable[[], Any] | None = None) -> None:
        self.device, self.flush, self.cold = device, flush, flush is not None
        self.synchronize = device.synchronize

    def time(self, call: Call, inputs: Sequence[Any]) -> Any:
        """Marks whose distance in time ``read`` takes later."""
        begin, end = (self.device.Event(enable_timing=True) for _ in range(2))
        if self.flush:
            self.flush()  # outside the events
        begin.record()
        for x in inputs:
            call(x)
        end.record()
        return begin, end, len(inputs)

    def read(self, marks: list[Any]) -> list[float]:
        """Seconds per call of each mark."""
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 / calls for begin, end, calls in marks]


class GraphWatch(EventWatch):
    """Event time of replaying a captured CUDA graph: the device's work without its launches."""

    mode = "graph"

    def __init__(self, device: Any, flush: Callable[[], Any] | None = None) -> None:
        super().__init__(device, flush)
        self._graphs: dict[int, tuple[Any, Any, Call]] = {}

    def time(self, call: Call, inputs: Sequence[Any]) -> Any:
        """Capture at first sight, then replay on a static copy of the input."""
        if id(call) not in self._graphs:
            self._graphs[id(call)] = self._capture(call, inputs[0])
        graph, static, _ = self._graphs[id(call)]
        static.copy_(inputs[0])
        return super().time(lambda _: graph.replay(), inputs)

    def _capture(self, call: Call, x: Any) -> tuple[Any, Any, Call]:
        static, side = x.clone(), self.device.Stream()
        side.wait_stream(self.device.current_stream())
        with self.device.stream(side):
            for _ in range(3):  # lazy initialization must not be captured
                call(static)
        self.device.current_stream().wait_stream(side)
        graph = self.device.CUDAGraph()
        with self.device.graph(graph):
            call(static)
        return graph, static, call


def cold_cache(device: str, l2_bytes: int = 0) -> Callable[[], Any]:
    """A flush: zero 256 MB, at least twice the L2, so that the next call reads DRAM."""
    import torch

    buffer = torch.empty(max(256 << 20, 2 * l2_bytes), dtype=torch.int8, device=device)
    return buffer.zero_


def hidden_work(call: Call, inputs: Sequence[Any], device: Any, fill_s: float = 5e-3) -> float:
    """Wall time over event time of the same back-to-back calls; far above 1 = another stream.

    Both include launches; only work outside the current stream, which events do not see and the
    device-wide synchronization does, can separate them.
    """
    watch = EventWatch(device)

    def both(calls: int) -> tuple[float, float]:
        batch = [inputs[i % len(inputs)] for i in range(calls)]
        device.synchronize()
        start = time.perf_counter()
        mark = watch.time(call, batch)
        device.synchronize()
        return time.perf_counter() - start, watch.read([mark])[0] * calls

    wall, _ = both(1)
    trials = [both(min(1000, max(3, math.ceil(fill_s / wall)))) for _ in range(3)]
    return min(wall / event for wall, event in trials)


# ---- rounds ------------------------------------------------------------------------------


@dataclass
class Rounds:
    """Seconds per call of every side, one sample of each per round."""

    seconds: dict[str, list[float]]
    stop: str = ""  # 'precise' or 'budget'
    calls: int = 1  # calls in one sample
    reference: str = "variant"  # the side that the others' intervals are about

    def __len__(self) -> int:
        return len(self.seconds[self.reference])

    def ratio(self, side: str = "baseline") -> Ratio:
        """``side`` time / variant time."""
        return paired_ratio(self.seconds[side], self.seconds[self.reference])

    def half_width(self) -> float:
        """The widest relative half-width among the sides."""
        sides = [side for side in self.seconds if side != self.reference]
        if not sides:  # nothing to pair with: how well its own median is known
            times = self.seconds[self.reference]
            return paired_ratio(times, [statistics.median(times)] * len(times)).half_width
        return max(self.ratio(side).half_width for side in sides)


class DoesNotFit(Exception):
    """Six rounds need more seconds than the cell has."""

    def __init__(self, needs: float, has: float) -> None:
        super().__init__(f"six pairs need {needs:.2g} s and its share is {max(has, 0):.2g} s")
        self.needs, self.has = needs, has


# ---- sampling ----------------------------------------------------------------------------


def settle(call: Call, inputs: Sequence[Any], watch: Any, seconds: float, fewest: int = 2) -> float:
    """Warm up for ``seconds``, ``fewest`` to 50 calls; return the seconds of the quickest call."""
    times: list[float] = []
    while len(times) < fewest or (len(times) < 50 and sum(times) < seconds):
        start = time.perf_counter()
        call(inputs[len(times) % len(inputs)])
        watch.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage now, and not again until the end (cheap after ``gc.freeze``)."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@dataclass
class Limits:
    """When to stop: a share of ``seconds``, a relative half-width, a number of rounds."""

    seconds: float = 1.0
    precision: float = 0.01
    overspend: Callable[[float], bool] = lambda needs: False  # may six rounds take this long?
    most: int = MOST_PAIRS
    chunk: int = CHUNK
    shortest: float = field(default=SHORTEST_SAMPLE)
    settling: int = 2  # untimed calls of each side, at least
    pause: Callable[[], float] = lambda: 0.0  # after each round; seconds that do not count
    known: dict[str, float] = field(default_factory=dict)  # seconds of a side's call before


def samples_per_round(quickest: dict[str, float], seconds: float = 0.0) -> dict[str, int]:
    """How often a round calls each side, at moments spread over it.

    A short call sees one moment of a machine whose memory others use too: beside a baseline of a
    second, 25 ms strayed by 27 % where 150 ms strayed by 10 %.
    """

    def filling(part: float) -> dict[str, int]:
        least = part * sum(quickest.values())
        return {
            side: max(1, min(MOST_OF_SIDE, round(least / max(once, 1e-9))))
            for side, once in quickest.items()
        }

    often = filling(MUCH_OF_ROUND)
    fits = PRECISE_PAIRS * seconds_per_round(often, quickest) <= seconds
    return often if fits else filling(LEAST_OF_ROUND)


def seconds_per_round(often: dict[str, int], quickest: dict[str, float]) -> float:
    return sum(often[side] * once for side, once in quickest.items())


def balanced_orders(slots: list[str], rounds: int, rng: random.Random) -> list[list[str]]:
    """Random orders and the reverse of each, shuffled: nobody comes first more often.

    Who comes first finds the inputs cold, 2 % of a call of 5 us.  Of orders drawn one by one a
    side is now and then first so often that all middle ratios lie at +2 %: as narrow an interval
    as sampling waits for, and a false one.  Of 400 comparisons of code with itself 40 ended so.
    """
    drawn = [rng.sample(slots, len(slots)) for _ in range((rounds + 1) // 2)]
    orders = drawn + [order[::-1] for order in drawn]
    rng.shuffle(orders)
    return orders[:rounds]


def _needs_and_has(
    rounds: Rounds, quickest: dict[str, float], limits: Limits, start: float
) -> tuple[float, float]:
    """Seconds that six rounds take, and that are left of the share."""
    often = samples_per_round(quickest)
    needs = FEWEST_PAIRS * rounds.calls * seconds_per_round(often, quickest)
    return needs, limits.seconds - (time.perf_counter() - start)


def _fits(rounds: Rounds, quickest: dict[str, float], limits: Limits, start: float) -> bool:
    needs, has = _needs_and_has(rounds, quickest, limits, start)
    return needs <= has or limits.overspend(needs)


def sample_rounds(
    sides: dict[str, Call], inputs: Sequence[Any], watch: Any, limits: Limits, seed: int = 0,
    reference: str = "variant",
) -> Rounds:  # fmt: skip
    """Time all sides on the same inputs until every interval is narrow or the share is spent.

    ``sides`` maps ``reference`` and what it is compared with to calls.  The order inside a round
    is random (``seed``) and balanced over a chunk; the sample of a side that it calls several
    times is their mean.  Raises `DoesNotFit` before the first sample.
    """
    rng, start = random.Random(seed), time.perf_counter()
    rounds = Rounds({side: [] for side in sides}, reference=reference)
    settling = limits.seconds / 10 / len(sides)

    def settled(side: str) -> float:
        return settle(sides[side], inputs, watch, settling, limits.settling)

    # a call before that took longer than the time for settling has settled its side
    called = {side: s for side, s in limits.known.items() if s > settling}
    quickest = {side: called[side] if side in called else settled(side) for side in sides}
    if not watch.cold:  # after a flush: one cold call
        rounds.calls = math.ceil(limits.shortest / max(min(quickest.values()), 1e-9))
        longest = math.ceil(LONGEST_REPEAT / max(quickest.values()))
        rounds.calls = min(rounds.calls, longest)  # 1000 times apart: no need to wait
    if not _fits(rounds, quickest, limits, start) and called:  # which may have compiled
        quickest |= {side: settled(side) for side in called}
    if not _fits(rounds, quickest, limits, start):
        raise DoesNotFit(*_needs_and_has(rounds, quickest, limits, start))
    left = limits.seconds - (time.perf_counter() - start)
    often = samples_per_round(quickest, left / rounds.calls)
    slots = [side for side in sides for _ in range(often[side])]
    with no_collection():
        while not rounds.stop:
            marks: dict[str, list[Any]] = {side: [] for side in sides}
            spent = False
            for i, order in enumerate(balanced_orders(slots, limits.chunk, rng), 1):
                batch = [rng.choice(inputs) for _ in range(rounds.calls)]
                for side in order:
                    marks[side].append(watch.time(sides[side], batch))
                start += limits.pause()
                spent = time.perf_counter() - start > limits.seconds
                if spent and len(rounds) + i >= FEWEST_PAIRS:
                    break
            for side, taken in marks.items():
                seconds, n = watch.read(taken), often[side]
                means = [sum(seconds[i : i + n]) / n for i in range(0, len(seconds), n)]
                rounds.seconds[side] += means
            if len(rounds) >= PRECISE_PAIRS and rounds.half_width() <= limits.precision:
                rounds.stop = "precise"
            elif spent or len(rounds) >= limits.most:
                rounds.stop = "budget"
    return rounds
