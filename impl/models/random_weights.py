"""Seeded random weights at any shape, as fast as memory is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BLOCK = 4_194_301  # a prime: rows of a tiled matrix never line up with one another


def random_state(model: nn.Module, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """A state dict for a model on the meta device: matrices normal with variance 1 / inputs.

    Vectors are what leaves the function alone: scales and running variances 1, biases and running
    means 0.  Tied parameters appear once.  Matrices repeat one block of 4 M draws, each at another
    offset: drawing 8 billion numbers takes minutes, and neither time nor memory depends on them
    (all-zero weights would: they run faster).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(BLOCK, generator=generator).repeat(2)
    scaled: dict[float, Tensor] = {}  # standard deviation -> the block twice in a row
    state = {}
    persistent = model.state_dict().keys()
    for name, like in (*model.named_parameters(), *model.named_buffers()):
        if name not in persistent:
            continue
        if like.dim() < 2:
            zero = name.endswith((".bias", "running_mean", "num_batches_tracked"))
            kind = dtype if like.is_floating_point() else like.dtype
            state[name] = (torch.zeros if zero else torch.ones)(like.shape, dtype=kind)
            continue
        std = math.sqrt(like.shape[0] / like.numel())
        if std not in scaled:
            scaled[std] = (normal * std).to(dtype)
        start = int(torch.randint(BLOCK, (1,), generator=generator))
        block = scaled[std][start : start + BLOCK]
        flat = torch.empty(like.numel(), dtype=dtype)
        repeats, rest = divmod(flat.numel(), BLOCK)
        flat[: repeats * BLOCK].view(repeats, BLOCK).copy_(block.expand(repeats, -1))
        flat[repeats * BLOCK :] = block[:rest]
        state[name] = flat.view(like.shape)
    return state
