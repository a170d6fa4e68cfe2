"""The fused decode step: the decoder's logits, and the same bits in any grouping of tokens."""

from __future__ import annotations

import pytest
import torch

from impl.models.decoder import DecoderConfig, LeanDecoder
from impl.models.kv_cache import GrowingCache, KVCache
from kernels import build
from kernels.decode_step import DecodeStep
from kernels.int8_linear import quantize
from kernels.op import KernelError

SHAPES = {
    "grouped": {},
    "qk_norm": {"qk_norm": True},
    "biases": {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    "window": {"sliding_window": 6},
    "odd": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 20, "hidden_size": 97,
            "intermediate_size": 65, "vocab_size": 301, "tie_embeddings": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def needs_a_compiler():
    if reason := build.lacks_compiler():
        pytest.skip(reason)


def decoder(dtype=torch.float32, **options) -> LeanDecoder:
    shape = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 200, "num_layers": 2,
             "num_heads": 6, "num_kv_heads": 2, "head_dim": 64, "max_positions": 64,
             "norm_eps": 1e-6} | options  # fmt: skip
    exponents = torch.arange(0, shape["head_dim"], 2) / shape["head_dim"]
    torch.manual_seed(0)
    model = LeanDecoder(DecoderConfig(**shape, rope_frequencies=tuple((1e4**-exponents).tolist())))
    for p in model.parameters():
        if p.dim() == 1:  # norms and biases that matter
            p.data += 0.2 * torch.randn_like(p)
    return model.to(dtype).eval()


class Int8(torch.nn.Module):
    """A linear whose weights are int8; ``wide`` computes it in fp32."""

    def __init__(self, linear, dynamic):
        super().__init__()
        self.weight, self.scale = quantize(linear.weight.data)
        self.bias, self.dynamic_activations = linear.bias, dynamic

    def forward(self, x):
        if self.dynamic_activations:
            top = x.abs().amax(-1, keepdim=True) / 127
            x = (x / top).round() * top
        return torch.nn.functional.linear(x, self.weight.float() * self.scale[:, None], self.bias)


def quantized(model, dynamic):
    for layer in model.layers:
        for part, names in ((layer.attention, "q_proj k_proj v_proj o_proj"),
                            (layer.mlp, "gate_proj up_proj down_proj")):  # fmt: skip
            for name in names.split():
                setattr(part, name, Int8(getattr(part, name), dynamic))
    model.lm_head = Int8(model.lm_head, dynamic)
    return model


def steps(step, ids, sizes, cache, start=0):
    """Logits of all tokens of ids (B, T), given in calls of ``sizes`` tokens, rows staggered."""
    out, at = [], 0
    stagger = torch.arange(len(ids))[:, None] * start
    for n in sizes:
        positions = stagger + torch.arange(at, at + n)
        out.append(step(ids[:, at : at + n], positions, cache))
        at += n
    return torch.cat(out, 1)


ISAS = ["avx512_bf16", "avx512_vnni", "avx2", "plain"]


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_logits_are_those_of_the_decoder(shape, level):
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    model = decoder(**SHAPES[shape])
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    caches = [KVCache(model.config, 2, 24) for _ in range(2)]
    with build.isa(level):
        got = steps(DecodeStep(model), ids, [1, 1, 5, 1, 4], caches[0])
    expected = steps(model, ids, [1, 1, 5, 1, 4], caches[1])
    # a network of ~20 roundings in sequence: 32 units in the last place of the largest logit
    assert (got - expected).abs().max() <= 32 * torch.finfo().eps * expected.abs().max()
    for ours, theirs in zip(caches[0].keys, caches[1].keys, strict=True):
        assert (ours - theirs).abs().max() <= 32 * torch.finfo().eps * theirs.abs().max()


@torch.inference_mode()
def test_bf16_is_closer_to_fp32_than_the_decoder_in_bf16():
    model, wide = decoder(torch.bfloat16), decoder()
    wide.load_state_dict(model.state_dict())
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    cache = [KVCache(model.config, 2, 24, d) for d in (torch.bfloat16, torch.bfloat16)]
    exact = steps(wide, ids, [1] * 12, KVCache(model.config, 2, 24))
    got = steps(DecodeStep(model), ids, [1] * 12, cache[0])
    theirs = steps(model, ids, [1] * 12, cache[1]).float()
    assert (got - exact).norm() < (theirs - exact).norm()


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["weights", "weights_and_activations"])
@torch.inference_mode()
def test_int8_weights_are_read_as_they_are(dynamic, level):
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    model = quantized(decoder(**SHAPES["biases"]), dynamic)
    ids = torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(1))
    with build.isa(level):
        got = steps(DecodeStep(model), ids, [1, 6, 1], KVCache(model.config, 2, 24))
    expected = steps(model, ids, [1, 6, 1], KVCache(model.config, 2, 24))
    # an activation on the edge between two int8 values may fall either way: 1/127 of one input
    tolerance = 2e-2 if dynamic else 32 * torch.finfo().eps
    assert (got - expected).norm() <= tolerance * expected.norm()


