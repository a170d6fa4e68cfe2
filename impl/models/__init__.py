"""The zoo: what each model is and can do (``SPECS``), and ``load``.

Importing this reads no weights and imports neither torch nor transformers, so that listing the
cells of the study stays quick.  What a model can do (``needs``) is written down for the zoo and
read off ``config.json`` for a user's checkpoint (``spec_of``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impl.core import StudyError, nearest

if TYPE_CHECKING:
    import torch

WEIGHTS = Path(__file__).parent / "weights"
LAYER_STEP = 4  # layers are taken off a model that does not fit by so many

# model_type of config.json -> what we do with it
LEAN_DECODERS = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
OTHER_DECODERS = ("gpt2",)
ENCODERS = ("bert", "distilbert", "mpnet", "roberta")
CLASSIFIERS = ("convnext", "deit", "mobilenet_v2", "resnet", "vit")


@dataclass(frozen=True)
class ModelSpec:
    """What a model is, before any weight is read.

    kind            ``decoder``, ``encoder`` or ``classifier``
    needs           what techniques may ask of it: ``generate``, ``lean`` (the lean decoder runs
                    it), ``linear``, ``conv``, ``attention``, ``experts``, ``classify``, ``embed``,
                    ``unaligned`` (sizes that are no multiple of 64), ``draft`` (lm_draft speaks
                    its tokens), ``qkv`` (three linears side by side make q, k and v), ``gelu``
                    (a linear with GELU behind it)
    metrics         the quality figures measured, the headline first; none for random weights
    random_weights  seeded random weights at real shapes: speed and memory only
    auxiliary       serves other models (a draft); no cells of its own
    source          ``shipped``, ``rescaled``, ``random``, ``package`` or ``checkpoint``
    path            folder or hub id of a user's checkpoint
    text, data      the user's own file or folder to measure quality on
    layers          how many of its layers are left, where all would not fit (``cut_to_fit``)
    """

    name: str
    kind: str
    needs: frozenset[str]
    description: str
    metrics: tuple[str, ...] = ()
    random_weights: bool = False
    auxiliary: bool = False
    source: str = "shipped"
    path: str | None = None
    text: str | None = None
    data: str | None = None
    layers: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's transformers config as a dictionary (a new one each time)."""
        config = json.loads(_config_text(self.name, self.source, self.path))
        return config | ({"num_hidden_layers": self.layers} if self.layers else {})

    @property
    def size_note(self) -> str:
        """' (8 of 32 layers)' of a model that is cut, else nothing."""
        if not self.layers:
            return ""
        whole = dataclasses.replace(self, layers=None).config["num_hidden_layers"]
        return f" ({self.layers} of {whole} layers)"

    def lacks(self) -> str | None:
        """What is missing here to load it, as a sentence, or None."""
        if self.source == "package":
            from .encoder import package_folder

            try:
                package_folder()
            except StudyError as error:
                return str(error)
        if self.source in ("shipped", "rescaled"):
            try:
                shipped_files(_shipped_name(self))
            except StudyError as error:
                return str(error)
        return None


_DECODER = frozenset({"generate", "lean", "linear", "attention", "qkv"})
_BERT = frozenset({"linear", "attention", "embed", "qkv", "gelu"})
_CONV_NET = frozenset({"conv", "linear", "classify", "unaligned"})  # 10 and 1000 classes
_LANGUAGE = ("perplexity", "kl", "top1_agreement", "completion")

