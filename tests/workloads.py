"""What one call of a cell does: its inputs, and the bytes and FLOPs it cannot avoid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from impl.core import Engine, Request
from impl.models import ModelSpec
from tests.matrix import Cell, Profile

NUM_INPUTS = 4  # random buffers a cell rotates through, so that no answer can be remembered


@dataclass(frozen=True)
class Size:
    """Tokens of a prompt and of an answer, and requests of a trace."""

    prompt_tokens: int
    new_tokens: int
    requests: int


def size_of(cell: Cell, spec: ModelSpec, profile: Profile) -> Size:
    """The profile's sizes; a model of a billion parameters takes one short generation."""
    if spec.random_weights:
        return Size(min(profile.prompt_tokens, 16), 2 if profile.requests < 128 else 4, 0)
    return Size(profile.prompt_tokens, profile.new_tokens, profile.requests)


def inputs_of(cell: Cell, spec: ModelSpec, size: Size, device: str) -> list:
    """``NUM_INPUTS`` inputs of one forward or generation of the cell, on the device."""
    from impl.models.inputs import images, prompts, sentences

    make = {
        "decoder": lambda i: prompts(spec, cell.batch, size.prompt_tokens, i),
        "encoder": lambda i: sentences(spec, cell.batch, i),
        "classifier": lambda i: images(spec, cell.batch, i),
    }[spec.kind]
    return [to(make(i), device, cell.precision) for i in range(NUM_INPUTS)]


def to(x, device: str, precision: str):
    """The input on the device, floating point in the precision of the cell."""
    if isinstance(x, Mapping):
        return {k: to(v, device, precision) for k, v in x.items()}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return x.to(device, dtype) if x.is_floating_point() else x.to(device)


def trace_of(cell: Cell, spec: ModelSpec, size: Size, seed: int = 0) -> list[Request]:
    """The seeded request trace that every scheduler answers, as long as the profile's prompts."""
    from impl.models.inputs import text_ids
    from impl.models.requests import request_trace

    text = text_ids(spec) if spec.source == "checkpoint" else None
    return request_trace(
        size.requests, seed=seed, mean_prompt=max(1, size.prompt_tokens // 2),
        mean_output=max(1, size.new_tokens // 4), text=text,
    )  # fmt: skip


# ---- what cannot be avoided --------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Least traffic (B) and arithmetic (FLOP) of one call, and the set of bytes it works on."""

    bytes_moved: float
    flops: float | None
    working_set: float


def dtype_of_compute(cell: Cell) -> str:
    """The precision whose matrix rate bounds the cell."""
    names = {t.name for t in cell.techniques}
    if any("int8_dynamic" in n or n.startswith("int4_dynamic") or n == "bnb_int8" for n in names):
        return "int8"
    if "fp8_dynamic" in names:  # widened to bf16 where the hardware has no fp8
        return "bf16"
    return "bf16" if "autocast_bf16" in names else cell.precision


def weights_read(engine: Engine) -> int:
    """Bytes of weights that one forward must read: all but an embedding that is only looked up."""
    from impl.models.costs import weight_bytes

    total, head = weight_bytes(engine.model), None
    embed = None
    for name, module in engine.model.named_modules():
        if name.endswith(("embed", "embed_tokens", "word_embeddings")):
            embed = getattr(module, "weight", None)
        if name.endswith("lm_head"):
            head = getattr(module, "weight", None)
    tied = embed is not None and head is not None and embed.data_ptr() == head.data_ptr()
    return total if tied or embed is None else total - embed.nbytes


def generation_work(engine: Engine, cell: Cell, size: Size, steps: float | None = None) -> Work:
    """One generation: ``steps`` passes over the weights, one a token unless speculation saves some.

    bytes = passes x weights + KV read per step; flops = 2 x matmul parameters x tokens, and the
    attention of each token over its context.  The prompt is one pass.
    """
    from impl.models.costs import flops_per_token, kv_bytes_per_token

    config = engine.spec.config
    if "lean" not in engine.spec.needs:  # no formula for its shape: the weights alone
        passes = 1 + (size.new_tokens - 1 if steps is None else steps)
        return Work(passes * weights_read(engine), None, weights_read(engine))
    n, prompt = size.new_tokens, size.prompt_tokens
    passes = 1 + (n - 1 if steps is None else steps)
    weights = weights_read(engine)
    item = 4 if cell.precision == "fp32" else 2
    kv = kv_bytes_per_token(config, item) * cell.batch
    contexts = range(prompt, prompt + n)
    head = 2 * config["hidden_size"] * config["vocab_size"]  # logits of the last prompt token only
    read = passes / n * sum(kv * c for c in contexts)
    flops = cell.batch * (
        sum(flops_per_token(config, c) for c in contexts)
        + sum(flops_per_token(config, c) - head for c in range(1, prompt))
    )
    return Work(passes * weights + read, flops, weights + kv * (prompt + n))


def prefill_work(engine: Engine, cell: Cell, size: Size) -> Work:
    """One forward over the prompts with logits at every position."""
    from impl.models.costs import flops_per_token

    config = engine.spec.config
    if "lean" not in engine.spec.needs:
        return forward_work(engine, None)
    flops = cell.batch * sum(flops_per_token(config, c) for c in range(1, size.prompt_tokens + 1))
    return forward_work(engine, flops)


def forward_work(engine: Engine, flops: float | None) -> Work:
    """One forward: every weight is read once; ``flops`` counted from shapes."""
    weights = weights_read(engine)
    return Work(weights, flops, weights)


def counted_flops(engine: Engine, inputs) -> float:
    """Matrix and convolution FLOPs of one forward of the unchanged model, from its shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        engine.forward(inputs)
    total = float(counter.get_total_flops())
    return total if math.isfinite(total) else 0.0
