"""Outputs that are written past the caches, row by row, beside those that stay in them."""

import pytest
import torch

from kernels import build
from kernels.add_rms_norm import add_rms_norm
from tests.kernel_cases import DTYPES

STREAMED = 16 << 20  # bytes of an output from which on rows.h's `streams` says so


@pytest.mark.parametrize("n", [4097, 8192])  # rows that start anywhere, and at 64 bytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", build.ISA_LEVELS)
def test_a_streamed_row_has_the_bits_of_a_kept_one(level, dtype, n):
    """Denormals too, which the processor's own rounding to bf16 would take for zeros."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    dtype, few = DTYPES[dtype], 5
    rows = STREAMED // (n * dtype.itemsize) + 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(few, n, generator=generator).to(dtype)
    residual = torch.randn(few, n, generator=generator).to(dtype)
    weight = torch.randn(n, generator=generator).to(dtype)
    x[1], residual[1] = x[1] * 1e-39, residual[1] * 1e-39
    x[2, 5], x[3, 9] = float("nan"), float("inf")
    many = [torch.cat((t, t[:1].expand(rows - few, n))) for t in (x, residual)]
    with build.isa(level):
        alone = add_rms_norm(x, residual, weight, impl="cpu")
        among = add_rms_norm(*many, weight, impl="cpu")
    for kept, streamed in zip(alone, among, strict=True):
        assert torch.equal(kept.view(torch.uint8), streamed[:few].view(torch.uint8))
        assert torch.equal(streamed[few:], streamed[:1].expand(rows - few, n))
    assert torch.equal(alone[1].nan_to_num(7), (x + residual).nan_to_num(7))
    assert dtype == torch.float16 or alone[1][1].abs().max() > 0
