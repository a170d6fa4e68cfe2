"""y = x / sqrt(mean(x^2) + eps) * weight, as its paper writes it."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., N), weight (N,) -> (..., N) in x's dtype; computed in fp32 (fp64 for fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype)
