"""Schedulers over the lean decoder: who is in the batch, and when."""

from __future__ import annotations

import math

import torch

from impl.core import Engine, Request, Response, technique
from impl.fidelity import same_tokens
from impl.machine import finish

from .proofs import several_per_step
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
