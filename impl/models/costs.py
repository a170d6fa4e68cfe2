"""What a model costs, by counting: parameters, bytes, FLOPs, bytes of keys and values.

Takes transformers' config as a dictionary, so it needs neither torch nor weights.  A FLOP is a
multiplication or an addition; element-wise work (norms, softmax, activations) is left out, as in
``torch.utils.flop_counter``, with which the tests compare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from . import ModelSpec

# Counted once from transformers' modules (tests/test_models.py counts again).
BERT_BASE_PARAMETERS = 109_482_240
RESNET50_PARAMETERS = 25_557_032
MINILM_PARAMETERS = 22_713_216


def parameter_count(model: nn.Module) -> int:
    """Number of elements of all parameters; a tied one counts once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes that parameters and persistent buffers take, each storage once.

    This is what a decode step at batch 1 must read (but for the embedding rows not looked up);
    packed and quantized tensors count at their packed size.
    """
    tensors = [*model.parameters(), *_persistent_buffers(model)]
    parts: dict[tuple[int, int], int] = {}  # (start, bytes) of distinct pieces of memory
    for tensor in tensors:
        inner = [getattr(tensor, name) for name in _inner_names(tensor)] or [tensor]
        for t in inner:
            parts[t.data_ptr(), t.nbytes] = t.nbytes
    return sum(parts.values())


def _inner_names(tensor) -> list[str]:
    """Names of the tensors inside a tensor subclass (torchao's quantized weights)."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return flatten()[0] if flatten else []


def _persistent_buffers(model: nn.Module):
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _decoder(config: dict[str, Any]) -> dict[str, int]:
    if config["model_type"] == "gpt2":
        heads, width = config.get("n_head", 12), config.get("n_embd", 768)
        return {"V": config.get("vocab_size", 50257), "C": width, "L": config.get("n_layer", 12),
                "F": config.get("n_inner") or 4 * width, "H": heads, "D": width // heads,
                "Hkv": heads, "E": 0, "k": 0}  # fmt: skip
    heads = config["num_attention_heads"]
    return {
        "V": config["vocab_size"], "C": config["hidden_size"], "L": config["num_hidden_layers"],
        "F": config["intermediate_size"], "H": heads,
        "D": config.get("head_dim") or config["hidden_size"] // heads,
        "Hkv": config.get("num_key_value_heads") or heads,
        "E": config.get("num_local_experts") or 0, "k": config.get("num_experts_per_tok") or 0,
    }  # fmt: skip


def _attention_weights(d: dict[str, int]) -> int:
    return d["C"] * d["D"] * (2 * d["H"] + 2 * d["Hkv"])  # q and o, k and v


def decoder_parameters(config: dict[str, Any]) -> int:
    """Parameters of a Llama-, Mistral-, Qwen- or Mixtral-type decoder."""
    d, kind = _decoder(config), config["model_type"]
    bias = config.get("attention_bias", False)
    layer = _attention_weights(d) + 2 * d["C"]  # two norms
    if bias or kind == "qwen2":
        layer += d["D"] * (d["H"] + 2 * d["Hkv"])
    layer += d["C"] if bias else 0
    layer += 2 * d["D"] if kind == "qwen3" else 0
    mlp = 3 * d["C"] * d["F"] + (2 * d["F"] + d["C"] if config.get("mlp_bias") else 0)
    layer += d["E"] * (mlp + d["C"]) if d["E"] else mlp
    tables = 1 if config.get("tie_word_embeddings") else 2
    return tables * d["V"] * d["C"] + d["L"] * layer + d["C"]


def flops_per_token(config: dict[str, Any], context: int, head: bool = True) -> int:
    """FLOPs of a decoder for one token that attends to ``context`` keys (its own included).

    2 per weight of every matrix it passes through (of the experts, the chosen ones), and
    4 * heads * head_dim * context per layer for scores and weighted values.  ``head`` False: a
    prompt's token whose logits nobody asks for.
    """
    d = _decoder(config)
    mlp = (2 if config["model_type"] == "gpt2" else 3) * d["C"] * d["F"]
    mlp = d["k"] * mlp + d["C"] * d["E"] if d["E"] else mlp
    layer = 2 * (_attention_weights(d) + mlp) + 4 * d["H"] * d["D"] * context
    return d["L"] * layer + (2 * d["C"] * d["V"] if head else 0)


def kv_bytes_per_token(config: dict[str, Any], bytes_per_element: int) -> int:
    """Bytes of keys and values that one token leaves in the cache: 2 * layers * kv heads * D."""
    d = _decoder(config)
    return 2 * d["L"] * d["Hkv"] * d["D"] * bytes_per_element


def parameters(spec: ModelSpec) -> int:
    """Parameters of a model, without loading it: counted from its shape or its files."""
    if spec.source == "package":
        return MINILM_PARAMETERS
    if spec.name in (known := {"bert_base": BERT_BASE_PARAMETERS, "resnet50": RESNET50_PARAMETERS}):
        return known[spec.name]
    from . import LEAN_DECODERS

    config = spec.config
    if config["model_type"] in LEAN_DECODERS:
        return decoder_parameters(config)
    from .checkpoint import stored_elements

    return stored_elements(spec)


def activation_bytes(spec: ModelSpec, context: int, bytes_per_element: int) -> int:
    """Bytes per row beside the weights: cache and fp32 logits, or the widest activations."""
    config = spec.config
    if spec.kind == "decoder":
        d = _decoder(config)
        cache = context * kv_bytes_per_token(config, bytes_per_element)
        return cache + context * (d["V"] + 8 * d["C"]) * 4
    if spec.kind == "classifier":
        pixels = (config.get("image_size") or 224) ** 2
        return 64 * pixels * bytes_per_element
    return 16 * context * (config.get("hidden_size") or config.get("dim") or 768) * 4
