"""What every scheduler needs: a clock, the queue of arrivals, and a count of what is computed."""

from __future__ import annotations

import math
import time

import torch

from impl.core import Engine, Request, StudyError
from impl.machine import finish

SLOT_MULTIPLE = 64  # cache lengths are rounded up to it, so that traces share compiled shapes


class Clock:
    """Seconds since the replay began; ``waited`` of them were spent asleep."""

    def __init__(self):
        self.start, self.waited = time.perf_counter(), 0.0

    def now(self) -> float:
        return time.perf_counter() - self.start

    def sleep_until(self, moment: float) -> None:
        before = self.now()
        while (left := moment - self.now()) > 0:
            time.sleep(left)
        self.waited += self.now() - before


class Pace:
    """Lets the host be one step ahead of the device: it prepares one while another is computed.

    Lengths are known in advance, so that the host need not see a token to go on.  It waits where
    somebody's first or last token is due, which exists once it is computed; and further ahead
    than a step it would admit late those who arrive meanwhile.  A CPU computes when it is told.
    """

    def __init__(self, device: torch.device):
        self.device, self.before = device, None

    def step(self, due: bool) -> None:
        """After the launch of a step; all is computed on return if ``due``."""
        if due or self.device.type != "cuda":
            finish(self.device)
            self.before = None
            return
        launched = torch.cuda.Event()
        launched.record()
        if self.before is not None:
            self.before.synchronize()
        self.before = launched


def sent(numbers, device: torch.device) -> torch.Tensor:
    """int64 numbers on the device, without waiting for what it computes (from pinned memory)."""
    pinned = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


class Arrivals:
    """The requests of a replay in order of arrival; none is handed out before its time."""

    def __init__(self, requests: list[Request], clock: Clock):
        self.clock = clock
        self.coming = sorted(requests, key=lambda r: (r.arrival_s, r.id), reverse=True)

    def __bool__(self) -> bool:
        return bool(self.coming)

    def take(self, most: int) -> list[Request]:
        """Up to ``most`` requests that have arrived, the first come first."""
        taken, now = [], self.clock.now()
        while self.coming and len(taken) < most and self.coming[-1].arrival_s <= now:
            taken.append(self.coming.pop())
        return taken

    def put_back(self, request: Request) -> None:
        """Hand a request out again, as the next one: there was no room for it."""
        self.coming.append(request)

    def wait(self, count: int = 1, max_wait_s: float = math.inf) -> None:
        """Sleep until ``count`` (or all that are left) have arrived, or one has waited enough."""
        count = min(count, len(self.coming))
        if count:
            enough = self.coming[-1].arrival_s + max_wait_s
            self.clock.sleep_until(min(self.coming[-count].arrival_s, enough))


def slots_for(requests: list[Request], max_positions: int) -> int:
    """Cache slots per row: those of the longest request, rounded up.

    The last one is spare: the last token of an answer is never fed back.  A server is configured
    with the longest request that it accepts; here that is the trace's longest.  Raises
    ``StudyError`` for a request without a prompt or longer than the model's positions.
    """
    for r in requests:
        if len(r.ids) == 0:
            raise StudyError(f"the prompt of request {r.id} is empty; give at least one token")
        if len(r.ids) + r.max_new_tokens > max_positions:
            raise StudyError(
                f"request {r.id} needs {len(r.ids) + r.max_new_tokens} positions ({len(r.ids)} of "
                f"prompt, {r.max_new_tokens} new) and the model has {max_positions}; shorten the "
                "prompt or ask for fewer new tokens"
            )
    longest = max(len(r.ids) + r.max_new_tokens for r in requests)
    return min(math.ceil(longest / SLOT_MULTIPLE) * SLOT_MULTIPLE, max_positions)


class Meter:
    """Calls the engine's model, whatever it is by now, and counts what is computed."""

    def __init__(self, engine: Engine, slots: int):
        self.engine, self.model_s, self.tokens, self.steps, self.rows = engine, 0.0, 0, 0, 0
        if hasattr(engine.model, "extend_positions"):
            engine.model.extend_positions(slots)

    def forward(self, ids, positions, cache, rows: int = 0, **options) -> torch.Tensor:
        """Greedy tokens (B, 1) after the last column, or (B, N) after N ``columns``.

        ``rows`` of the requests in the step are decoding.
        """
        start = time.perf_counter()
        logits = self.engine.model(ids, positions, cache, **options)
        self.model_s += time.perf_counter() - start
        self.tokens += ids.numel()
        self.steps += bool(rows)
        self.rows += rows
        return (logits if "columns" in options else logits[:, -1:]).argmax(-1)

    def report(self, requests: list[Request], clock: Clock) -> None:
        """Fill the engine's ``stats``: shares of what was computed, and of the time."""
        useful = sum(len(r.ids) + r.max_new_tokens - 1 for r in requests if r.max_new_tokens)
        mean = self.rows / max(self.steps, 1)
        self.engine.stats.update(
            steps=self.steps, mean_batch=mean, slot_occupancy=mean / self.engine.batch,
            padding_waste=1 - useful / max(self.tokens, 1),
        )  # fmt: skip
        busy = clock.now() - clock.waited
        if self.engine.device.type == "cpu" and busy > 0:  # elsewhere launching is not running
            self.engine.stats["scheduler_share"] = 1 - self.model_s / busy
