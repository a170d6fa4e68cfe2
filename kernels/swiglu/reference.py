"""y = silu(gate) * up."""

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up (..., N) -> (..., N) in gate's dtype; computed in fp32 (fp64 for fp64)."""
    wide = gate.double() if gate.dtype == torch.float64 else gate.float()
    return (wide / (1 + torch.exp(-wide)) * up.to(wide.dtype)).to(gate.dtype)
