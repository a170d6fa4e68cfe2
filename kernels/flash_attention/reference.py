"""softmax(q k^T * scale) v with every score written out."""

import torch


def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool,
                    scale: float) -> torch.Tensor:  # fmt: skip
    """q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, H, T, D) in q's dtype, sums in fp32 (fp64)."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    k, v = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))  # (B, H, S, D)
    scores = q.to(wide) @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    if causal:
        T, S = scores.shape[-2:]
        seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).to(q.dtype)
