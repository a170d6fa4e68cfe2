"""Inputs of one call: prompts, sentences, images, in the form the model takes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impl.core import StudyError

from . import data
from .images import labelled_files, labelled_images

if TYPE_CHECKING:
    from . import ModelSpec

SENTENCE_TOKENS = 128


@functools.cache
def _tokenizer(path: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"{path} has no usable tokenizer ({str(error).splitlines()[0]}); save one beside the "
            "weights with tokenizer.save_pretrained"
        ) from error


class TextTokenizer:
    """``encode(text) -> list[int]`` and ``decode(ids) -> text``, whichever library does it."""

    def __init__(self, spec: ModelSpec):
        if spec.source == "checkpoint":
            made = _tokenizer(spec.path)
            self.encode, self.decode = made.encode, made.decode
        else:
            made = data.tokenizer()
            self.encode, self.decode = lambda text: made.encode(text).ids, made.decode


def text_tokenizer(spec: ModelSpec) -> TextTokenizer:
    """The tokenizer that goes with a decoder."""
    return TextTokenizer(spec)


@functools.cache
def text_ids(spec: ModelSpec) -> Tensor:
    """Ids (n,) int64 of the text that a decoder is measured on.

    The user's ``--text`` file, else the held-out modules, through the checkpoint's own tokenizer;
    models of the zoo use the project's.
    """
    if spec.source != "checkpoint":
        return data.held_out_ids() % spec.config["vocab_size"]
    if spec.text:
        text = data.load_text(spec.text)
    else:
        text = "\n".join(data.stdlib_text().held_out.modules.values())
    ids = _tokenizer(spec.path)(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < 2:
        raise StudyError(f"{spec.text} holds {len(ids)} tokens; give a text of a few hundred words")
    return ids


def check_own_data(spec: ModelSpec) -> None:
    """Raise ``StudyError`` when the user's ``--text`` or ``--data`` cannot serve this model."""
    for option, given, kind in (
        ("--text", spec.text, "decoder"),
        ("--data", spec.data, "classifier"),
    ):
        if given and spec.kind != kind:
            raise StudyError(
                f"{option} is for a {kind}; {spec.path} is a {spec.kind}: leave it out"
            )
    if spec.text:
        data.load_text(spec.text)
    if spec.data:
        labelled_files(spec)


def prompts(spec: ModelSpec, batch: int, length: int, index: int) -> Tensor:
    """Prompts (batch, length) int64 of held-out text; ``index`` rotates through 32 of them."""
    if spec.source == "checkpoint":
        ids = text_ids(spec)
        known = ids.repeat(-(-32 * length // len(ids)))[: 32 * length].view(32, length)
    else:
        known = data.prompts(data.NUM_PROMPTS, length) % spec.config["vocab_size"]
    rows = [(index * batch + i) % len(known) for i in range(batch)]
    return known[rows]


def sentences(spec: ModelSpec, batch: int, index: int) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` (batch, 128) int64 of pydoc topics."""
    texts = list(data.topics().values())
    chosen = [texts[(index * batch + i) % len(texts)] for i in range(batch)]
    if spec.random_weights:
        random = torch.Generator().manual_seed(index)
        vocab = spec.config.get("vocab_size", 30522)
        ids = torch.randint(1, vocab, (batch, SENTENCE_TOKENS), generator=random)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = encode(spec, chosen)
    return {k: made[k] for k in ("input_ids", "attention_mask")}


def encode(spec: ModelSpec, texts: list[str]):
    """Token ids of texts, padded and cut to ``SENTENCE_TOKENS``, as the encoder takes them."""
    if spec.source == "package":
        from .encoder import package_folder

        path = str(package_folder())
    else:
        path = str(spec.path)
    return _tokenizer(path)(
        texts, padding="max_length", truncation=True, max_length=SENTENCE_TOKENS,
        return_tensors="pt")  # fmt: skip


def images(spec: ModelSpec, batch: int, index: int) -> Tensor:
    """Images (batch, channels, height, width): held-out digits, the user's own, or noise."""
    if spec.name == "digits_resnet" or spec.data:
        held_out = labelled_images(spec)[0] if spec.data else data.digits().test_images
        return held_out[[(index * batch + i) % len(held_out) for i in range(batch)]]
    config = spec.config
    size = config.get("image_size") or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    random = torch.Generator().manual_seed(index)
    return torch.randn(batch, config.get("num_channels", 3), height, width, generator=random)
