"""y = (x - mean x) / sqrt(var x + eps) * weight + bias, as its paper writes it."""

import torch


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
               eps: float) -> torch.Tensor:  # fmt: skip
    """x (..., N), weight and bias (N,) -> (..., N) in x's dtype; computed in fp32 (or fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * inverse * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype)
