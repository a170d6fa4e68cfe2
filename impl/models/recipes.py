"""How each shipped model is made: shape, data, optimizer and schedule, as data.

Optimizer: Muon for matrices (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon; update
size as in Liu et al., 2025, https://arxiv.org/abs/2502.16982), AdamW for embeddings and norms.
Schedule: warm-up, constant, linear decay to zero (Hu et al., 2024, https://arxiv.org/abs/2404.06395).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """`phases` lists (share of the run, sequence length); `steps` is the length of the run."""

    architecture: str  # a class of transformers
    config: dict[str, Any]  # its arguments
    steps: int
    tokens_per_step: int = 0  # images per step for a classifier
    phases: tuple[tuple[float, int], ...] = ((1.0, 512),)
    matrix_lr: float = 3e-3
    other_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    decay: float = 0.4  # share of the run in which the learning rate falls to zero
    seed: int = 0
    teacher: str | None = None  # distil this model's next-token distribution
    teacher_from: float = 0.0  # share of the run before which the text itself is the target
    compute: str = "bfloat16"
    compiled: bool = True


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> dict[str, Any]:
    return {
        "vocab_size": 3840,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


RECIPES = {
    "lm_small": Recipe(
        architecture="LlamaForCausalLM",
        config=_llama(hidden=384, layers=6, heads=6, kv_heads=2, ffn=1024),
        steps=1950,
        tokens_per_step=4096,
        phases=((0.65, 256), (0.15, 512), (0.2, 2048)),
        matrix_lr=2.5e-3,
        other_lr=2.5e-3,
        decay=0.35,
    ),
    "lm_draft": Recipe(
        architecture="LlamaForCausalLM",
        config=_llama(hidden=128, layers=2, heads=2, kv_heads=1, ffn=512),
        steps=5500,
        tokens_per_step=2048,
        phases=((0.45, 256), (0.2, 512), (0.35, 2048)),
        matrix_lr=5e-3,
        other_lr=5e-3,
        weight_decay=0.0,
        decay=0.5,
        teacher="lm_small",
        teacher_from=0.2,
    ),
    "digits_resnet": Recipe(
        architecture="ResNetForImageClassification",
        config={
            "num_channels": 1,
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128, 256],
            "depths": [2, 2, 2, 2],
            "layer_type": "basic",
            "num_labels": 10,
        },
        steps=600,
        tokens_per_step=64,
        other_lr=2e-3,
        compute="float32",
        compiled=False,
    ),
}
