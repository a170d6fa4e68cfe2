"""y = x (scale * weight)^T + bias, with weight kept in int8."""

import torch


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
                bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """x (..., K), weight (N, K) int8, scale (N,), bias (N,) -> (..., N) in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ weight.to(wide).T * scale.to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) -> int8 (N, K) in [-127, 127] and scale (N,) fp32: symmetric, per output."""
    scale = weight.float().abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale
