"""softmax(q k^T * scale) v over keys and values gathered from the pages of each row."""

import torch


def paged_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                    block_table: torch.Tensor, lengths: torch.Tensor,
                    scale: float) -> torch.Tensor:  # fmt: skip
    """q (B, H, T, D), keys and values (N, Hkv, page, D), block_table (B, M), lengths (B,).

    Slot s of row b is slot s % page of page block_table[b, s // page].
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    (B, H, T, D), (_, Hkv, page, _) = q.shape, keys.shape
    out = torch.zeros(B, H, T, D, dtype=wide, device=q.device)
    for b, length in enumerate(lengths.tolist()):
        pages = block_table[b, : -(-length // page)].long()
        k, v = (t[pages].to(wide).transpose(0, 1).reshape(Hkv, -1, D)[:, :length]
                for t in (keys, values))  # fmt: skip
        for t in range(T):
            seen = length - T + t + 1
            if seen > 0:
                mine = q[b, :, t].to(wide).view(Hkv, -1, D)  # (Hkv, G, D)
                weights = (mine @ k[:, :seen].transpose(1, 2) * scale).softmax(-1)
                out[b, :, t] = (weights @ v[:, :seen]).reshape(H, D)
    return out.to(q.dtype)
