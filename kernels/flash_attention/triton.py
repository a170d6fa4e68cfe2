"""Flash attention in Triton: a program per block of queries walks the keys that it may see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TARGETS = ("sm_80", "sm_90a")
VARIANTS = {
    "flash_attention_kernel[64]": {
        "constants": {"CAUSAL": True, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64}, "warps": 4,
        "dtypes": ("bf16", "fp16")},
    "flash_attention_kernel[128]": {
        "constants": {"CAUSAL": True, "BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 128}, "warps": 8,
        "dtypes": ("bf16", "fp16")},
    "flash_attention_kernel[64-fp32]": {
        "constants": {"CAUSAL": True, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_D": 64}, "warps": 4,
        "dtypes": ("fp32",)},
}  # fmt: skip


@triton.jit
def flash_attention_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch,
    v_head, v_token, y_batch, y_head, y_token, heads, group, T, S, D, scale, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # the last queries see the most keys: they start first
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    q_ptr += b * q_batch + h * q_head
    k_ptr += b * k_batch + h // group * k_head
    v_ptr += b * v_batch + h // group * v_head
    y_ptr += b * y_batch + h * y_head
    m, d = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows = (m < T)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + m.to(tl.int64)[:, None] * q_token + d[None, :], mask=rows, other=0.0)
    to_base_two = scale * 1.4426950408889634
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    last, whole = S, S // BLOCK_N * BLOCK_N
    if CAUSAL:
        last = min(S, S - T + start + BLOCK_M)
        whole = min(whole, (S - T + start + 1) // BLOCK_N * BLOCK_N)  # every row sees these
    for first in range(0, last, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = (n < S)[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + n.to(tl.int64)[:, None] * k_token + d[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if first >= whole:
            seen = n[None, :] < S
            if CAUSAL:
                seen = seen & (n[None, :] <= S - T + m[:, None])
            score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(top, tl.max(score, axis=1))
        p = tl.exp2((score - now[:, None]) * to_base_two)
        keep = tl.exp2((top - now) * to_base_two)
        total = total * keep + tl.sum(p, axis=1)
        v = tl.load(v_ptr + n.to(tl.int64)[:, None] * v_token + d[None, :], mask=inside, other=0.0)
        out = out * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = now
    out = out / total[:, None]
    tl.store(y_ptr + m.to(tl.int64)[:, None] * y_token + d[None, :],
             out.to(y_ptr.dtype.element_ty), mask=rows)  # fmt: skip


def flash_attention(q, k, v, causal, scale):
    """y (B, H, T, D), laid out as (B, T, H, D)."""
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    y = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    if not S:
        return y.zero_()
    if not y.numel():
        return y
    block_d = max(16, triton.next_power_of_2(D))
    block_m, block_n, warps = (128, 64, 4 if block_d <= 64 else 8)
    if q.dtype == torch.float32:  # on CUDA cores: tensor cores would round to tf32
        block_m, block_n, warps = 32, 32, 4
    if T <= 32:
        block_m = 32
    flash_attention_kernel[(triton.cdiv(T, block_m), B * H)](
        q, k, v, y, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], H,
        H // Hkv, T, S, D, scale, CAUSAL=causal, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_D=block_d, num_warps=warps)  # fmt: skip
    return y
