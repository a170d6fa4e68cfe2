"""The request trace that every scheduler answers: fixed by its seed, open-loop.

Lengths are log-normal, as those of chat traffic are (a few long answers hold a batch back), the
times between arrivals exponential.  Arrivals never wait for answers: a closed loop would hide
queueing.  The draws come from Python's own generator, whose stream is the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable

from torch import Tensor

from impl.core import Request, StudyError

# sigma of the log of a length: at 0.8 the longest of eight answers is about 2.7 times the mean
PROMPT_SIGMA = 0.5
OUTPUT_SIGMA = 0.8
LONGEST = 4  # no length is more than this many times its mean


def request_trace(n: int, seed: int = 0, rate: float = 200.0, mean_prompt: int = 48,
                  mean_output: int = 14, text: Tensor | None = None) -> list[Request]:  # fmt: skip
    """``n`` requests: prompts of ``mean_prompt`` tokens on average, answers of ``mean_output``.

    rate  arrivals per second; the default is more than a small model on two cores can answer one
          by one, so that a queue forms and the scheduler decides the throughput
    text  token ids (N,) int64 to cut prompts from; None: the study's held-out text

    The same arguments give the same requests.  Raises ``StudyError`` when the text is shorter than
    the longest prompt.
    """
    if n == 0:
        return []
    if n < 0 or rate <= 0 or min(mean_prompt, mean_output) < 1:
        raise StudyError(
            f"a trace of {n} requests at {rate:g}/s with prompts of {mean_prompt} and answers of "
            f"{mean_output} tokens cannot be drawn; give positive numbers"
        )
    if text is None:
        from .data import held_out_ids

        text = held_out_ids()
    if len(text) < LONGEST * mean_prompt:
        raise StudyError(
            f"the text has {len(text)} tokens and a prompt may take {LONGEST * mean_prompt}; give "
            "a longer text or a smaller mean_prompt"
        )
    draw = random.Random(seed)
    requests, now = [], 0.0
    for i in range(n):
        now += draw.expovariate(rate)
        prompt = _length(draw, mean_prompt, PROMPT_SIGMA)
        answer = _length(draw, mean_output, OUTPUT_SIGMA)
        start = draw.randrange(len(text) - prompt + 1)
        requests.append(Request(i, text[start : start + prompt].clone(), answer, now))
    return requests


def _length(draw: random.Random, mean: int, sigma: float) -> int:
    """A log-normal length of this mean (before it is cut to 1 .. LONGEST x mean)."""
    length = round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
    return min(max(length, 1), LONGEST * mean)


def trace_hash(requests: Iterable[Request]) -> str:
    """Hash of a trace: ids, prompts, answer lengths, arrivals in microseconds."""
    digest = hashlib.sha256()
    for r in requests:
        head = f"{r.id} {len(r.ids)} {r.max_new_tokens} {round(r.arrival_s * 1e6)}\n"
        digest.update(head.encode() + r.ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
