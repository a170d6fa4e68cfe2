"""The figures that stand beside shipped weights, and how each is measured."""

from __future__ import annotations

import functools
import lzma
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from impl.models import data

LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]  # as xz -9e
SAMPLE = 8192  # held-out tokens that a test can measure again in seconds
DICTIONARY = 64 << 20  # bytes, that of xz -9e: all training text stays in reach


@torch.inference_mode()
def windows(model: nn.Module, ids: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (T, V) fp32, next tokens (T,)) over `ids` (N,) in windows of `length` tokens.

    Windows touch but do not overlap, so every token but the first of `ids` is predicted once.
    """
    device = next(model.parameters()).device
    for start in range(0, len(ids) - 1, length):
        rows = ids[start : start + length + 1].to(device)
        logits = model(input_ids=rows[None, :-1], use_cache=False).logits[0]
        yield logits.float(), rows[1:]


def nats_per_token(model: nn.Module, ids: Tensor, length: int = 2048) -> float:
    """Mean cross-entropy of the model on `ids` in nats; its exponential is the perplexity."""
    total = sum(
        nn.functional.cross_entropy(logits, following, reduction="sum").item()
        for logits, following in windows(model, ids, length)
    )
    return total / (len(ids) - 1)


def bits_per_byte(nats: float) -> float:
    """Bits per byte of all held-out modules, their end-of-text tokens included, from nats/token."""
    bits = nats * (len(data.held_out_ids()) - 1) / math.log(2)
    return bits / data.stdlib_text().held_out.num_bytes


@functools.cache
def primed_xz_bits_per_byte() -> float:
    """Bits per held-out byte of `xz -9e` that has seen the training files.

    [size(train + held_out) - size(train)] * 8 / bytes: a compressor with the same knowledge.
    """
    splits = data.stdlib_text()
    train = "".join(splits.train.modules.values()).encode()
    held_out = "".join(splits.held_out.modules.values()).encode()
    if len(train) + len(held_out) > DICTIONARY:
        raise ValueError("the text is larger than the dictionary of xz -9e")
    small, large = (
        len(lzma.compress(text, lzma.FORMAT_XZ, filters=LZMA_FILTERS))
        for text in (train, train + held_out)
    )
    return 8 * (large - small) / len(held_out)


def agreement(
    model: nn.Module, other: nn.Module, n_tokens: int | None = None, length: int = 2048
) -> float:
    """Share of held-out positions where both models' greedy tokens are the same."""
    ids = data.held_out_ids(n_tokens)
    pairs = zip(windows(model, ids, length), windows(other, ids, length), strict=True)
    same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for (a, _), (b, _) in pairs)
    return same / (len(ids) - 1)


def flops_per_token(config: dict[str, Any], context: int = 0) -> int:
    """FLOPs of one decode step: 2 per weight of each product, 4 * context * width per attention."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config["intermediate_size"]
    products = layers * layer + hidden * config["vocab_size"]
    return 2 * products + 4 * context * queries * layers


@torch.inference_mode()
def accuracy(model: nn.Module) -> tuple[float, float]:
    """Share of the held-out digits classified rightly, and its standard error."""
    digits = data.digits()
    device = next(model.parameters()).device
    logits = model(digits.test_images.to(device)).logits
    p = (logits.argmax(-1).cpu() == digits.test_labels).double().mean().item()
    return p, math.sqrt(p * (1 - p) / len(digits.test_labels))


@torch.inference_mode()
def generated_repetition(model: nn.Module, length: int = 128) -> float:
    """Share of repeated 8-grams in `length` greedy tokens after each of the 32 prompts."""
    prompts = data.prompts(length=128).to(next(model.parameters()).device)
    ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
    )
    return data.repeated_ngrams(ids[:, prompts.shape[1] :].cpu())


@torch.inference_mode()
def completion_accuracy(model: nn.Module) -> float:
    """Share of the completion task's names that greedy decoding writes in full."""
    task = data.completion_task()
    device = next(model.parameters()).device
    rows = [model(input_ids=ids.to(device), use_cache=False).logits for ids in task.ids.split(32)]
    return task.accuracy(torch.cat(rows).cpu())


def measure(name: str, model: nn.Module) -> dict[str, float]:
    """All figures of a shipped model, from its weights in fp32."""
    if name == "digits_resnet":
        share, error = accuracy(model)
        return {"accuracy": share, "accuracy_standard_error": error}
    nats = nats_per_token(model, data.held_out_ids())
    figures = {
        "held_out_bits_per_byte": bits_per_byte(nats),
        "held_out_perplexity": math.exp(nats),
        "sample_nats_per_token": nats_per_token(model, data.held_out_ids(SAMPLE)),
        "completion_accuracy": completion_accuracy(model),
        "flops_per_token": flops_per_token(model.config.to_dict()),
    }
    if name == "lm_draft":
        from impl.models import load

        spec, target = load("lm_small", torch.float32)
        figures["agreement_with_lm_small"] = agreement(model, target)
        figures["sample_agreement"] = agreement(model, target, SAMPLE)
        figures["flops_share_of_lm_small"] = figures["flops_per_token"] / flops_per_token(
            spec.config
        )
    else:
        figures["primed_xz_bits_per_byte"] = primed_xz_bits_per_byte()
        figures["repeated_8grams_prompts"] = data.repeated_ngrams(data.prompts(length=128))
        figures["repeated_8grams_generated"] = generated_repetition(model)
    return figures
