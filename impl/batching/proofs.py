"""Is the batch real? Read off the forwards of the model while it serves, not off the scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from impl.core import Engine, NotEngaged, Request


def crowd(engine: Engine) -> list[Request]:
    """More requests than slots, all there from the start, short and long answers by turns.

    Proofs serve this and not the cell's trace: who overlaps with whom must not depend on how fast
    the machine is.
    """
    prompts = [torch.arange(3, 6 + i % 4) for i in range(engine.batch + 4)]
    return [Request(i, ids, 2 + 5 * (i % 2)) for i, ids in enumerate(prompts)]


@dataclass
class Call:
    """A forward (or half of a packed one) from outside: where each request's last token stands."""

    decode: bool
    last: list[int]


def _calls(engine: Engine) -> list[Call]:
    """The forwards of the engine's model while it serves the crowd; spare rows are left out."""
    calls: list[Call] = []

    def see(_, args, options):
        ids, positions, cache = args
        if (ends := options.get("columns")) is not None:  # several requests in one row
            calls.extend(_packed(positions[0].tolist(), ends.tolist()))
            return
        decode = ids.shape[1] == 1 and "last_only" not in options
        if isinstance(positions, int):
            last = [positions + ids.shape[1] - 1] * len(ids)
        else:
            last = [p for p in positions[:, -1].tolist() if p != cache.max_len - 1]
        calls.append(Call(decode, last))

    hook = engine.model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        engine.serve(crowd(engine))
    finally:
        hook.remove()
    return calls


def _packed(positions: list[int], ends: list[int]) -> Iterator[Call]:
    """What one row of tokens is: a step of those that go on, and prompts of those that join."""
    starts = [0, *(end + 1 for end in ends)]
    spans = [(positions[start], positions[end]) for start, end in zip(starts, ends, strict=False)]
    for decode in (True, False):
        if last := [end for start, end in spans if (start > 0) == decode]:
            yield Call(decode, last)


def _mean_batch(calls: list[Call]) -> float:
    steps = [len(call.last) for call in calls if call.decode]
    mean = sum(steps) / max(len(steps), 1)
    if mean <= 1:
        raise NotEngaged(f"{len(steps)} decode steps served {mean:.2f} requests each, not several")
    return mean


def several_per_step(engine: Engine, run) -> str:
    mean = _mean_batch(_calls(engine))
    run()
    return f"a decode step served {mean:.1f} requests, {engine.stats['padding_waste']:.0%} padding"


def joins_while_others_decode(engine: Engine, run) -> str:
    """A request joined if a step after its prefill also continues rows of the step before it."""
    calls = _calls(engine)
    mean, before, fresh, joined = _mean_batch(calls), [], [], 0
    for call in calls:
        if not call.decode:
            fresh += [last + 1 for last in call.last]
            continue
        going = list(call.last)
        for first in fresh:  # less the rows whose first token was fed in this step
            if first in going:
                going.remove(first)
        if fresh and any(p + 1 in going for p in before):
            joined += len(fresh)
        before, fresh = call.last, []
    if not joined:
        raise NotEngaged("no request was admitted while another was decoding")
    run()
    return f"{joined} requests joined a running batch; a decode step served {mean:.1f}"
