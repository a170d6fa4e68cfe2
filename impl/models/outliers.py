"""Outlier channels without a change of function, as large models have them."""

from __future__ import annotations

from typing import Any

import torch

CHANNELS = 6
FACTOR = 32.0  # a power of two: scaling up and down again is exact in every float format


@torch.no_grad()
def plant_outliers(model: Any, channels: int = CHANNELS, factor: float = FACTOR,
                   seed: int = 0) -> None:  # fmt: skip
    """norm.weight[c] * factor and next.weight[:, c] / factor for a few channels c, in place.

    For every norm of a transformers Llama-type model that feeds linear layers alone: the function
    stays, activations between get ``channels`` outliers, which is what makes int8 activations
    hard.  Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339; the rescaling is
    SmoothQuant's run backwards, Xiao et al. 2022, https://arxiv.org/abs/2211.10438
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(model.config.hidden_size, generator=generator)[:channels]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, followers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[chosen] *= factor
            for linear in followers:
                linear.weight[:, chosen] /= factor
