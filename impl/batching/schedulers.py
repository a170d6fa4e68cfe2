"""Schedulers over the lean decoder: who is in the batch, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from impl.core import Engine, Request, Response, technique
from impl.fidelity import same_tokens
from impl.machine import finish

from .proofs import joins_while_others_decode, several_per_step
from .replay import Arrivals, Clock, Meter, slots_for


@technique(phase="schedule", fidelity=same_tokens, needs={"generate", "lean"}, min_batch=2,
           replaces="scheduler", effect=several_per_step, peer="peer_padded_generate")  # fmt: skip
def static_batching(engine: Engine) -> Engine:
    """time = sum over batches of the longest answer: a batch is formed, padded, and run to its end.

    Waits until ``engine.batch`` requests have arrived or none is left, pads the prompts on the
    left and runs every row until the longest answer of the batch is written.  Helps when requests
    are alike and arrive together.  Does not when lengths differ: finished rows keep computing
    (``padding_waste``), and who comes later waits for the whole batch.
    Source: the baseline of Yu et al. 2022 (Orca), https://www.usenix.org/conference/osdi22/presentation/yu
    """
    limit = engine.model.config.max_positions
    engine.serve = lambda requests: serve_static(engine, requests, limit)
    return engine


@torch.inference_mode()
def serve_static(
    engine: Engine,
    requests: list[Request],
    max_positions: int,
    clock: Clock | None = None,
    max_wait_s: float = math.inf,
) -> list[Response]:
    """Answers in the order of ``requests``; all of a batch are done when its last row is.

    max_wait_s  a batch that is not full starts when its first request has waited so long
    """
    if not requests:
        return []
    slots, device = slots_for(requests, max_positions), engine.device
    clock, meter, answers = clock or Clock(), Meter(engine, slots), {}
    arrivals = Arrivals(requests, clock)
    while arrivals:
        arrivals.wait(engine.batch, max_wait_s)
        batch = arrivals.take(engine.batch)
        cache = engine.new_cache(engine.batch, slots)
        if cache.lockstep:  # shapes may change: no idle rows, and attention reads what is in use
            cache = cache.narrow(0, len(batch))
        ids, positions = pad_left(batch, cache.batch, slots - 1)
        longest, steps = ids.shape[1], max(r.max_new_tokens for r in batch)
        end = [len(r.ids) + r.max_new_tokens - 1 for r in batch]
        end = torch.tensor(end + [slots - 1] * (cache.batch - len(batch)))[:, None].to(device)
        ids, position = ids.to(device), positions.to(device)
        new = []  # of (B, 1), a column per step
        for step in range(steps):
            if cache.lockstep:
                cache.slots = min(longest + step, slots)
            if step:
                # a row that is done stays at its end: it computes, and nothing reads it
                position = torch.minimum(position + 1, end)
                running = sum(r.max_new_tokens > step for r in batch)
                token = meter.forward(new[-1], position, cache, running)
            else:
                token = meter.forward(ids, position, cache, last_only=True)
                position = position[:, -1:]
                finish(device)
                first = clock.now()
            new.append(token)
        columns = torch.cat(new, 1).cpu() if new else torch.empty(len(batch), 0, dtype=torch.int64)
        done = clock.now()
        for r, row in zip(batch, columns, strict=False):
            out = torch.cat((r.ids.cpu(), row[: r.max_new_tokens])).to(r.ids.device)
            answers[r.id] = Response(r.id, out, first if r.max_new_tokens else done, done)
    meter.report(requests, clock)
    return [answers[r.id] for r in requests]


def pad_left(batch: list[Request], rows: int, spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts right-aligned, ids and positions (rows, longest) int64.

    Padding stands at the ``spare`` position, a slot that no row uses: what it writes there no
    token of the row can see, since a query sees the slots up to its own position.
    """
    longest = max(len(r.ids) for r in batch)
    ids = torch.zeros(rows, longest, dtype=torch.int64)
    positions = torch.full_like(ids, spare)
    for row, r in enumerate(batch):
        T = len(r.ids)
        ids[row, longest - T :] = r.ids
        positions[row, longest - T :] = torch.arange(T)
    return ids, positions


