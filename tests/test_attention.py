"""What is claimed of attention beside its numbers: memory, what is shared, what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from impl.core import Engine, Request, stack
from impl.fusion.proofs import operators_of
from impl.models import SPECS
from impl.models.kv_cache import GrowingCache, KVCache
from kernels import build
from kernels.decode_attention import decode_attention
from kernels.flash_attention import flash_attention, flops
from kernels.paged_attention import paged_attention
from tests.kernel_cases import random
from tests.kernel_tools import ROOT
from tests.matrix import impossible
from tests.tiny import SPEC


@pytest.fixture(autouse=True)
def needs_compiler():
    if reason := build.lacks_compiler():
        pytest.skip(reason)


PEAK = r"""
import re, sys, torch
from kernels.flash_attention import flash_attention
def peak_kb():  # of this program: ru_maxrss starts at what its parent held
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
def run(T):
    q = torch.ones(1, 1, T, 64)
    flash_attention(q, q, q, impl=sys.argv[1])
run(256)  # libraries, threads
before = peak_kb()
run(4096)
print(1024 * (peak_kb() - before))
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


@pytest.mark.parametrize("level", build.isas())
def test_a_scale_near_the_largest_float_takes_the_value_of_the_best_key(level):
    q, k, v = (random(1, 1, 40, 16, seed=i) for i in range(3))
    best = (q @ k.mT)[0, 0].argmax(-1)
    with build.isa(level):
        got = flash_attention(q, k, v, causal=False, scale=3e38, impl="cpu")
    assert torch.equal(got[0, 0], v[0, 0, best])


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


# ---- a few tokens over a cache --------------------------------------------------------------


def cached(batch, heads, kv_heads, queries, slots, dim, dtype=torch.float32):
    q = random(batch, heads, queries, dim, dtype=dtype)
    keys, values = (random(batch, kv_heads, slots, dim, seed=i, dtype=dtype) for i in (1, 2))
    return q, keys, values


