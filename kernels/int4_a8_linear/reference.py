"""y = x (scale * q)^T + bias with x in int8, a scale per row and group, whole sums per group."""

import torch

from kernels.int4_linear.reference import unpack
from kernels.w8a8_linear.reference import SMALLEST_SCALE


def quantize_groups(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., K) -> whole numbers in [-127, 127] (..., groups, K / groups), scale (..., groups).

    Both fp32.  scale = max|x| / 127 of the group, 2^-126 at least; x * (1 / scale) is rounded to
    even.  A group that holds a NaN or infinity has the scale NaN.
    """
    x = x.float().unflatten(-1, (groups, x.shape[-1] // groups))
    scale = (x.abs().amax(-1) / 127).clamp(min=SMALLEST_SCALE)
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return (x * (1.0 / scale)[..., None]).round(), scale


def int4_a8_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, outputs: int,
                   bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """x (..., K), weights as ``int4_linear.quantize`` makes them -> (..., N) in x's dtype.

    sum over groups of (q . int8(x)) * scale_x * scale: the sums of a group are exact, as int32.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups = scale.shape[1]
    if not groups:
        y = torch.zeros(*x.shape[:-1], outputs, dtype=wide, device=x.device)
    else:
        whole, scale_x = quantize_groups(x, groups)
        q = (
            unpack(packed).double().unflatten(1, (groups, x.shape[-1] // groups))
        )  # (16 blocks, groups, group)
        sums = torch.einsum("...gi,ngi->...ng", whole.double(), q).to(wide)
        scales = scale.to(wide).permute(0, 2, 1).reshape(-1, groups)
        y = (sums * scale_x.to(wide).unsqueeze(-2) * scales).sum(-1)[..., :outputs]
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