_LLAMA_1B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
                        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192},
}  # fmt: skip
# Shapes of the models with random weights: Llama 3.2 1B, Llama 3.1 8B, BERT base, ResNet-50.
SHAPES: dict[str, dict[str, Any]] = {
    "llama_1b": _LLAMA_1B,
    "llama_8b": {
        **_LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "head_dim": 128, "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA_1B["rope_parameters"], "factor": 8.0},
    },
    "bert_base": {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522,
                  "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                  "num_attention_heads": 12, "max_position_embeddings": 512},
    "resnet50": {"model_type": "resnet", "architectures": ["ResNetForImageClassification"],
                 "num_channels": 3, "embedding_size": 64, "layer_type": "bottleneck",
                 "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3],
                 "num_labels": 1000},
}  # fmt: skip

SPECS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("lm_small", "decoder", _DECODER | {"draft"}, "Llama type, 10.9 M parameters, "
                  "trained here on the standard library's source", _LANGUAGE),
        ModelSpec("lm_draft", "decoder", _DECODER, "Llama type, 0.98 M parameters, lm_small's "
                  "draft: same tokenizer, a tenth of the cost", _LANGUAGE, auxiliary=True),
        ModelSpec("lm_outliers", "decoder", _DECODER | {"draft"}, "lm_small with a few channels "
                  "scaled up and down again: the same function, outliers as in large models",
                  _LANGUAGE,
                  source="rescaled"),
        ModelSpec("digits_resnet", "classifier", _CONV_NET,
                  "transformers' ResNet trained here on scikit-learn's digits", ("accuracy",)),
        ModelSpec("minilm", "encoder", _BERT, "all-MiniLM-L6-v2 with its pretrained "
                  "weights", ("cosine", "retrieval"), source="package"),
        ModelSpec("llama_1b", "decoder", _DECODER, "the shape of Llama 3.2 1B, random weights",
                  random_weights=True, source="random"),
        ModelSpec("llama_8b", "decoder", _DECODER, "the shape of Llama 3.1 8B, random weights",
                  random_weights=True, source="random"),
        ModelSpec("bert_base", "encoder", _BERT, "the shape of BERT base, random weights",
                  random_weights=True, source="random"),
        ModelSpec("resnet50", "classifier", _CONV_NET,
                  "the shape of ResNet-50, random weights", random_weights=True, source="random"),
    )
}  # fmt: skip


def _shipped_name(spec: ModelSpec) -> str:
    return "lm_small" if spec.source == "rescaled" else spec.name


@functools.cache
def _config_text(name: str, source: str, path: str | None) -> str:
    if source == "random":
        return json.dumps(SHAPES[name])
    if source == "checkpoint":
        from .checkpoint import complete_config

        return complete_config(str(path)).to_json_string(use_diff=False)
    if source == "package":
        from .encoder import package_folder

        return (package_folder() / "config.json").read_text("utf-8")
    recipe, _ = shipped_files("lm_small" if source == "rescaled" else name)
    return json.dumps(json.loads(recipe.read_text("utf-8"))["config"])


def shipped_files(name: str) -> tuple[Path, list[Path]]:
    """The recipe (JSON) and the safetensors files of a model shipped with the study."""
    recipe = WEIGHTS / f"{name}.json"
    found = sorted(WEIGHTS.glob(f"{name}.safetensors")) or sorted(
        WEIGHTS.glob(f"{name}-?????-of-?????.safetensors")
    )
    if not recipe.is_file() or not found:
        raise StudyError(
            f"the weights of {name} are not in impl/models/{WEIGHTS.name}; make them with "
            f"python -m impl.models.train {name}, or check out the repository again"
        )
    return recipe, found


def spec_of(name_or_path: str) -> ModelSpec:
    """The spec of a model of the zoo, or of a checkpoint: a folder or a hub id (``owner/name``).

    Reads config.json only.  Raises ``StudyError`` for a name that is none of them, a checkpoint
    that is not there, and a type that is not supported.
    """
    if name_or_path in SPECS:
        return SPECS[name_or_path]
    looks_local = name_or_path.startswith((".", "/", "~")) or Path(name_or_path).exists()
    if not looks_local and "/" not in name_or_path:
        raise nearest("model", name_or_path, SPECS)
    from .checkpoint import read_config

    config = read_config(name_or_path)
    kind, needs = capabilities(config, name_or_path)
    metrics = {"decoder": _LANGUAGE[:3], "encoder": ("cosine",), "classifier": ("accuracy",)}
    return ModelSpec(
        _token(name_or_path), kind, needs, f"{config['model_type']} checkpoint {name_or_path}",
        metrics[kind], source="checkpoint", path=name_or_path)  # fmt: skip


