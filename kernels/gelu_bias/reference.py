"""y = 0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), z = x + bias, as GPT-2 writes it."""

import math

import torch


def gelu_bias(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x (..., N), bias (N,) -> (..., N) in x's dtype; computed in fp32 (fp64 for fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    z = wide + bias.to(wide.dtype)
    return (0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))).to(x.dtype)
