"""y = (int8(x) weight^T) * scale_x * scale + bias: activations quantized per row, sums exact."""

import torch

SMALLEST_SCALE = 2.0**-126  # its inverse is finite; a row of zeros has it


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) -> whole numbers in [-127, 127] (..., K) and scale (..., 1), both fp32."""
    x = x.float()
    if not x.shape[-1]:
        return x, torch.ones(*x.shape[:-1], 1, device=x.device)
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)
    return (x * (1.0 / scale)).round(), scale


def w8a8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
                bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """x (..., K), weight (N, K) int8, scale (N,), bias (N,) -> (..., N) in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, scale_x = quantize_rows(x)
    sums = (q.double() @ weight.double().T).to(wide)  # exact, as int32 sums are
    y = sums * (scale_x.to(wide) * scale.to(wide))
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
