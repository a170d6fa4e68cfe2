"""Admission per step: a finished request makes room for the next one at once."""

from __future__ import annotations

import torch

from impl.core import Engine, Request, Response, technique
from impl.fidelity import same_tokens
from impl.machine import finish

from .packed import PackedPrompts, Seat, SharedSlots, first_fit, next_step
from .proofs import joins_while_others_decode
from .replay import Arrivals, Clock, Meter, Pace, sent, slots_for


@technique(phase="schedule", fidelity=same_tokens, needs={"generate", "lean"}, min_batch=2,
           replaces="scheduler", effect=joins_while_others_decode,
           peer="peer_generate_batch")  # fmt: skip
def continuous_batching(engine: Engine) -> Engine:
    """time = sum over steps of max(weights / bandwidth, 2 P tokens / FLOPS): nobody waits.

    Before each step every request that has arrived and finds room is admitted.  Its whole prompt
    and the newest token of everybody else are one row of tokens: linear layers see them as one
    product, attention takes them apart.  So a prompt costs its arithmetic, not a pass over the
    weights of its own, and nothing is padded or copied when requests come and go.
    Helps when lengths differ and requests keep coming.  Does not when a prompt is long: it
    stretches everybody's step (``chunked_prefill``).
    Where shapes may not change (a static cache under a compiled step) requests are rows of the
    cache: prompts that wait are packed into one forward, a step of single tokens follows.
    Source: Yu et al. 2022 (Orca), https://www.usenix.org/conference/osdi22/presentation/yu;
    prompts and single tokens in one step: Agrawal et al. 2023 (Sarathi),
    https://arxiv.org/abs/2308.16369
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
    slots = slots_for(requests, max_positions)
    clock, meter = clock or Clock(), Meter(engine, slots)
    arrivals, batch = Arrivals(requests, clock), engine.batch
    if engine.new_cache(1, 1).lockstep:  # shapes may change from step to step
        answers = serve_packed(engine, arrivals, engine.new_cache(1, batch * slots), meter)
    else:
        answers = serve_rows(engine, arrivals, engine.new_cache(batch, slots), meter)
    meter.report(requests, clock)
    return [answers[r.id] for r in requests]


def serve_packed(engine: Engine, arrivals: Arrivals, cache, meter: Meter) -> dict[int, Response]:
    """Every step is one row of tokens: new prompts, and one token of each request before them."""
    shared, clock, device = SharedSlots(cache), arrivals.clock, engine.device
    text = torch.zeros(cache.max_len, dtype=torch.int64, device=device)  # token of each slot
    pace, seats = Pace(device), []
    answers: dict[int, Response] = {}
    while arrivals or seats:
        if not seats:
            arrivals.wait()
        while len(seats) < engine.batch and (arrived := arrivals.take(1)):
            (r,) = arrived
            if not r.max_new_tokens:
                answers[r.id] = Response(r.id, r.ids.clone(), clock.now(), clock.now())
                continue
            place = first_fit(seats, len(r.ids) + r.max_new_tokens, cache.max_len)
            if place is None:
                arrivals.put_back(r)
                break
            text[place : place + len(r.ids)] = r.ids.to(device)
            seats.append(Seat(r, place, len(r.ids)))
        if not seats:
            continue
        step = next_step(seats)
        at, positions = sent((step.at, step.positions), device)
        columns = sent(step.columns, device)
        decoding = len(seats) - len(step.prompts)
        longest = 1 + max(step.positions[:decoding], default=0)
        shared.point(at, positions, step.prompts, longest)
        new = meter.forward(text[at][None], positions[None], shared, decoding, columns=columns)
        text[at[columns] + 1] = new[0]
        pace.step(due=any(not s.fed or s.length + 1 == s.end for s in seats))
        for seat in seats:
            if not seat.fed:
                seat.first_token_s = clock.now()
            seat.fed, seat.length = seat.length, seat.length + 1
            if seat.length == seat.end:
                out = text[seat.place : seat.place + seat.end]
                out = out.to(seat.request.ids.device, copy=True)
                answers[seat.request.id] = Response(
                    seat.request.id, out, seat.first_token_s, clock.now()
                )
        seats = [s for s in seats if s.length < s.end]
    return answers


def serve_rows(engine: Engine, arrivals: Arrivals, cache, meter: Meter) -> dict[int, Response]:
    """Requests are rows of the cache: waiting prompts in one forward, then a token for each row.

    The step keeps its width, idle rows writing to a spare slot: it is never compiled again.
    """
    B, slots, device, clock = engine.batch, cache.max_len, engine.device, arrivals.clock
    answers: dict[int, Response] = {}
    seats: list[Seat | None] = [None] * B
    text = torch.zeros(B, slots, dtype=torch.int64, device=device)  # prompt and answer
    token = torch.zeros(B, 1, dtype=torch.int64, device=device)  # the newest of each row ...
    position = torch.full_like(token, slots - 1)  # ... and where it stands; idle: the spare slot
    live = torch.zeros_like(token)

    def leave(row: int) -> None:
        seat = seats[row]
        out = text[row, : seat.end].to(seat.request.ids.device, copy=True)
        finish(device)
        answers[seat.request.id] = Response(seat.request.id, out, seat.first_token_s, clock.now())
        seats[row], position[row], live[row] = None, slots - 1, 0

    def admit(new: list[Request]) -> None:
        asked = [r for r in new if r.max_new_tokens]
        free = [row for row in range(B) if seats[row] is None][: len(asked)]
        if asked:
            lengths = [len(r.ids) for r in asked]
            ids = torch.cat([r.ids for r in asked])[None].to(device)
            prompts = PackedPrompts(cache, free, lengths)
            positions = torch.cat([torch.arange(T) for T in lengths])[None].to(device)
            last = (torch.tensor(lengths).cumsum(0) - 1).to(device)
            first = meter.forward(ids, positions, prompts, columns=last)[0]
            finish(device)
        now = clock.now()
        for i, (r, row) in enumerate(zip(asked, free, strict=True)):
            T = len(r.ids)
            text[row, :T] = r.ids.to(device)
            text[row, T] = token[row] = first[i]
            position[row], live[row] = T, 1
            seats[row] = Seat(r, row, T + 1, T, now)
        for r in new:
            if not r.max_new_tokens:
                answers[r.id] = Response(r.id, r.ids.clone(), now, now)
        for row in free:
            if seats[row].length == seats[row].end:
                leave(row)

    while arrivals or any(seats):
        if not any(seats):
            arrivals.wait()
        while seats.count(None) and (new := arrivals.take(seats.count(None))):
            admit(new)
        busy = [s for s in seats if s is not None]
        if not busy:
            continue
        token = meter.forward(token, position, cache, len(busy))
        position += live
        text.scatter_(1, position, token)
        for seat in busy:
            seat.length += 1
            if seat.length == seat.end:
                leave(seat.place)
    return answers
