"""Pairs (x_i, x_{i + D/2}) turned by the angle of their position, as its paper writes it."""

import torch


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, T, H, D), cos and sin (T, D/2) -> (B, T, H, D) in x's dtype; in fp32 (or fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    cos, sin = (t.to(wide.dtype)[:, None] for t in (cos, sin))  # (T, 1, D/2)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
