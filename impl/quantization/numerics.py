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

# Two exact schedules of one model round its activations' last bits differently, and a step of the
# quantizer makes of that up to 0.26 (fp32) and 0.44 (bf16) in a logit of `lm_small`, ours and the
# libraries' alike, measured between decode steps and one forward; two logits differ by twice that.
NEAR_TIE = 0.9


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


def product_by_digits(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K) floating times weight (N, K) int8 transposed -> (M, N) fp32, by integer products.

    x / scale is written with digits to base 254, x ~ (d0 + d1 / 254 + d2 / 254^2) * scale, each
    an int8, rounded to nearest: three of them miss x by at most 2^-24 of its token's largest, two
    (enough for 16-bit x) by 2^-16.  The products of the digits are exact and are added in fp32.
    Source: the splitting of Ozaki et al. 2012, https://doi.org/10.1007/s11075-011-9478-1
    """
    M, count = len(x), 3 if x.dtype == torch.float32 else 2
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).smallest_normal)
    rest, digits = x / largest * LEVELS, []
    for _ in range(count):
        digit = rest.round()
        digits.append(digit.to(torch.int8))
        rest = (rest - digit) * (2 * LEVELS)
    sums = int8_matmul(torch.cat(digits), weight)  # (count M, N) int32
    out = sums[:M].float()
    for i in range(1, count):
        out = out + sums[i * M : (i + 1) * M] * (2.0 * LEVELS) ** -i
    return out * (largest / LEVELS)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 times b (N, K) int8 transposed -> (M, N) int32, exact.

    CPU: oneDNN, VNNI where there is one.  CUDA: cuBLAS, which takes more than 16 rows and
    multiples of 8, so the operands are padded with zeros.
    """
    if a.is_cuda:
        return padded_matmul(a, b)
    return int8_mm(a, b) if torch.compiler.is_compiling() else torch._int_mm(a, b.t())


@torch.library.custom_op("study::int8_mm", mutates_args=(), device_types="cpu")
def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch._int_mm(a, b.T)`` that the compiler leaves alone.

    torch 2.13's inductor rewrites an integer product followed by two scales into one oneDNN call,
    which returns garbage for one row.
    """
    return torch._int_mm(a, b.t())


@int8_mm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


def padded_matmul(a: Tensor, b: Tensor, rows: int = 32, multiple: int = 8) -> Tensor:
    """``int8_matmul`` on operands padded with zeros to at least ``rows`` and to ``multiple``."""
    (M, K), N = a.shape, b.shape[0]
    a = F.pad(a, (0, -K % multiple, 0, max(0, rows - M)))
    b = F.pad(b, (0, -K % multiple, 0, -N % multiple))
    return torch._int_mm(a, b.t())[:M, :N]
