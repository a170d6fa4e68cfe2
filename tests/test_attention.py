"""What is claimed of attention beside its numbers: memory, what is shared, what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels import build
from kernels.flash_attention import flash_attention, flops
from tests.kernel_cases import random
from tests.kernel_tools import ROOT


@pytest.fixture(autouse=True)
def needs_compiler():
    if reason := build.lacks_compiler():
        pytest.skip(reason)


PEAK = """
import resource, sys, torch
from kernels.flash_attention import flash_attention
def run(T):
    q = torch.ones(1, 1, T, 64)
    flash_attention(q, q, q, impl=sys.argv[1])
run(256)  # libraries, threads
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4096)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
SCORES = 4096 * 4096 * 4  # bytes


def peak_bytes(impl: str) -> int:
    """How far the memory of a process rises in attention of 4096 tokens, one head."""
    done = subprocess.run([sys.executable, "-c", PEAK, impl], cwd=ROOT, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return int(done.stdout)


def test_memory_grows_with_tokens_not_with_their_square():
    assert peak_bytes("reference") >= SCORES
    assert peak_bytes("cpu") <= SCORES / 4


def test_queries_in_pieces_are_the_queries_whole():
    """A prompt prefilled in chunks sees what it sees when prefilled at once."""
    q, k, v = (random(2, 2, 150, 64, seed=i) for i in range(3))
    whole = flash_attention(q, k, v, impl="cpu")
    for start, end in ((0, 70), (70, 149), (149, 150)):
        part = flash_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], impl="cpu")
        assert (part - whole[:, :, start:end]).abs().max() <= 4 * torch.finfo(q.dtype).eps


def test_grouped_heads_are_repeated_heads():
    q, k, v = random(1, 6, 40, 32), random(1, 2, 40, 32, seed=1), random(1, 2, 40, 32, seed=2)
    repeated = [t.repeat_interleave(3, 1) for t in (k, v)]
    got, wanted = flash_attention(q, k, v), flash_attention(q, *repeated)
    assert (got - wanted).abs().max() <= 4 * torch.finfo(q.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_key_after_a_query_is_seen(dtype):
    q, k, v = (random(1, 2, 200, 64, seed=i, dtype=dtype) for i in range(3))
    before = flash_attention(q, k, v)
    k[:, :, 150:], v[:, :, 150:] = 7, -7
    after = flash_attention(q, k, v)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.equal(before[:, :, 150:], after[:, :, 150:])


def test_heads_may_be_a_view_of_a_projection():
    x = random(2, 50, 4 * 3 * 16)  # (B, T, H * 3 * D): q, k and v of a head side by side
    q, k, v = x.view(2, 50, 4, 3, 16).permute(3, 0, 2, 1, 4)
    assert not q.is_contiguous()
    wanted = flash_attention(q.contiguous(), k.contiguous(), v.contiguous())
    got = flash_attention(q, k, v)
    assert torch.equal(got, wanted)
    assert got.transpose(1, 2).is_contiguous()  # rows for the projection that follows


def test_flops_count_the_pairs_that_see_each_other():
    seen = torch.ones(5, 8).tril(3).sum().item()
    assert flops(2, 3, 5, 8, 16, causal=True) == 4 * 2 * 3 * seen * 16
    assert flops(2, 3, 5, 8, 16, causal=False) == 4 * 2 * 3 * 5 * 8 * 16
    q, k = random(2, 4, 5, 16), random(2, 2, 8, 16)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as count:
        flash_attention(q, k, k)
    assert count.get_total_flops() == flops(2, 4, 5, 8, 16, causal=True)
