"""The loop: feed the guesses to the target, keep what agrees, emit one token of its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from impl.core import GREEDY, Engine, Sampling, StudyError

from .drafters import streams


def agreed(guesses: list[int], choices: list[int]) -> int:
    """How many leading guesses are what the target chooses at their places."""
    for i, guess in enumerate(guesses):
        if guess != choices[i]:
            return i
    return len(guesses)


def accept_drawn(guesses: list[int], q: Tensor, p: Tensor, accept: Tensor, repair: Tensor
                 ) -> list[int]:  # fmt: skip
    """Tokens emitted for one row: kept guesses, then one of the target's own; distributed as p.

    guesses (k,) were drawn from q (k, V); p (k + 1, V) is the target; accept (k,) and repair
    (k + 1,) are numbers in [0, 1).  Guess x is kept with probability min(1, p(x) / q(x)), else
    the place is drawn from max(0, p - q) normalized; after k kept ones the last from p.
    Source: Leviathan et al. 2023, https://arxiv.org/abs/2211.17192;
    Chen et al. 2023, https://arxiv.org/abs/2302.01318
    """
    from impl.models.generation import draw

    emitted = []
    for i, x in enumerate(guesses):
        if accept[i] * q[i, x] < p[i, x]:
            emitted.append(x)
            continue
        left = (p[i] - q[i]).clamp_min(0)  # empty only if p == q to rounding: then draw from p
        return [*emitted, int(draw(left if left.sum() > 0 else p[i], repair[i]))]
    return [*emitted, int(draw(p[-1], repair[len(emitted)]))]


@torch.inference_mode()
def speculate(engine: Engine, drafter, ids: Tensor, max_new_tokens: int,
              sampling: Sampling = GREEDY, on_token=None, rows: Sequence[int] | None = None
              ) -> Tensor:  # fmt: skip
    """ids (B, T) int64 -> (B, T + max_new_tokens), the target verifying what ``drafter`` proposes.

    ``on_token`` gets (B, n) tokens as soon as every row has them; together they are the answer.
    Fills ``stats``: ``k``, ``target_steps`` (verifying or plain forwards after the prompt),
    ``drafted`` and ``accepted`` guesses, ``accept_rate`` = accepted / drafted, ``mean_accepted``
    = tokens emitted per row and step.
    """
    from impl.models.generation import distribution, draw, next_tokens, uniforms

    B, T = ids.shape
    if T == 0:
        raise StudyError("the prompt is empty; give at least one token")
    if max_new_tokens == 0:
        return ids.clone()
    model, k, length, device = engine.model, drafter.k, T + max_new_tokens, ids.device
    rows = range(B) if rows is None else rows
    own = accept = None
    if sampling.temperature and drafter.exact_draws:
        own = uniforms(sampling, rows, max_new_tokens, device)
    elif sampling.temperature:
        _, accept, own = streams(sampling, rows, max_new_tokens, device)
    model.extend_positions(length)
    cache = engine.new_cache(B, length)
    logits = model(ids, 0, cache, last_only=True)
    first = next_tokens(logits, sampling, None if own is None else own[:, :1])  # (B, 1)
    if on_token is not None:
        on_token(first)
    drafter.start(ids, length, sampling, rows)
    took = getattr(drafter, "took", None)  # a drafter that weighs the cost of its guesses
    alone = took is not None and B == 1 and not sampling.temperature
    run = getattr(model, "greedy_run", None) if alone else None  # plain steps in one call
    texts = first.tolist()  # the new tokens of each row
    emitted = first.tolist()  # those of the last step
    shown, count = 1, Counter(target_steps=0, row_steps=0, drafted=0, accepted=0)
    while (shortest := min(map(len, texts))) < max_new_tokens:
        began = time.perf_counter()
        # a last place needs no guess: the target's own token fills it
        proposal = drafter.propose(emitted) if shortest < max_new_tokens - 1 else None
        width = 1 if proposal is None else k + 1
        tokens = torch.tensor([text[-1:] for text in texts], device=device)  # (B, 1)
        if proposal is None and run is not None:
            steps = min(drafter.patience(), max_new_tokens - shortest)
            emitted = run(tokens, T + shortest - 1, steps, cache, on_token).tolist()
            took(1, (time.perf_counter() - began) / steps)
            count["target_steps"] += steps
            count["row_steps"] += steps
            texts[0].extend(emitted[0])
            shown += steps
            continue
        if proposal is not None:
            tokens = torch.cat((tokens, proposal.guesses.to(device)), 1)  # (B, k + 1)
        # places past the end are computed and thrown away; they share the last slot, never read
        positions = torch.tensor(
            [[min(at, length - 1) for at in range(T + len(text) - 1, T + len(text) - 1 + width)]
             for text in texts], device=device)  # fmt: skip
        logits = model(tokens, positions, cache)  # (B, width, V)
        count["target_steps"] += 1
        choices, p, place = None, None, None
        if not sampling.temperature:
            choices = logits.argmax(-1).tolist()
        else:
            place = (positions + 1 - T).clamp_(max=max_new_tokens - 1)  # of what they predict
            p = distribution(logits, sampling)  # (B, width, V)
            if accept is None or proposal is None:
                choices = draw(p, own.gather(1, place)).tolist()
        if took is not None:  # the choices are on the host: the device is done
            took(width, time.perf_counter() - began)
        guesses = [[]] * B if proposal is None else proposal.guesses.tolist()
        emitted = [[]] * B
        for b, text in enumerate(texts):
            room = max_new_tokens - len(text)
            if not room:
                continue
            if choices is not None:
                new = choices[b][: agreed(guesses[b], choices[b]) + 1]
            else:
                new = accept_drawn(guesses[b], proposal.drawn_from[b], p[b],
                                   accept[b, place[b, :-1]], own[b, place[b]])  # fmt: skip
            count["row_steps"] += 1
            if proposal is not None and proposal.real[b]:
                count["drafted"] += min(k, room)
                count["accepted"] += min(len(new) - 1, room)
            emitted[b] = new[:room]
            text.extend(emitted[b])
        if on_token is not None and (ready := min(map(len, texts))) > shown:
            on_token(torch.tensor([text[shown:ready] for text in texts], device=device))
            shown = ready
    engine.stats.update(
        k=k, **{n: count[n] for n in ("target_steps", "drafted", "accepted")},
        accept_rate=count["accepted"] / max(1, count["drafted"]),
        mean_accepted=B * (max_new_tokens - 1) / max(1, count["row_steps"]),
    )  # fmt: skip
    return torch.cat((ids, torch.tensor(texts, device=device)), 1)
