"""y = exp(x - max x) / sum exp(x - max x) over the last dimension."""

import torch


def softmax(x: torch.Tensor) -> torch.Tensor:
    """x (..., N) -> (..., N) in x's dtype; computed in fp32 (fp64 for fp64)."""
    if not x.shape[-1]:
        return torch.empty_like(x)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    e = torch.exp(wide - wide.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)