@dataclass
class Seat:
    """A request that holds a slot of the cache; ``length`` tokens of it are known."""

    request: Request
    length: int
    first_token_s: float

    @property
    def end(self) -> int:
        return len(self.request.ids) + self.request.max_new_tokens


@technique(phase="schedule", fidelity=same_tokens, needs={"generate", "lean"}, min_batch=2,
           replaces="scheduler", effect=joins_while_others_decode,
           peer="peer_generate_batch")  # fmt: skip
def continuous_batching(engine: Engine) -> Engine:
    """Admission per step: a finished request's slot goes to the next one at once, nobody waits.

    Rows of the cache are slots at different lengths.  Before each step every request that has
    arrived and finds a free slot is prefilled, alone and so without padding; then one token is
    decoded for all.  Helps when lengths differ and requests keep coming.  Does not when a prefill
    is long: it stops everybody's next token (``chunked_prefill``).
    Where shapes may change (a growing cache, eager steps) only the rows in use are computed: a
    freed row takes over the last one, one copy per finished request.  A static cache keeps its
    width, idle rows writing to a spare slot, so that a compiled step is never compiled again.
    Source: Yu et al. 2022 (Orca), https://www.usenix.org/conference/osdi22/presentation/yu
    """
    limit = engine.model.config.max_positions
    engine.serve = lambda requests: serve_continuous(engine, requests, limit)
    return engine


@torch.inference_mode()
def serve_continuous(
    engine: Engine, requests: list[Request], max_positions: int, clock: Clock | None = None
) -> list[Response]:
    """Answers in the order of ``requests``."""
    if not requests:
        return []
    slots, device, B = slots_for(requests, max_positions), engine.device, engine.batch
    clock, meter, answers = clock or Clock(), Meter(engine, slots), {}
    arrivals, cache = Arrivals(requests, clock), engine.new_cache(B, slots)
    compact, rows = cache.lockstep, cache
    seats: list[Seat | None] = [None] * B  # a compact batch holds its requests in the first rows
    text = torch.zeros(B, slots, dtype=torch.int64, device=device)  # prompt and answer
    token = torch.zeros(B, 1, dtype=torch.int64, device=device)  # the newest of each row ...
    position = torch.full_like(token, slots - 1)  # ... and where it stands; idle: the spare slot
    live = torch.zeros_like(token)

    def leave(row: int) -> None:
        seat = seats[row]
        out = text[row, : seat.end].to(seat.request.ids.device, copy=True)
        finish(device)
        answers[seat.request.id] = Response(seat.request.id, out, seat.first_token_s, clock.now())
        last = sum(s is not None for s in seats) - 1
        if compact and row != last:
            cache.copy_row(last, row, seats[last].length)
            for state in (text, token, position):
                state[row] = state[last]
            seats[row], row = seats[last], last
        seats[row], position[row], live[row] = None, slots - 1, 0

    while arrivals or any(seats):
        if not any(seats):
            arrivals.wait()
        for r in arrivals.take(seats.count(None)):
            row, T = seats.index(None), len(r.ids)
            text[row, :T] = r.ids.to(device)
            if r.max_new_tokens:
                prompt, alone = text[row : row + 1, :T], cache.narrow(row, 1)
                token[row] = meter.forward(prompt, 0, alone, last_only=True)[0]
                text[row, T], position[row], live[row] = token[row, 0], T, 1
                finish(device)
            seats[row] = Seat(r, T + min(r.max_new_tokens, 1), clock.now())
            if seats[row].length == seats[row].end:
                leave(row)
        busy = [s for s in seats if s is not None]
        if not busy:
            continue
        width = len(busy) if compact else B
        if rows.batch != width:
            rows = cache.narrow(0, width)
        if compact:
            rows.slots = max(s.length for s in busy)
        token[:width] = meter.forward(token[:width], position[:width], rows, len(busy))
        position += live
        text.scatter_(1, position, token)
        for row in reversed(range(B)):
            if (seat := seats[row]) is not None:
                seat.length += 1
                if seat.length == seat.end:
                    leave(row)
    meter.report(requests, clock)
    return [answers[r.id] for r in requests]