def spans_of(*requests):
    """ids, positions, starts, columns of requests (first slot, earlier tokens, tokens of now)."""
    ids, positions, starts, columns = [], [], [], []
    for start, before, tokens in requests:
        ids += tokens
        positions += range(before, before + len(tokens))
        starts += [start] * len(tokens)
        columns.append(len(ids) - 1)
    return [torch.tensor(t) for t in (ids, positions, starts, columns)]


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_requests_in_one_call_get_the_logits_they_get_alone(shape, level):
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    model = decoder(**SHAPES[shape], max_positions=300)
    source = torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randint(0, 300, (n,), generator=source).tolist() for n in (5, 13, 1, 270))
    cache = GrowingCache(model.config, 1, 320)
    with build.isa(level):
        step = DecodeStep(model)
        first = step.packed(*spans_of((10, 0, a)), cache)
        # one goes on where others begin, the last of them longer than one call takes
        then = step.packed(*spans_of((10, 5, [7]), (30, 0, b), (0, 0, c), (45, 0, d)), cache)
    texts = [a, [*a, 7], b, c, d]
    alone = torch.stack([model(torch.tensor([t]))[0, -1] for t in texts])
    assert (torch.cat((first, then)) - alone).abs().max() <= 32 * torch.finfo().eps * alone.max()


@torch.inference_mode()
def test_packed_tokens_outside_the_cache_and_columns_out_of_order_are_refused():
    model = decoder()
    step, cache = DecodeStep(model), GrowingCache(model.config, 1, 20)
    with pytest.raises(KernelError, match="outside the cache of 20 slots"):
        step.packed(*spans_of((16, 0, [1, 2, 3, 4, 5])), cache)
    ids, positions, starts, columns = spans_of((0, 0, [1, 2]), (5, 0, [3]))
    with pytest.raises(KernelError, match=r"ascending columns of 3 tokens, not \[2, 1\]"):
        step.packed(ids, positions, starts, columns.flip(0), cache)
    with pytest.raises(KernelError, match="int64 ids, positions and starts of one length"):
        step.packed(ids, positions[:2], starts, columns, cache)


def quantized_to_int4(model):
    """The linears but the head are int4; their ``forward`` computes in fp32."""
    from impl.quantization.int4 import Int4Linear, quantize_linears

    quantize_linears(model, 32)
    assert all(isinstance(m.q_proj, Int4Linear) for m in (x.attention for x in model.layers))
    return model


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("shape", ["grouped", "biases"])
@torch.inference_mode()
def test_int4_weights_are_read_as_they_are(shape, level):
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    model = quantized_to_int4(decoder(**SHAPES[shape], intermediate_size=160))
    ids = torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(1))
    with build.isa(level):
        got = steps(DecodeStep(model), ids, [1, 6, 1], KVCache(model.config, 2, 24))
    expected = steps(model, ids, [1, 6, 1], KVCache(model.config, 2, 24))
    assert (got - expected).norm() <= 32 * torch.finfo().eps * expected.norm()


def prompt_model(kind):
    """A model whose sizes fill no panel, its weights of this kind; its logits' tolerance."""
    fp32 = 64 * torch.finfo().eps  # sums of a prompt stand in another order
    if kind == "int4":
        return quantized_to_int4(decoder(intermediate_size=160)), fp32
    model = decoder(**SHAPES["odd"] | {"mlp_bias": True})
    if kind == "bf16":  # weights rounded beforehand; activations are rounded in the prompt alone
        return model.to(torch.bfloat16), 2e-2
    if kind == "fp32":
        return model, fp32
    # an activation on the edge between two int8 values may fall either way: 1/127 of one input
    return quantized(model, kind == "int8_dynamic"), 2e-2 if kind == "int8_dynamic" else fp32


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int8_dynamic", "int4"])
@torch.inference_mode()
def test_prompts_have_the_logits_of_the_decoder(kind, level, monkeypatch):
    if level not in build.isas():
        pytest.skip(f"needs {level}; this processor's best is {build.isas()[0]}")
    from kernels import decode_step

    model, tolerance = prompt_model(kind)
    ids = torch.randint(0, 300, (2, 45), generator=torch.Generator().manual_seed(1))
    dtype = model.norm.weight.dtype
    ours, theirs = (KVCache(model.config, 2, 64, dtype) for _ in range(2))
    with build.isa(level):
        step = DecodeStep(model)
        got = steps(step, ids, [1, 37, 1, 6], ours)
        monkeypatch.setattr(decode_step, "MOST_ROWS", 40)  # 20 tokens of each row at once
        parts = step(ids, 0, KVCache(model.config, 2, 64, dtype), last_only=True)
    expected = steps(model, ids, [1, 37, 1, 6], theirs)
    assert (got - expected).norm() <= tolerance * expected.norm()
    assert (parts - got[:, -1:]).norm() <= tolerance * got[:, -1:].norm()


