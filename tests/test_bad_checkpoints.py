"""Does every bad checkpoint say in one sentence what is wrong and what to do?"""

# ruff: noqa: F811 (fixtures are imported by name)

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from impl.core import StudyError
from impl.models import load, spec_of
from impl.models.encoder import SentenceEncoder
from tests.test_checkpoints import encoder, forget_configs, hub_cache, llama  # noqa: F401
from tests.test_models import checkpoint


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def cut(path, share, more=b""):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)] + more)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickle(folder):
    no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def lost_shard(folder):
    checkpoint(folder, "llama", max_shard_size="20KB")
    no_weights(folder)
    next(folder.glob("model-00002-of-*.safetensors")).unlink()


K = "model.layers.0.self_attn.k_proj.weight"
BAD = {
    "truncated": (lambda f: cut(f / "model.safetensors", 0.5),
                  r"model\.safetensors is truncated: \d+ bytes instead of \d+; copy it again"),
    "cut_header": (lambda f: cut(f / "model.safetensors", 0.01), "is not a safetensors file"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 400),
                "is not a safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a safetensors file"),
    "too_long": (lambda f: cut(f / "model.safetensors", 1, b"more"), "is damaged"),
    "no_weights": (no_weights, r"has no model\.safetensors; copy the weights"),
    "pickle": (only_pickle, r"pytorch_model\.bin, a pickle, which can run code"),
    "lost_shard": (lost_shard, r"model-00002-of-\d+\.safetensors is missing; the index"),
    "missing_tensor": (lambda f: edit_weights(f, lambda s: s.pop(K)), f"lacks 1 tensor: {K}; the"),
    "extra_tensor": (lambda f: edit_weights(f, lambda s: s.update(ghost=torch.ones(2))),
                     "has in excess 1 tensor: ghost; the weights do not belong"),
    "wrong_shape": (lambda f: edit_weights(f, lambda s: s.update({K: torch.ones(8, 8)})),
                    rf"misshapen 1 tensor: {K} \(8, 8\) instead of \(24, 48\)"),
    "more_layers": (lambda f: edit_config(f, num_hidden_layers=3),
                    r"lacks 9 tensors: model\.layers\.2.* and 6 more; the weights"),
    "no_config": (lambda f: (f / "config.json").unlink(), r"has no config\.json; give the folder"),
    "bad_config": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no_type": (lambda f: edit_config(f, model_type=None), "names no model_type"),
    "other_type": (lambda f: edit_config(f, model_type="mamba"),
                   "of type 'mamba', which is not supported; supported: llama, mistral,"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "already quantized"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_checkpoint_is_one_sentence(llama, fault):
    spoil, sentence = BAD[fault]
    spoil(llama)
    with pytest.raises(StudyError, match=sentence) as caught:
        load(str(llama), torch.float32)
    assert "\n" not in str(caught.value)


def test_remote_code_is_never_run(llama):
    (llama / "modeling_evil.py").write_text("raise SystemExit('remote code ran')\n")
    edit_config(llama, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil",
                                 "AutoConfig": "modeling_evil.EvilConfig"})  # fmt: skip
    _, model = load(str(llama), torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_head_of_another_task_does_no_harm_to_an_encoder(tmp_path):
    folder = encoder(tmp_path / "bert")
    edit_weights(folder, lambda s: s.update({"cls.predictions.bias": torch.ones(50)}))
    _, model = load(str(folder), torch.float32)
    assert isinstance(model, SentenceEncoder)


def test_a_classifier_without_its_head_is_refused(tmp_path):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "body")
    with pytest.raises(StudyError, match="is a resnet without a classifier"):
        spec_of(str(tmp_path / "body"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lm_smal", "unknown model 'lm_smal'; did you mean 'lm_small'"),
        ("./nowhere", "there is no folder ./nowhere; give the folder of a checkpoint"),
        ("/no/such/place", "there is no folder /no/such/place"),
        ("someone/else", "neither a folder here nor in the hub cache .* check the name"),
    ],
)
def test_an_unknown_model_is_one_sentence(hub_cache, name, sentence):
    with pytest.raises(StudyError, match=sentence) as caught:
        load(name, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_checkpoint(llama):
    with pytest.raises(StudyError, match="is a file; give the folder that holds"):
        load(str(llama / "config.json"), torch.float32)
