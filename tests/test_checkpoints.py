"""Does every model of the zoo load, a user's checkpoint too, and does a bad one say why?"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import impl.models as zoo
from impl.core import NEEDS, StudyError
from impl.fidelity import ROUNDING_DB, sqnr_db
from impl.models import SPECS, costs, load, spec_of
from impl.models.decoder import from_transformers
from tests.test_models import checkpoint, ids_of


@pytest.fixture(autouse=True)
def forget_configs():
    """Configs are read once per process; tests write several under one name."""
    zoo._config_text.cache_clear()
    yield
    zoo._config_text.cache_clear()


@pytest.fixture
def llama(tmp_path):
    return checkpoint(tmp_path / "a_llama", "llama")


def encoder(folder):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=64)  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def resnet_config():
    return {"model_type": "resnet", "architectures": ["ResNetForImageClassification"],
            "num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
            "layer_type": "basic", "num_labels": 10}  # fmt: skip


# ---- specs -------------------------------------------------------------------------------


def test_listing_the_zoo_imports_no_transformers():
    code = (
        "import sys, impl.models as zoo; [zoo.footprint_bytes(s, 'bf16', 8) "
        "for s in zoo.SPECS.values() if s.random_weights]; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_specs_say_what_techniques_may_ask():
    for spec in SPECS.values():
        assert spec.needs <= NEEDS
        assert bool(spec.metrics) != spec.random_weights, "random weights have no quality"
        if spec.random_weights:
            assert zoo.capabilities(spec.config, spec.name) == (spec.kind, spec.needs)


def test_footprint_grows_with_batch_and_precision():
    spec = SPECS["llama_8b"]
    two_copies = 2 * costs.decoder_parameters(spec.config) * 2
    assert zoo.footprint_bytes(spec, "bf16", 1) > two_copies > 32e9
    assert zoo.footprint_bytes(spec, "bf16", 64) > zoo.footprint_bytes(spec, "bf16", 8)
    assert zoo.footprint_bytes(spec, "fp32", 1) > 1.9 * zoo.footprint_bytes(spec, "bf16", 1)


@pytest.mark.parametrize(
    ("case", "more"), [("llama", {"unaligned"}), ("mixtral", {"unaligned", "experts"})]
)
def test_needs_of_a_checkpoint_are_read_off_its_config(tmp_path, case, more):
    spec = spec_of(str(checkpoint(tmp_path / case, case)))
    assert spec.kind == "decoder"
    assert spec.needs == {"generate", "lean", "linear", "attention", "qkv"} | more
    assert spec.source == "checkpoint"
    assert not spec.random_weights


@pytest.mark.parametrize("folder", ["llama-1b", "minilm", "BF16", "batch8", "x"])
def test_the_id_token_of_a_checkpoint_contains_no_other(tmp_path, folder):
    name = spec_of(str(checkpoint(tmp_path / folder, "llama"))).name
    assert name.replace("_", "").isalnum()
    assert not any(t in name for t in (*SPECS, "fp32", "bf16", "fp16", "batch"))


# ---- what loads --------------------------------------------------------------------------


def test_sharded_checkpoint(tmp_path, llama):
    shards = checkpoint(tmp_path / "sharded", "llama", max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    (_, whole), (_, split) = (load(str(f), torch.float32) for f in (llama, shards))
    with torch.inference_mode():
        assert torch.equal(whole(ids_of(1, 9)).logits, split(ids_of(1, 9)).logits)


def test_loaded_models_are_ready_for_inference(llama):
    spec, model = load(str(llama), torch.bfloat16)
    assert spec.name == "user_a_llama"
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert model.config._attn_implementation == "sdpa"


def test_gpt2_runs_on_transformers_with_plain_linears(tmp_path):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    original = transformers.GPT2LMHeadModel(config).eval()
    original.save_pretrained(tmp_path / "gpt")
    spec, model = load(str(tmp_path / "gpt"), torch.float32)
    assert spec.needs == {"generate", "linear", "attention", "unaligned"}  # not "lean"
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 4 * 2 + 1
    with torch.inference_mode():
        ids = ids_of(2, 12)
        assert sqnr_db(original(ids).logits, model(ids).logits) >= ROUNDING_DB["fp32"]
    assert costs.kv_bytes_per_token(spec.config, 4) == 2 * 2 * 32 * 4
    with pytest.raises(StudyError, match="not 'gpt2'; use techniques that run on transformers"):
        from_transformers(model)


def test_encoder_checkpoint_gives_unit_vectors(tmp_path):
    spec, model = load(str(encoder(tmp_path / "bert")), torch.float32)
    assert (spec.kind, spec.needs) == ("encoder", {"linear", "attention", "embed", "qkv", "gelu"})
    with torch.inference_mode():
        ids = torch.randint(1, 50, (3, 7))
        out = model(ids)
        padded = model(torch.nn.functional.pad(ids, (0, 4)),
                       torch.nn.functional.pad(torch.ones_like(ids), (0, 4)))  # fmt: skip
    assert out.shape == (3, 64)
    assert sqnr_db(torch.ones(3), out.norm(dim=-1)) >= ROUNDING_DB["fp32"]
    assert sqnr_db(out, padded) >= ROUNDING_DB["fp32"]


@pytest.mark.parametrize("name", ["ResNet", "ViT"])
def test_image_classifier_checkpoint(tmp_path, name):
    import transformers

    options = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        "ViT": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 32, "image_size": 32, "patch_size": 8},
    }[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)
    model_class = getattr(transformers, f"{name}ForImageClassification")
    model_class(config).save_pretrained(tmp_path / name)
    spec, model = load(str(tmp_path / name), torch.float32)
    assert spec.kind == "classifier"
    kind = "conv" if name == "ResNet" else "attention"
    assert spec.needs == {"classify", "linear", "unaligned", kind}  # 5 classes
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 5)
    assert zoo.footprint_bytes(spec, "fp32", 2) > 8 * costs.parameter_count(model)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, llama):
    """A cache laid out as the hub's own, holding someone/a-llama; offline."""
    from huggingface_hub import constants

    repo = tmp_path / "hub" / "models--someone--a-llama"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(llama, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_hub_id_is_read_from_the_cache(hub_cache, llama):
    spec, model = load("someone/a-llama", torch.float32)
    assert (spec.name, spec.path) == ("user_a_llama", "someone/a-llama")
    _, local = load(str(llama), torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(ids_of(1, 9)).logits, local(ids_of(1, 9)).logits)


def test_minilm_puts_like_sentences_together():
    if reason := SPECS["minilm"].lacks():
        pytest.skip(reason)
    spec, model = load("minilm", torch.float32)
    assert costs.parameter_count(model) == costs.parameters(spec)
    texts = ["How do I open a file?", "Reading files with open()", "The cat chased a mouse"]
    with torch.inference_mode():
        a, b, c = model(**model.tokenize(texts))
        alone = model(**model.tokenize(texts[:1]))[0]
    assert a @ b > 0.5 > 0.2 > a @ c
    assert sqnr_db(a, alone) >= ROUNDING_DB["fp32"]


def test_minilm_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("impl.models.encoder.PACKAGE", "no-such-package-here")
    with pytest.raises(
        StudyError, match="needs the package no-such-package-here; install the extra"
    ):
        load("minilm", torch.float32)
    assert "the extra" in SPECS["minilm"].lacks()


def test_minilm_with_other_weights_is_refused(monkeypatch):
    if reason := SPECS["minilm"].lacks():
        pytest.skip(reason)
    monkeypatch.setattr("impl.models.encoder.MINILM_SHA256", "0" * 64)
    with pytest.raises(StudyError, match=r"is not the published all-MiniLM-L6-v2 \(SHA-256 53aa51"):
        load("minilm", torch.float32)


# ---- shipped and random weights ----------------------------------------------------------


def write_shipped(folder, name, model, config, shards=1):
    state = {k: v.bfloat16() for k, v in model.state_dict().items() if v.is_floating_point()}
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight")
    keys = sorted(state)
    for i in range(shards):
        part = {k: state[k].contiguous() for k in keys[i::shards]}
        file = (
            f"{name}.safetensors"
            if shards == 1
            else f"{name}-{i + 1:05}-of-{shards:05}.safetensors"
        )
        save_file(part, folder / file)
    (folder / f"{name}.json").write_text(json.dumps({"config": config, "figures": {}}))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """lm_small (in two shards) and digits_resnet with random weights, in place of the real ones."""
    import transformers

    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.15)  # fmt: skip
    write_shipped(tmp_path, "lm_small", transformers.LlamaForCausalLM(llama), llama.to_dict(), 2)
    config = dict(resnet_config())
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**{k: v for k, v in config.items() if k != "model_type"})
    )
    save_file(resnet.state_dict(), tmp_path / "digits_resnet.safetensors")
    (tmp_path / "digits_resnet.json").write_text(json.dumps({"config": config}))
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    return tmp_path


