"""Drawing from the nucleus: which tokens may come, how often, and what rounding may change."""

from __future__ import annotations

import pytest
import torch

from kernels import build
from kernels.op import OPS
from kernels.top_p_sampling import top_p_sampling
from tests import kernel_tools
from tests.kernel_cases.sampling import judge

IMPLS = ["reference", "cpu", "cuda_on_host"]


@pytest.fixture(params=IMPLS)
def draw(request, monkeypatch):
    """``draw(logits, uniform, temperature, top_p)`` by every implementation that runs here."""
    if request.param == "cuda_on_host":
        if reason := kernel_tools.lacks_shim():
            pytest.skip(reason)
        with kernel_tools.host_shim(monkeypatch):
            yield OPS["top_p_sampling"].functions["cuda"]
        return
    if request.param == "cpu" and (reason := build.lacks_compiler()):
        pytest.skip(reason)
    yield lambda *args: top_p_sampling(*args, impl=request.param)


def drawn(draw, logits, uniforms, temperature=1.0, top_p=1.0):
    """The tokens that each of ``uniforms`` gives of one row of logits."""
    rows = torch.tensor(logits, dtype=torch.float32).expand(len(uniforms), -1).contiguous()
    return draw(rows, torch.tensor(uniforms), temperature, top_p).tolist()


LOGITS = [0.5, 0.1, 0.3, 0.1]
LOG = torch.tensor(LOGITS).log().tolist()


def test_the_uniform_runs_through_the_vocabulary(draw):
    assert drawn(draw, LOG, [0.0, 0.49, 0.51, 0.59, 0.61, 0.89, 0.91, 0.999]) == [
        0, 0, 1, 1, 2, 2, 3, 3]  # fmt: skip
    assert drawn(draw, LOG, [1.0, 7.0, -1.0]) == [3, 3, 0], "beyond its ends"


def test_the_nucleus_is_the_fewest_that_reach_top_p_and_of_equals_the_first(draw):
    ends = [0.0, 0.3, 0.6, 0.7, 0.999]
    assert drawn(draw, LOG, ends, top_p=0.0) == [0] * 5
    assert drawn(draw, LOG, ends, top_p=0.45) == [0] * 5
    assert drawn(draw, LOG, ends, top_p=0.7) == [0, 0, 0, 2, 2]
    assert drawn(draw, LOG, ends, top_p=0.85) == [0, 0, 1, 2, 2], "token 1 before its equal, 3"
    later = torch.tensor([0.1, 0.1, 0.5, 0.3]).log().tolist()
    assert drawn(draw, later, [0.05, 0.17, 0.9], top_p=0.85) == [0, 2, 3], "1 is out, 2 is in"
    assert drawn(draw, [1.0] * 8, [0.0, 0.34, 0.67, 0.99], top_p=0.3) == [0, 1, 2, 2]
    assert drawn(draw, [0.0, -0.0, 0.0], [0.0, 0.99], top_p=0.5) == [0, 1], "-0 equals 0"


def test_temperature_zero_is_greedy_and_a_tiny_one_too(draw):
    for temperature in (0.0, 1e-30, 1e-45):
        assert drawn(draw, [1.0, 3.0, 2.0, 3.0], [0.0, 0.4], temperature, 0.9) == [1, 1]
    assert drawn(draw, [1.0, 3.0, 2.0], [0.0, 0.5, 0.99], 1e30) == [0, 1, 2], "and hot is uniform"
    assert drawn(draw, [1.0, 3.0, 2.0], [0.0, 0.5, 0.99], 1e300) == [0, 1, 2]


