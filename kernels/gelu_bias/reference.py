"""y = z Phi(z), z = x + bias, or with approximate="tanh" the form in which GPT-2 writes it."""

import math

import torch


def gelu_bias(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """x (..., N), bias (N,) -> (..., N) in x's dtype; computed in fp32 (fp64 for fp64)."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    z = wide + bias.to(wide.dtype)
    if approximate == "tanh":
        cdf = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    else:
        cdf = 0.5 * torch.erfc(-z / math.sqrt(2))
    return (z * cdf).to(x.dtype)