@pytest.mark.parametrize("shape", ["grouped", "window", "odd"])
@pytest.mark.parametrize("tokens", [5, 45])
@torch.inference_mode()
def test_without_a_cache_the_logits_are_those_of_a_full_forward(shape, tokens):
    model = decoder(**SHAPES[shape])
    ids = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(1))
    step, expected = DecodeStep(model), model(ids)
    got = step(ids, 0, None)
    assert (got - expected).norm() <= 64 * torch.finfo().eps * expected.norm()
    last = step(ids, 0, None, last_only=True)
    # the last layer of a prompt is then a step of its last tokens, summed as steps are
    few = torch.finfo().eps * (0 if tokens == 5 else 64)
    assert (last - got[:, -1:]).norm() <= few * last.norm()
    cache = KVCache(model.config, 2, 64)
    assert torch.equal(step(ids, 0, cache), got)
    with pytest.raises(KernelError, match="without a cache starts at position 0"):
        step(ids, 3, None)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 45])
@torch.inference_mode()
def test_tokens_without_logits_leave_their_keys_to_the_others(tokens, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = decoder(**SHAPES["odd"])
    ids = torch.randint(0, 300, (3, tokens + 1), generator=torch.Generator().manual_seed(1))
    step, few = DecodeStep(model), 64 * torch.finfo().eps
    caches = [KVCache(model.config, 3, 64) for _ in range(3)]
    full = step(ids[:, :-1], 0, caches[0])
    last = step(ids[:, :-1], 0, caches[1], last_only=True)
    step.use(caches[2])
    positions = torch.arange(tokens).expand(3, -1).contiguous()
    before = ids[:, :-1].contiguous()
    step.raw(3, tokens, 0)(before.data_ptr(), positions.data_ptr(), 0, 0)  # nobody's logits
    assert (last - full[:, -1:]).norm() <= few * last.norm()
    one = [step(ids[:, -1:], tokens, cache) for cache in caches]
    assert torch.equal(one[0], one[1])
    assert torch.equal(one[0], one[2])


@torch.inference_mode()
def test_int4_steps_have_the_same_bits_in_any_grouping(monkeypatch):
    model = quantized_to_int4(decoder(intermediate_size=160))
    step = DecodeStep(model)
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    single = steps(step, ids, [1] * 12, KVCache(model.config, 3, 24))
    assert torch.equal(single, steps(step, ids, [1, 7, 4], KVCache(model.config, 3, 24)))
    for threads in (1, 3):  # 3 share 96 outputs unevenly
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert torch.equal(single, steps(step, ids, [2] * 6, KVCache(model.config, 3, 24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_any_grouping_of_tokens_rows_and_threads_gives_the_same_bits(dtype, monkeypatch):
    model = decoder(dtype)
    step = DecodeStep(model)
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    single = steps(step, ids, [1] * 12, KVCache(model.config, 3, 24, dtype))
    assert torch.equal(single, steps(step, ids, [1, 7, 4], KVCache(model.config, 3, 24, dtype)))
    row = steps(step, ids[1:2], [1] * 12, KVCache(model.config, 1, 24, dtype))
    assert torch.equal(single[1:2], row)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        again = steps(step, ids, [2] * 6, KVCache(model.config, 3, 24, dtype))
        assert torch.equal(single, again)


@torch.inference_mode()
def test_rows_may_stand_at_different_lengths():
    model = decoder()
    step, cache = DecodeStep(model), KVCache(model.config, 2, 40)
    ids = torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(1))
    step(ids[1:].expand(2, -1)[:, :5], 0, cache)  # row 1 has a prefix of 5
    got = step(torch.stack((ids[0, :3], ids[1, 5:8])), torch.tensor([[0, 1, 2], [5, 6, 7]]), cache)
    alone = KVCache(model.config, 1, 40)
    first = step(ids[:1, :3], 0, alone)
    alone = KVCache(model.config, 1, 40)
    second = step(ids[1:, :8], 0, alone)[:, 5:]
    assert torch.equal(got, torch.cat((first, second)))


@torch.inference_mode()
def test_greedy_generation_takes_the_largest_logit():
    model = decoder()
    step, seen = DecodeStep(model), []
    cache, other = KVCache(model.config, 2, 24), GrowingCache(model.config, 2, 24)
    first = torch.tensor([[5], [9]])
    tokens = step.generate(first, 0, 10, cache, seen.append)
    ids = torch.cat((first, tokens), 1)
    assert torch.equal(tokens, torch.cat(seen, 1))
    assert torch.equal(tokens, step.generate(first, 0, 10, cache))  # all steps in one call
    for i in range(10):
        assert torch.equal(step(ids[:, i : i + 1], i, other)[:, 0].argmax(-1), tokens[:, i])
