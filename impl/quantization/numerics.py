"""Numbers as integers times a scale: x ~ q * scale, q in [-127, 127].

Symmetric: zero stays zero, so padding costs no correction, and -128 is left out, so that negation
is exact.  One scale per output channel of a weight, one per token (or image) of an activation.
Source: Jacob et al. 2018, https://arxiv.org/abs/1712.05877
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from impl.core import StudyError

LEVELS = 127


def quantize_per_channel(weight: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(q int8 of the weight's shape, scale (N,)) of a weight (N, ...): error <= scale / 2.

    dtype  of the scale (default: the weight's); q is rounded against the scale as stored, so that
           a bf16 scale costs no accuracy
    Raises ``StudyError`` for weights that are not finite.
    """
    dtype = dtype or weight.dtype
    rows = weight.detach().flatten(1).float()  # (N, K)
    largest = rows.abs().amax(1)
    if not largest.isfinite().all():
        raise StudyError("the weights hold infinities or NaN; quantize a checkpoint that is finite")
    scale = (largest / LEVELS).clamp_(min=torch.finfo(dtype).smallest_normal).to(dtype)
    q = (rows / scale.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
    return q.to(torch.int8).view(weight.shape), scale


def quantize_per_token(x: Tensor, dims: tuple[int, ...] = (-1,)) -> tuple[Tensor, Tensor]:
    """(q int8, scale fp32) with one scale over ``dims`` (kept with size 1): error <= scale / 2."""
    x = x.float()
    scale = x.abs().amax(dims, keepdim=True) / LEVELS
    scale = scale.clamp(min=torch.finfo(torch.float32).smallest_normal)
    # NaN and infinity turn the scale, and with it the output, into NaN: nothing is hidden
    return (x / scale).round().to(torch.int8), scale


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 times b (N, K) int8 transposed -> (M, N) int32, exact.

    CPU: oneDNN, VNNI where there is one.  CUDA: cuBLAS, which takes more than 16 rows and
    multiples of 8, so the operands are padded with zeros.
    """
    if a.is_cuda:
        return padded_matmul(a, b)
    return torch._int_mm(a, b.t())


def padded_matmul(a: Tensor, b: Tensor, rows: int = 32, multiple: int = 8) -> Tensor:
    """``int8_matmul`` on operands padded with zeros to at least ``rows`` and to ``multiple``."""
    (M, K), N = a.shape, b.shape[0]
    a = F.pad(a, (0, -K % multiple, 0, max(0, rows - M)))
    b = F.pad(b, (0, -K % multiple, 0, -N % multiple))
    return torch._int_mm(a, b.t())[:M, :N]