def test_shipped_weights_load_tied_and_sharded(shipped):
    spec, model = load("lm_small", torch.float32)
    assert spec.lacks() is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert costs.parameter_count(model) == costs.parameters(spec)
    _, resnet = load("digits_resnet", torch.float32)
    assert resnet(torch.randn(2, 1, 8, 8)).logits.shape == (2, 10)


def test_outliers_are_planted_without_changing_the_function(shipped):
    seen = {}
    ids = ids_of(2, 20)
    for name in ("lm_small", "lm_outliers"):
        _, model = load(name, torch.float32)
        layer = model.model.layers[1]
        for kind, linear in (("attention", layer.self_attn.q_proj), ("mlp", layer.mlp.up_proj)):
            linear.register_forward_pre_hook(
                lambda _, args, key=(name, kind): seen.update({key: args[0].abs().amax((0, 1))})
            )
        with torch.inference_mode():
            seen[name] = model(ids).logits
    assert torch.equal(seen["lm_small"], seen["lm_outliers"])  # powers of two: the same bits
    for kind in ("attention", "mlp"):
        ratio = seen["lm_outliers", kind] / seen["lm_small", kind]
        assert sorted(ratio.tolist()) == [1.0] * 42 + [32.0] * 6


def test_weights_that_are_not_there_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(StudyError, match=r"make them with python -m impl\.models\.train lm_small"):
        load("lm_small", torch.float32)
    assert "impl.models.train lm_small" in SPECS["lm_outliers"].lacks()


@pytest.mark.parametrize("name", ["bert_base", "resnet50"])
def test_random_weights_at_real_shapes(name):
    spec, model = load(name, torch.bfloat16)
    assert costs.parameter_count(model) == costs.parameters(spec)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        if spec.kind == "encoder":
            out = model(torch.arange(10).view(2, 5))
        else:
            out = model(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).logits
    assert out.isfinite().all()
    assert out.std() > 0
    again = load(name, torch.bfloat16)[1].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())  # seeded


def test_random_weights_of_a_decoder(monkeypatch):
    small = {**zoo.SHAPES["llama_1b"], "hidden_size": 256, "intermediate_size": 512,
             "vocab_size": 20000, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
    monkeypatch.setitem(zoo.SHAPES, "llama_1b", small)
    spec, model = load("llama_1b", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert costs.parameter_count(model) == costs.parameters(spec)
    with torch.inference_mode():
        assert 0.5 < model(ids_of(1, 8)).logits.std() < 2
        assert sqnr_db(model(ids_of(1, 8)).logits, from_transformers(model)(ids_of(1, 8))) > 100
    rows = model.model.layers[0].mlp.gate_proj.weight[:2]
    assert not torch.equal(rows[0], rows[1])