def test_a_step_over_a_cache_is_the_last_row_of_a_prompt():
    q, keys, values = cached(2, 4, 2, 3, 700, 64)
    whole = flash_attention(q, keys, values, impl="cpu")
    step = decode_attention(q, keys, values, torch.tensor([700, 700]), impl="cpu")
    assert (step - whole).abs().max() <= 4 * torch.finfo(q.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_beyond_the_length_are_never_read(dtype):
    q, keys, values = cached(3, 4, 2, 2, 600, 32, dtype)
    lengths = torch.tensor([1, 65, 513])
    clean = decode_attention(q, keys, values, lengths, impl="cpu")
    for b, length in enumerate(lengths.tolist()):
        keys[b, :, length:], values[b, :, length:] = torch.nan, torch.nan
    assert torch.equal(decode_attention(q, keys, values, lengths, impl="cpu"), clean)
    assert not clean.isnan().any()
    assert not clean[0, :, 0].any()  # the first of two tokens in a row of one sees nothing


@pytest.mark.parametrize("level", build.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [41, 42])
def test_an_infinite_value_in_the_last_slot_is_what_comes_out(level, dtype, slots):
    # no whole vector of keys, nor of numbers; of 41 the last has no neighbour in a pair
    q, keys, values = cached(2, 3, 1, 1, slots, 40, dtype)
    values[:, :, -1] = torch.inf  # must not be what fills the last vector up, with a weight of 0
    with build.isa(level):
        got = decode_attention(q, keys, values, torch.tensor([slots, slots]), impl="cpu")
    assert (got == torch.inf).all()


@pytest.mark.parametrize("level", build.isas())
def test_a_nan_of_any_bits_stays_one_and_what_is_far_below_the_best_is_nothing(level):
    q, k, v = (random(1, 1, 32, 16, seed=i) for i in range(3))
    # 0x7fc00001: exponents are shifted into place, and must not be shifted into a NaN
    q[0, 0, 3, 5] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    k[0, 0, 7] = 1e4 * torch.ones(16)
    q[0, 0, 9] = -1.0  # looks away from key 7
    with build.isa(level):
        got = flash_attention(q, k, torch.zeros_like(v).index_fill(2, torch.tensor([7]), 1e30),
                              causal=False, scale=1.0, impl="cpu")  # fmt: skip
    assert got[0, 0, 3].isnan().all()
    assert not got[0, 0, 9].any()  # e^-160000 times 1e30


@pytest.mark.parametrize("page", [1, 3, 20, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_are_the_same_bits_as_a_row(dtype, page):
    q, keys, values = cached(2, 4, 2, 2, 600, 32, dtype)
    lengths = torch.tensor([600, 301])
    most = 600 // page
    table = torch.randperm(2 * most, generator=torch.Generator().manual_seed(0)).int().view(2, most)
    paged = []
    for held in (keys, values):
        pages = held.view(2, 2, most, page, 32).transpose(1, 2).reshape(-1, 2, page, 32)
        paged.append(pages[table.flatten().argsort()])
    got = paged_attention(q, *paged, table, lengths, impl="cpu")
    assert torch.equal(got, decode_attention(q, keys, values, lengths, impl="cpu"))


def test_rows_may_share_a_page():
    q, keys, values = cached(2, 2, 1, 1, 8, 16)
    table = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    q[1] = q[0]
    got = paged_attention(q, keys.view(4, 1, 4, 16), values.view(4, 1, 4, 16), table,
                          torch.tensor([7, 7]), impl="cpu")  # fmt: skip
    assert torch.equal(got[0], got[1])


# ---- in the model ---------------------------------------------------------------------------


LAYERS = 2


def small_engine(batch=1, cache=None) -> Engine:
    """A decoder of grouped heads, with a cache of this class; nothing is applied to it."""
    from impl.models.decoder import DecoderConfig, LeanDecoder

    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=LAYERS, num_heads=4,
        num_kv_heads=2, head_dim=8, max_positions=64, norm_eps=1e-6,
        rope_frequencies=(1.0, 0.1, 0.01, 0.001))  # fmt: skip
    model = LeanDecoder(config).eval()
    engine = Engine(SPEC, model, torch.float32, torch.device("cpu"), batch)
    if cache is not None:
        engine.new_cache = lambda rows, slots: cache(config, rows, slots)
    return engine


def test_a_prompt_goes_through_our_operator_until_the_engine_is_closed():
    """On a CPU SDPA is one operator too, so none is saved but its arithmetic."""
    from impl import attention

    engine = small_engine()
    ids = torch.arange(20)[None]

    def counted():
        with torch.inference_mode(), attention.Attentions() as count:
            return engine.model(ids), count

    plain, before = counted()
    attention.flash_attention(engine)
    ours, after = counted()
    assert (after.ours, after.theirs) == (LAYERS, 0)
    assert before.theirs >= LAYERS
    assert (ours - plain).abs().max() <= 64 * torch.finfo(torch.float32).eps * plain.abs().max()
    engine.undo.close()
    assert counted()[1].ours == 0


def served(cache, *names):
    """The operators that a stack with a scheduler dispatches for two requests of 5 tokens."""
    engine = small_engine(2, cache)
    for t in stack(*names, "continuous_batching"):
        engine = t.apply(engine)
    with engine.undo:
        requests = [Request(i, torch.arange(3, 7 + i), 5) for i in range(2)]
        return operators_of(lambda: engine.serve(requests))


def test_packed_steps_read_their_spans_without_decode_attention():
    """So the stack of both is none: with it or without, the same operators run."""
    plain, both = (served(GrowingCache, *names) for names in ((), ("decode_attention",)))
    assert plain == both
    assert plain["study::paged_attention"] == 4 * LAYERS  # the first token is the prompt's
    assert not plain["study::decode_attention"]
    scope, why = impossible(stack("continuous_batching", "decode_attention"), SPECS["lm_small"],
                            "fp32", 8)  # fmt: skip
    assert scope == "stack"
    assert "decode_attention has nothing to do there; leave it out, or add static_kv_cache" in why


def test_rows_of_a_static_cache_are_read_by_decode_attention():
    """The remedy that the sentence names: a scheduler of rows leaves the step to it."""
    assert not served(KVCache)["study::decode_attention"]
    assert served(KVCache, "decode_attention")["study::decode_attention"] == 4 * LAYERS
    for cache in ("static_kv_cache", "torch_compile"):  # which brings one along
        assert not impossible(stack("continuous_batching", "decode_attention", cache),
                              SPECS["lm_small"], "fp32", 8)  # fmt: skip
