"""softmax(q k^T * scale) v over the first keys of each row's cache."""

import torch


def decode_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     lengths: torch.Tensor, scale: float) -> torch.Tensor:  # fmt: skip
    """q (B, H, T, D), keys and values (B, Hkv, S, D), lengths (B,) -> (B, H, T, D) in q's dtype.

    Query t of row b sees the first lengths[b] - T + t + 1 keys; one that sees none gives zeros.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    (_, H, T, _), (_, Hkv, S, _) = q.shape, keys.shape
    last = lengths[:, None] - T + torch.arange(T, device=q.device) + 1  # (B, T)
    seen = torch.arange(S, device=q.device) < last[:, None, :, None]  # (B, 1, T, S)
    keys, values = (t.to(wide).repeat_interleave(H // Hkv, 1) for t in (keys, values))
    scores = (q.to(wide) @ keys.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    # slots that nobody has written yet may hold anything
    used = torch.arange(S, device=q.device)[:, None] < lengths[:, None, None, None]
    weights = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (weights @ values.masked_fill(~used, 0.0)).to(q.dtype)