def test_masked_tokens_are_never_drawn_and_one_token_always_is(draw):
    masked = [float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]
    for top_p in (0.3, 0.9, 1.0):
        assert set(drawn(draw, masked, [0.0, 0.3, 0.6, 0.999, 1.0], top_p=top_p)) <= {1, 3}
    assert drawn(draw, [-7.0], [0.0, 0.999], 0.5, 0.5) == [0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_without_a_distribution_give_no_token(draw, temperature):
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, nan, 1.0], [0.0, inf, 1.0], [-inf] * 3, [0.0, 9.0, 1.0], [1.0] * 3])
    uniform = torch.tensor([0.5, 0.5, 0.5, 0.5, nan])
    assert draw(rows, uniform, temperature, 0.9).tolist() == [-1, -1, -1, 1, -1]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("top_p", [0.6, 0.9, 1.0])
def test_draws_follow_the_distribution(impl, top_p):
    """Chi-square against fp64: 40 000 draws."""
    import scipy.stats

    if impl == "cpu" and (reason := build.lacks_compiler()):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(2)
    logits, n = 2 * torch.randn(40, generator=generator), 40_000
    uniform = torch.rand(n, generator=generator)
    tokens = top_p_sampling(logits.expand(n, -1), uniform, 0.8, top_p, impl=impl)
    seen = torch.bincount(tokens, minlength=40)
    probs = torch.softmax(logits.double() / 0.8, -1)
    order = probs.argsort(descending=True)
    reached = probs[order].cumsum(0)
    inside = order[: int((reached < top_p).sum()) + 1 if top_p < 1 else 40]
    expected = probs[inside] / probs[inside].sum() * n
    assert seen.sum() == seen[inside].sum() == n, "a token outside the nucleus"
    often = expected >= 5
    counts = torch.cat((seen[inside][often], seen[inside][~often].sum()[None])).double()
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    there = wanted > 0
    assert scipy.stats.chisquare(counts[there], wanted[there]).pvalue > 1e-3
    flat = torch.full_like(wanted[there], n / int(there.sum()))
    assert scipy.stats.chisquare(counts[there], flat).pvalue < 1e-9, "the test sees a wrong one"


SCALES = [0.0, 1e-18, 1.0, 4.0, 1e15]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", SCALES)
def test_no_sort_draws_what_a_sort_draws(scale, dtype):
    """Flat and peaked rows, every top_p, all tied, many chunks: within rounding of a border."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(5)
    for vocab in (1, 17, 300, 5000, 40_000):
        logits = (scale * torch.randn(3, vocab, generator=generator)).to(dtype)
        uniform = torch.rand(3, generator=generator)
        for top_p in (0.0, 0.1, 0.5, 0.9, 0.9999, 1.0):
            for temperature in (0.0, 0.7, 1e-30, 1e30):
                args = [logits, uniform, temperature, top_p]
                for level in build.isas()[:1] if vocab > 5000 else build.isas():
                    with build.isa(level):
                        assert judge(top_p_sampling(*args, impl="cpu"), args) <= 1
                assert judge(top_p_sampling(*args, impl="reference"), args) <= 1


@pytest.mark.parametrize("wrong", [1, -1])
def test_the_judge_refuses_a_neighbour(wrong):
    args = [torch.zeros(1, 200), torch.tensor([0.5025]), 1.0, 1.0]
    right = top_p_sampling(*args, impl="reference")
    assert judge(right, args) <= 1
    assert judge(right + wrong, args) > 1


def test_the_judge_allows_both_nuclei_at_a_border_and_no_third():
    args = [torch.zeros(1, 10), torch.tensor([0.95]), 1.0, 0.3]  # three tokens or, rounded, four
    allowed = {t for t in range(10) if judge(torch.tensor([t]), args) <= 1}
    assert allowed == {2, 3}


def test_logits_far_apart_end_the_search():
    """Each a tenth of the next: pivots between the ends part them one by one."""
    if reason := build.lacks_compiler():
        pytest.skip(reason)
    logits = -(10.0 ** -torch.arange(0, 38, 0.05))[None]
    args = [logits, torch.tensor([0.4]), 1.0, 0.5]
    assert judge(top_p_sampling(*args, impl="cpu"), args) <= 1