def capabilities(config: dict[str, Any], where: str) -> tuple[str, frozenset[str]]:
    """Kind and needs of a model, read off its transformers config."""
    model_type = config.get("model_type")
    aligned = [config.get(k) or 64 for k in ("hidden_size", "intermediate_size")]
    if model_type in LEAN_DECODERS:
        needs = set(_DECODER) | ({"experts"} if model_type == "mixtral" else set())
        if any(size % 64 for size in (*aligned, config.get("vocab_size") or 64)):
            needs.add("unaligned")
        return "decoder", frozenset(needs)
    if model_type in OTHER_DECODERS:  # on transformers' own model alone: not "lean"
        odd = {"unaligned"} if (config.get("vocab_size") or 50257) % 64 else set()
        return "decoder", frozenset({"generate", "linear", "attention"} | odd)
    if model_type in ENCODERS:
        needs = {"linear", "attention", "embed"}
        if model_type in ("bert", "roberta"):  # transformers' modules of these names and forms
            gelu = str(config.get("hidden_act", "gelu")).startswith("gelu")
            needs |= {"qkv", "gelu"} if gelu else {"qkv"}
        return "encoder", frozenset(
            needs | ({"unaligned"} if any(s % 64 for s in aligned) else set())
        )
    if model_type in CLASSIFIERS:
        if not any("ForImageClassification" in a for a in config.get("architectures") or ()):
            raise StudyError(
                f"{where} is a {model_type} without a classifier ({config.get('architectures')}); "
                "give a checkpoint saved from a ...ForImageClassification model"
            )
        attention = {"attention"} if model_type in ("deit", "vit") else {"conv"}
        labels = config.get("num_labels") or len(config.get("id2label") or "ab")
        odd = {"unaligned"} if labels % 64 else set()
        return "classifier", frozenset({"linear", "classify"} | attention | odd)
    known = (*LEAN_DECODERS, *OTHER_DECODERS, *ENCODERS, *CLASSIFIERS)
    raise StudyError(
        f"{where} is of type {model_type!r}, which is not supported; supported: {', '.join(known)}"
    )


def _token(path: str) -> str:
    """A cell-id token for a checkpoint: [a-z0-9_], containing no other token of an id."""
    name = "user_" + re.sub("[^a-z0-9]+", "_", Path(path).name.lower()).strip("_")
    taken = (*SPECS, "fp32", "bf16", "fp16", "batch")
    if any(token in name for token in taken):
        name = f"user_model_{zlib.crc32(str(path).encode())}"
    return name


def load(model: str | ModelSpec, dtype: torch.dtype, device: str | torch.device = "cpu"):
    """(spec, transformers' own model): eval mode, no gradients, ``dtype`` on ``device``.

    model  a name of the zoo, a folder, a hub id, or the spec of one.  Encoders come as a
    ``SentenceEncoder`` (embeddings (B, C)).  Remote code is never run, pickles are never read.
    Raises ``StudyError`` for whatever is wrong with the checkpoint.
    """
    spec = spec_of(model) if isinstance(model, str) else model
    from . import checkpoint

    loaders = {
        "shipped": checkpoint.load_shipped,
        "rescaled": checkpoint.load_rescaled,
        "random": checkpoint.load_random,
        "package": checkpoint.load_package,
        "checkpoint": checkpoint.load_checkpoint,
    }
    module = loaders[spec.source](spec, dtype)
    return spec, module.to(device).eval().requires_grad_(False)


def footprint_bytes(
    spec: ModelSpec, precision: str, batch: int, context: int = 1024, *, copies: int = 2
) -> int:
    """Bytes that a cell of this model takes: the model and its baseline, side by side.

    Weights ``copies`` times, for a decoder twice the keys and values of ``context`` tokens per row
    and fp32 logits of a prompt of that length, else activations per input as a multiple of its
    widest layer.
    """
    from . import costs

    size = 4 if precision == "fp32" else 2
    per_row = costs.activation_bytes(spec, context, size)
    return copies * costs.parameters(spec) * size + 2 * batch * per_row


def cut_to_fit(spec: ModelSpec, precision: str, batch: int, have: int) -> ModelSpec:
    """A decoder of random weights with fewer layers of the same shapes, so that a cell fits.

    ``have`` bytes hold the model twice.  Its layers are alike, so what a technique does to a step
    shows in a few of them; their number is a multiple of ``LAYER_STEP``, lest it follow every
    change of the free memory.  Unchanged where all layers fit, or not even so few.
    """
    if spec.kind != "decoder" or not spec.random_weights or spec.layers:
        return spec
    whole = spec.config["num_hidden_layers"]
    for layers in (whole, *range((whole - 1) // LAYER_STEP * LAYER_STEP, 0, -LAYER_STEP)):
        cut = dataclasses.replace(spec, layers=None if layers == whole else layers)
        if footprint_bytes(cut, precision, batch) <= have:
            return cut
    return spec
