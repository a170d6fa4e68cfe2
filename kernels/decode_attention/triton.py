"""Decode and paged attention in Triton: a program per chunk of keys, then one that merges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TARGETS = ("sm_80", "sm_90a")
CHUNK = 256  # keys of a program: the split is by position, so the other rows change no bit
_TYPES = {"table_ptr": "*i32", "lengths_ptr": "*i64", "part_ptr": "*fp32", "state_ptr": "*fp32"}


def variants(paged: bool) -> dict:
    """What is compiled ahead of time in the tests."""
    constants = {"PAGED": paged, "CHUNK": CHUNK, "BLOCK_R": 16, "BLOCK_N": 64, "BLOCK_D": 128}
    merge = {"constants": {"BLOCK_C": 16, "BLOCK_D": 128}, "warps": 4, "types": _TYPES}
    return {
        "attend_split_kernel": {"constants": constants, "warps": 4, "types": _TYPES,
                                "dtypes": ("bf16", "fp16")},
        "attend_split_kernel[fp32]": {"constants": constants | {"BLOCK_N": 32}, "warps": 4,
                                      "types": _TYPES, "dtypes": ("fp32",)},
        "attend_merge_kernel": merge,
    }  # fmt: skip


VARIANTS = variants(paged=False)


@triton.jit
def attend_split_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, part_ptr, state_ptr, q_batch, q_head, q_token,
    k_batch, k_head, k_token, v_batch, v_head, v_token, kv_heads, group, T, blocks, page, most,
    D, scale, PAGED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # rows are the queries of one kv head, row r being token r // group of head r % group
    pair, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = pair // kv_heads, pair % kv_heads
    r, d = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    rows = group * T
    length = tl.minimum(tl.load(lengths_ptr + b), page * most).to(tl.int32)
    held = (r < rows)[:, None] & (d < D)[None, :]
    token = (r // group).to(tl.int64)
    where = b * q_batch + (h * group + r % group) * q_head + token * q_token
    q = tl.load(q_ptr + where[:, None] + d[None, :], mask=held, other=0.0)
    to_base_two = scale * 1.4426950408889634
    top = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    out = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = n < length
        slot, at, there = n.to(tl.int64), b, inside
        if PAGED:
            at = tl.load(table_ptr + b * most + n // page, mask=inside, other=0).to(tl.int64)
            slot, there = slot % page, inside & (at >= 0) & (at < blocks)
        bad = inside & (there == 0)  # a page that does not exist makes NaN, not a fault
        k_at, v_at = at * k_batch + slot * k_token, at * v_batch + slot * v_token
        present = there[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + h * k_head + k_at[:, None] + d[None, :], mask=present, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        score = tl.where(bad[None, :], float("nan"), score)
        seen = n[None, :] < (length - T + token + 1)[:, None]
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(tl.sum(seen.to(tl.int32), axis=1) > 0, now, 0.0)  # of rows that see some
        p = tl.exp2((score - base[:, None]) * to_base_two)
        keep = tl.where(total == 0.0, 0.0, tl.exp2((top - base) * to_base_two))
        keep = tl.where(now == top, 1.0, keep)
        total = total * keep + tl.sum(p, axis=1)
        v = tl.load(v_ptr + h * v_head + v_at[:, None] + d[None, :], mask=present, other=0.0)
        out = out * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = now
    place = (pair * rows + r) * tl.num_programs(1) + chunk
    tl.store(part_ptr + place[:, None] * D + d[None, :], out, mask=held)
    tl.store(state_ptr + place * 2, top, mask=r < rows)
    tl.store(state_ptr + place * 2 + 1, total, mask=r < rows)


@triton.jit
def attend_merge_kernel(
    part_ptr, state_ptr, y_ptr, y_batch, y_head, y_token, heads, group, T, chunks, D, scale,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t, d = tl.program_id(1), tl.arange(0, BLOCK_D)
    row = (b * (heads // group) + head // group) * group * T + t * group + head % group
    to_base_two = scale * 1.4426950408889634
    top = float("-inf")
    for first in range(0, chunks, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        part_top = tl.load(state_ptr + (row * chunks + c) * 2, mask=c < chunks, other=float("-inf"))
        top = tl.maximum(top, tl.max(part_top, axis=0))
    total = 0.0
    out = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, chunks, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        place = row * chunks + c
        part_top = tl.load(state_ptr + place * 2, mask=c < chunks, other=float("-inf"))
        sums = tl.load(state_ptr + place * 2 + 1, mask=c < chunks, other=0.0)
        share = tl.where(sums == 0.0, 0.0, tl.exp2((part_top - top) * to_base_two))  # empty chunks
        total += tl.sum(share * sums, axis=0)
        inside = (c < chunks)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        out += tl.sum(share[:, None] * part, axis=0)
    out = tl.where(total == 0.0, 0.0, out / total)
    where = b * y_batch + head.to(tl.int64) * y_head + t.to(tl.int64) * y_token
    tl.store(y_ptr + where + d, out.to(y_ptr.dtype.element_ty), mask=d < D)


def attend(q, keys, values, table, lengths, scale):
    """y (B, H, T, D), laid out as (B, T, H, D); ``table`` (B, M) int32, or None."""
    (B, H, T, D), (blocks, Hkv, page, _) = q.shape, keys.shape
    y = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    most = 1 if table is None else table.shape[1]
    chunks, rows = triton.cdiv(page * most, CHUNK), H // Hkv * T
    if not chunks:
        return y.zero_()
    if not y.numel():
        return y
    part = torch.empty(B, Hkv, rows, chunks, D, dtype=torch.float32, device=q.device)
    state = torch.empty(B, Hkv, rows, chunks, 2, dtype=torch.float32, device=q.device)
    block_d = max(16, triton.next_power_of_2(D))
    attend_split_kernel[(B * Hkv, chunks, triton.cdiv(rows, 16))](
        q, keys, values, lengths if table is None else table, lengths, part, state,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], Hkv, H // Hkv, T, blocks, page,
        most, D, scale, PAGED=table is not None, CHUNK=CHUNK, BLOCK_R=16,
        BLOCK_N=32 if q.dtype == torch.float32 else 64, BLOCK_D=block_d, num_warps=4)  # fmt: skip
    attend_merge_kernel[(B * H, T)](
        part, state, y, *y.stride()[:3], H, H // Hkv, T, chunks, D, scale, BLOCK_C=16,
        BLOCK_D=block_d, num_warps=4)  # fmt: skip
    return y


def decode_attention(q, keys, values, lengths, scale):
    """y (B, H, T, D), laid out as (B, T, H, D)."""
    return attend(q, keys, values, None, lengths, scale)
