"""y = x (scale * q)^T + bias, with q in four bits, and how q and scale are made and stored."""

import torch

from kernels.op import expect

SIDE = 16  # outputs side by side
GROUPS = (32, 128)
# nibble j of a word holds this one of its eight inputs: see kernels/common/int4.h
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, outputs: int,
                bias: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """x (..., K), weights as ``quantize`` makes them, bias (N,) -> (..., N) in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide) @ dequantize(packed, scale, outputs, wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def dequantize(packed: torch.Tensor, scale: torch.Tensor, outputs: int,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:  # fmt: skip
    """The weights (N, K) that the layer computes with."""
    q, (blocks, groups, _) = unpack(packed), scale.shape
    if not q.numel():
        return q[:outputs].to(dtype)
    rows = scale.to(dtype).permute(0, 2, 1).reshape(blocks * SIDE, groups, 1)
    return (q.view(blocks * SIDE, groups, -1).to(dtype) * rows).flatten(1)[:outputs]


def pack(q: torch.Tensor) -> torch.Tensor:
    """q (N, K) int8 in [-8, 7], K a multiple of 8 -> (ceil(N / 16), K / 8, 16) int32."""
    n, k = q.shape
    q = torch.nn.functional.pad(q, (0, 0, 0, -n % SIDE)).to(torch.int64) + 8
    words = q.view(len(q) // SIDE, SIDE, k // 8, 8).permute(0, 2, 1, 3)[..., list(ORDER)]
    shifts = 4 * torch.arange(8, device=q.device)
    words = (words << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The q (16 * blocks, K) int8 that ``pack`` was given, padding included."""
    blocks, octets, _ = packed.shape
    shifts = 4 * torch.tensor(ORDER, device=packed.device).argsort().to(torch.int32)
    q = (packed[..., None] >> shifts & 15) - 8  # (blocks, K / 8, 16, 8)
    return q.to(torch.int8).permute(0, 2, 1, 3).reshape(blocks * SIDE, octets * 8)


def quantize(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (N, K) -> packed (ceil(N / 16), K / 8, 16) int32, scale (.., K / group, 16) bf16.

    Per output and group of inputs w ~ q * scale, q in [-8, 7]: the largest weight falls near -8,
    so a scale may be negative; of 12 scales around that, the one of least squared error.
    Raises ``KernelError`` for other groups, one that does not divide K, weights not finite.
    """
    n, k = weight.shape
    expect(group in GROUPS, f"int4 weights come in groups of 32 or 128, not {group}")
    expect(k % group == 0, f"groups of {group} do not divide {k} inputs; take 32, or leave this "
           "layer as it is")  # fmt: skip
    rows = torch.nn.functional.pad(weight.detach().float(), (0, 0, 0, -n % SIDE))
    rows = rows.view(len(rows), k // group, group)
    expect(rows.isfinite().all(), "the weights hold infinities or NaN; quantize finite ones")
    if not rows.numel():
        scale = torch.ones(*rows.shape[:2], 1, dtype=torch.bfloat16, device=weight.device)
        return pack(torch.zeros_like(weight, dtype=torch.int8)), _side_by_side(scale)
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low) / -8
    extreme = torch.where(extreme != 0, extreme, 1.0)

    def rounded(factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = (extreme * factor).to(torch.bfloat16)
        scale = torch.where(scale != 0, scale, 1.0)
        q = (rows / scale.float()).round_().clamp_(-8, 7)
        error = (q * scale.float() - rows).square_().sum(-1, keepdim=True)
        return q.to(torch.int8), error, scale

    best, least, chosen = rounded(1.0)
    for factor in (0.96, 0.92, 0.88, 0.84, 0.8, -1.0, -0.96, -0.92, -0.88, 1.06, 1.12):
        q, error, scale = rounded(factor)
        better = error < least
        best = torch.where(better, q, best)
        least, chosen = torch.where(better, error, least), torch.where(better, scale, chosen)
    return pack(best.flatten(1)[:n]), _side_by_side(chosen)


def _side_by_side(scale: torch.Tensor) -> torch.Tensor:
    """scale (N, groups, 1), N a multiple of 16 -> (N / 16, groups, 16)."""
    return scale.view(len(scale) // SIDE, SIDE, scale.shape[1]).permute(0, 2, 1).contiguous()
