"""A program per row: it searches the logit of the nucleus's last token, then draws.

The logits' bits, turned so that they order as the numbers do, are searched 16 ways at a time: 8
readings of a row that the second level of cache holds, whatever the numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.op import rows_of

BLOCK_V, WAYS, TURNS = 1024, 16, 8  # WAYS to the power of TURNS: every bit pattern
TARGETS = ("sm_80", "sm_90a")
VARIANTS = {"top_p_sampling_kernel": {
    "constants": {"BLOCK_V": BLOCK_V, "WAYS": WAYS, "TURNS": TURNS}, "warps": 8,
    "types": {"uniform_ptr": "*fp32", "token_ptr": "*i64", "inverse": "fp32",
              "top_p": "fp32"}}}  # fmt: skip


@triton.jit
def ordered(x):
    """The bits of x + 0, so that -0 is 0, as whole numbers of 0 to 2^32 in the numbers' order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    turned = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return turned.to(tl.int64) + 2147483648


@triton.jit
def logits_of(row_ptr, start, V, BLOCK_V: tl.constexpr):
    cols = start + tl.arange(0, BLOCK_V)
    x = tl.load(row_ptr + cols, mask=cols < V, other=float("-inf"))
    return x.to(tl.float32), cols


@triton.jit
def top_p_sampling_kernel(logits_ptr, uniform_ptr, token_ptr, stride, V, inverse, top_p,
                          BLOCK_V: tl.constexpr, WAYS: tl.constexpr,
                          TURNS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    most = tl.full([BLOCK_V], float("-inf"), dtype=tl.float32)
    poison = tl.zeros([BLOCK_V], dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        x, cols = logits_of(row_ptr, start, V, BLOCK_V)
        most = tl.maximum(most, x)
        poison |= tl.where(x < float("inf"), 0, 1)  # NaN too
    top = tl.max(most, axis=0)
    uniform = tl.load(uniform_ptr + row)
    good = (tl.max(poison, axis=0) == 0) & (top > float("-inf")) & (uniform == uniform)
    top = tl.where(good, top, 0.0)

    sums = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        x, cols = logits_of(row_ptr, start, V, BLOCK_V)
        sums += tl.exp((x - top) * inverse)
    target = tl.maximum(tl.sum(sums, axis=0) * top_p, 1.2e-38)  # the most probable weighs 1

    # the mass from `low` on reaches the target, that from `high` on does not
    low = tl.full([1], 0, dtype=tl.int64)
    high = tl.full([1], 4294967296, dtype=tl.int64)
    ways = tl.arange(0, WAYS)
    for _ in range(TURNS):
        step = (high - low + WAYS - 1) // WAYS
        pivots = tl.minimum(low + step * ways, high)
        part = tl.zeros([BLOCK_V, WAYS], dtype=tl.float32)
        for start in range(0, V, BLOCK_V):
            x, cols = logits_of(row_ptr, start, V, BLOCK_V)
            e = tl.exp((x - top) * inverse)
            part += tl.where(ordered(x)[:, None] >= pivots[None, :], e[:, None], 0.0)
        mass = tl.sum(part, axis=0)
        reached = (mass >= target) & (pivots < high)
        low = tl.maximum(low, tl.max(tl.where(reached, pivots, 0), axis=0))
        high = tl.minimum(high, low + step)
    cut = tl.max(low, axis=0)
    if top_p >= 1.0:
        cut = tl.zeros_like(cut)

    sums = tl.zeros([BLOCK_V], dtype=tl.float32)
    count = tl.zeros([BLOCK_V], dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        x, cols = logits_of(row_ptr, start, V, BLOCK_V)
        key = ordered(x)
        sums += tl.where(key > cut, tl.exp((x - top) * inverse), 0.0)
        count += tl.where((key == cut) & (cols < V), 1, 0)
    above, ties = tl.sum(sums, axis=0), tl.sum(count, axis=0)
    turned = (cut - 2147483648).to(tl.int32)
    logit = (turned ^ ((turned >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    each = tl.where(ties > 0, tl.exp((logit - top) * inverse), 0.0)
    # of equal logits as many as reach the target, the first ones
    wanted = tl.where(each > 0.0, (target - above) / each, 0.0)
    taken = tl.minimum(ties, tl.maximum(tl.ceil(tl.minimum(wanted, 2.1e9)).to(tl.int32), 1))
    goal = uniform * (above + taken * each)

    running = tl.zeros([1], dtype=tl.float32)
    seen = tl.zeros([1], dtype=tl.int32)
    token = tl.full([1], 2147483647, dtype=tl.int32)
    last = tl.full([1], -1, dtype=tl.int32)
    for start in range(0, V, BLOCK_V):
        x, cols = logits_of(row_ptr, start, V, BLOCK_V)
        key = ordered(x)
        tie = tl.where((key == cut) & (cols < V), 1, 0)
        inside = (key > cut) | ((tie == 1) & (seen + tl.cumsum(tie, axis=0) <= taken))
        e = tl.where(inside, tl.exp((x - top) * inverse), 0.0)
        passed = (running + tl.cumsum(e, axis=0) > goal) & (e > 0.0)
        token = tl.minimum(token, tl.min(tl.where(passed, cols, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(e > 0.0, cols, -1), axis=0))
        running += tl.sum(e, axis=0)
        seen += tl.sum(tie, axis=0)
    drawn = tl.max(tl.where(token < 2147483647, token, last), axis=0).to(tl.int64)
    tl.store(token_ptr + row, tl.where(good, drawn, -1))


def top_p_sampling(logits, uniform, temperature, top_p):
    """token (...), contiguous."""
    from . import scalars

    (rows, stride), vocab = rows_of(logits, "logits of top_p_sampling"), logits.shape[-1]
    token = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if rows:
        inverse, top_p = scalars(temperature, top_p)
        top_p_sampling_kernel[(rows,)](logits, uniform, token, stride, vocab, inverse, top_p,
                                       BLOCK_V=BLOCK_V, WAYS=WAYS, TURNS=TURNS,
                                       num_warps=8)  # fmt: skip
    return token
