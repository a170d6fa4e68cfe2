"""total = x + residual; y = total / sqrt(mean(total^2) + eps) * weight."""

import torch


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """x, residual (..., N), weight (N,) -> (y, total), both (..., N) in x's dtype.

    total is rounded to x's dtype before it is normalized, as a decoder's residual stream is.
    """
    total = x + residual
    wide = total.double() if x.dtype == torch.float64 else total.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.to(wide.dtype)).to(x.dtype), total
