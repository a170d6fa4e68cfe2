"""What the fused decode step refuses, and the technique ``decode_step`` that is made of it."""

from __future__ import annotations

import pytest
import torch

from impl.models.kv_cache import KVCache
from kernels.decode_step import DecodeStep
from kernels.op import KernelError
from tests.test_decode_step import decoder, needs_a_compiler  # noqa: F401 - for every test


def test_bad_input_is_one_sentence():
    model = decoder()
    step, cache = DecodeStep(model), KVCache(model.config, 1, 8)
    one = torch.tensor([[3]])
    with pytest.raises(KernelError, match="outside the vocabulary of 300"):
        step(one * 100, 0, cache)
    with pytest.raises(KernelError, match="outside the cache of 8 slots"):
        step(one, 8, cache)
    with pytest.raises(KernelError, match="outside the cache of 8 slots"):
        step.generate(one, 0, 9, cache)
    with pytest.raises(KernelError, match="holds 1 rows, the ids have 2"):
        step(torch.tensor([[3], [4]]), 0, cache)
    with pytest.raises(KernelError, match="not to Other"):
        step(one, 0, type("Other", (KVCache,), {})(model.config, 1, 8))
    with pytest.raises(KernelError, match="in float32 or bfloat16"):
        step(one, 0, KVCache(model.config, 1, 8, torch.float16))
    with pytest.raises(KernelError, match="float32, bfloat16 or int8"):
        DecodeStep(decoder(torch.float16))
    with pytest.raises(KernelError, match="leave it out for a mixture"):
        DecodeStep(decoder(num_experts=2, experts_per_token=1))


@pytest.mark.parametrize(("name", "sentence"), [
    ("int4_dynamic_g32", "activations in fp32; take int4_weight_only_g32"),
    ("fp8_dynamic", "float32, bfloat16 or int8 on the CPU, not Fp8Linear with torch.float8_e4m3fn"),
])  # fmt: skip
def test_weights_and_activations_it_does_not_hold_are_one_sentence(name, sentence):
    from impl.core import StudyError, build, stack

    with pytest.raises(StudyError, match=sentence):
        build(engine(), stack("decode_step", name))


def engine(**options):
    """An engine on a small Llama of transformers, with these techniques' members applied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from impl.core import Engine
    from impl.models import SPECS

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=96, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=6, num_key_value_heads=2,
                         max_position_embeddings=128)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return Engine(SPECS["lm_small"], model, torch.float32, torch.device("cpu"), **options)


def test_the_technique_gives_the_same_tokens_and_proves_itself():
    from impl.core import TECHNIQUES, NotEngaged, Sampling, build, stack

    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    lean, fused = build(engine(batch=2), stack("lean_decoder")), None
    fused = build(engine(batch=2), stack("decode_step"))
    expected = lean.generate(ids, 12)
    seen = []
    assert torch.equal(fused.generate(ids, 12, on_token=seen.append), expected)
    assert torch.equal(torch.cat(seen, 1), expected[:, 20:])
    drawn = Sampling(temperature=1.0, seed=3)
    assert torch.equal(fused.generate(ids, 12, drawn), lean.generate(ids, 12, drawn))
    before = fused.stats["fused_steps"]
    whole, wanted = fused.model(ids), lean.model(ids)
    assert fused.stats["fused_steps"] == before + 1, "a forward without a cache is one call"
    assert (whole - wanted).norm() <= 64 * torch.finfo().eps * wanted.norm()
    assert torch.equal(fused.model(ids, columns=torch.tensor([3, 19])), wanted[:, [3, 19]])
    effect = TECHNIQUES["decode_step"].effect
    assert "12 fused steps" in effect(fused, lambda: fused.generate(ids, 12))
    with pytest.raises(NotEngaged, match="no fused step"):
        effect(lean, lambda: lean.generate(ids, 12))
    lean.stats["fused_steps"] = 0
    with pytest.raises(NotEngaged, match="matrix products one by one"):
        effect(lean, lambda: lean.generate(ids, 12))
    fused.undo.close()
    with pytest.raises(NotEngaged):
        effect(fused, lambda: fused.generate(ids, 12))
