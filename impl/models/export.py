"""Write a trained model as it ships: bf16 safetensors, and a record with its measured figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from impl.models import data
from impl.models.figures import measure

if TYPE_CHECKING:
    from impl.models.train import Run

MAX_FILE = 14 << 20  # bytes of one shard
UNWANTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def shards(tensors: dict[str, Tensor], limit: int = MAX_FILE) -> list[dict[str, Tensor]]:
    """Tensors in order, split where a file would grow past `limit` bytes."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > limit and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def write_weights(run: Run, folder: Path) -> None:
    """Write the weights as transformers names them, in bf16; buffers keep their dtype."""
    from safetensors.torch import save_file

    tensors = {name: w.to(torch.bfloat16).cpu().contiguous() for name, w in run.masters.items()}
    kept = run.model.state_dict().keys()
    tensors |= {n: b.cpu().clone() for n, b in run.model.named_buffers() if n in kept}
    groups = shards(tensors)
    count = len(groups)
    names = [f"{run.name}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if len(groups) == 1:
        names = [f"{run.name}.safetensors"]
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob(f"{run.name}.safetensors*"), *folder.glob(f"{run.name}-0*")]:
        old.unlink()
    for name, group in zip(names, groups, strict=True):
        save_file(group, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {t: n for n, g in zip(names, groups, strict=True) for t in g},
        }
        path = folder / f"{run.name}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=1) + "\n")


def shipped_model(run: Run) -> nn.Module:
    """The model as it will be loaded: weights rounded to bf16, compute in fp32."""
    from impl.models.train import new_model

    model = new_model(run.recipe)
    state = {name: w.to(torch.bfloat16).float().cpu() for name, w in run.masters.items()}
    state |= {n: b.cpu() for n, b in run.model.named_buffers() if n in model.state_dict()}
    model.load_state_dict(state, strict=False)
    return model.eval()


def record(run: Run, figures: dict[str, float]) -> dict[str, Any]:
    """What stands beside the weights: shape, recipe, data, versions, cost and figures."""
    import transformers

    splits = data.stdlib_text()
    recipe = dataclasses.asdict(run.recipe)
    config = run.model.config.to_dict() | {"architectures": [recipe.pop("architecture")]}
    config = {k: v for k, v in config.items() if k not in UNWANTED}
    recipe.pop("config")
    text = not run.name.startswith("digits")
    hashes = {"train_sha256": splits.train.sha256, "held_out_sha256": splits.held_out.sha256}
    return {
        "name": run.name,
        "config": config,
        "recipe": recipe,
        "data": hashes if text else {"source": "sklearn.datasets.load_digits"},
        "trained": {
            "steps": run.step,
            "tokens" if text else "images": run.step * run.recipe.tokens_per_step,
            "minutes": round(run.seconds / 60, 1),
            "schedule_minutes": run.minutes,
            "final_loss": sum(run.losses[-50:]) / len(run.losses[-50:]),
            "parameters": sum(w.numel() for w in run.masters.values()),
            "device": run.device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        },
        "figures": figures,
    }


def export(run: Run, folder: Path) -> dict[str, float]:
    """Write weights and record of a run into `folder`; the figures are those of what is written."""
    figures = measure(run.name, shipped_model(run))
    write_weights(run, folder)
    (folder / f"{run.name}.json").write_text(json.dumps(record(run, figures), indent=1) + "\n")
    return figures
