"""y = (e4m3(x) weight^T) * scale_x * scale + bias, emulated: both are widened, then multiplied."""

import torch

LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 2.0**-120  # its inverse is finite; a row of zeros has it


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) -> e4m3 (..., K) and scale (..., 1) fp32: max|x| / 448 of each row."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = (most / LARGEST).clamp(min=SMALLEST_SCALE)
    return (x * (1.0 / scale)).to(torch.float8_e4m3fn), scale


def fp8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
               bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """x (..., K), weight (N, K) e4m3, scale (N,), bias (N,) -> (..., N) in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    q, scale_x = quantize_rows(x)
    y = (q.to(wide) @ weight.to(wide).T) * (scale_x.to(wide) * scale.to(wide))
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) -> e4m3 (N, K) and scale (N,) fp32: max|weight| / 448 of each output."""
    q, scale = quantize_rows(weight)
    return q, scale[:, 0].contiguous()
