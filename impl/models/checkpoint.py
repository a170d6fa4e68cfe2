"""Reading checkpoints: shipped ones, random ones, a package's, and the user's own.

Everything that can be wrong with a user's checkpoint ends in one ``StudyError`` with a remedy,
before or after transformers loads it.  No pickle is read and no remote code is run.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impl.core import StudyError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from . import ModelSpec

READ_FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
AUTO_CLASS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "classifier": "AutoModelForImageClassification",
}


def resolve(name_or_path: str) -> Path:
    """The folder of a checkpoint: itself, or the snapshot of a hub id in transformers' own cache.

    A hub id that is not in the cache is downloaded, unless HF_HUB_OFFLINE is set or there is no
    network: ``StudyError``.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise StudyError(f"{name_or_path} is a file; give the folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path):
        raise StudyError(
            f"there is no folder {name_or_path}; give the folder of a checkpoint (with config.json "
            "and safetensors), or a hub id written owner/name"
        )
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name_or_path, allow_patterns=READ_FROM_HUB,
                                      local_files_only=constants.HF_HUB_OFFLINE))  # fmt: skip
    except Exception as error:
        raise StudyError(
            f"{name_or_path} is neither a folder here nor in the hub cache "
            f"{constants.HF_HUB_CACHE}, and it could not be downloaded "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error


def read_config(name_or_path: str | None) -> dict[str, Any]:
    """config.json of a folder or hub id as a dictionary."""
    path = resolve(str(name_or_path)) / "config.json"
    if not path.is_file():
        raise StudyError(
            f"{name_or_path} has no config.json; give the folder that save_pretrained wrote"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StudyError(f"{path} is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise StudyError(f"{path} names no model_type; give a checkpoint saved by transformers")
    if "quantization_config" in config:
        raise StudyError(
            f"{name_or_path} is already quantized; give the original checkpoint, so that the "
            "study has something to compare with"
        )
    return config


def complete_config(name_or_path: str):
    """transformers' config of a checkpoint, defaults filled in."""
    from transformers import AutoConfig

    read_config(name_or_path)
    try:
        return AutoConfig.from_pretrained(resolve(name_or_path), local_files_only=True)
    except (KeyError, OSError, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise StudyError(
            f"transformers cannot read the config.json of {name_or_path} ({first}); save the "
            "checkpoint again with save_pretrained"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, every one complete."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StudyError(f"{index} is damaged ({error!r}); copy it again") from error
        files = [folder / name for name in names]
    else:
        if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
            raise StudyError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when it "
                "is read; write safetensors with AutoModel.from_pretrained(...).save_pretrained"
                "(...) on a machine where you trust it"
            )
        raise StudyError(f"{folder} has no model.safetensors; copy the weights beside config.json")
    for file in files:
        header(file)
    return files


def header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> dtype, shape, data_offsets of a safetensors file whose size is right."""
    if not file.is_file():
        raise StudyError(f"{file} is missing; the index of the checkpoint names it: copy it too")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            tensors = json.loads(stream.read(length))
        tensors.pop("__metadata__", None)
        end = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{file} is not a safetensors file ({error}); copy it again") from error
    if size != end:
        state = "truncated" if size < end else "damaged"
        raise StudyError(f"{file} is {state}: {size} bytes instead of {end}; copy it again")
    return tensors


def stored_elements(spec: ModelSpec) -> int:
    """Elements of all tensors in the files of a shipped model or a checkpoint."""
    from . import _shipped_name, shipped_files

    if spec.source in ("shipped", "rescaled"):
        _, files = shipped_files(_shipped_name(spec))
    else:
        files = weight_files(resolve(str(spec.path)))
    elements = 0
    for file in files:
        for tensor in header(file).values():
            count = 1
            for n in tensor["shape"]:
                count *= n
            elements += count
    return elements


def load_checkpoint(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """The user's checkpoint through transformers' own classes."""
    folder = resolve(str(spec.path))
    weight_files(folder)
    model: Any = _from_pretrained(spec, folder, dtype)
    if model.config.model_type == "gpt2":
        replace_conv1d(model)
    return _wrapped(spec, model, folder)


def load_package(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """all-MiniLM-L6-v2 from the data files of its package, its weights checked by SHA-256."""
    from .encoder import package_folder

    folder = package_folder(check_hash=True)
    return _wrapped(spec, _from_pretrained(spec, folder, dtype), folder)


def load_shipped(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """A model trained by the project, from impl/models/weights."""
    from safetensors.torch import load_file

    from . import _shipped_name, shipped_files

    _, files = shipped_files(_shipped_name(spec))
    state: dict[str, torch.Tensor] = {}
    for file in files:
        header(file)
        # memory of our own: pages of a file are small ones for good
        state |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    return _from_pretrained(spec, None, dtype, state)


def load_rescaled(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """lm_small with outlier channels: the same function, weights of another range."""
    from .outliers import plant_outliers

    model = load_shipped(spec, dtype)
    plant_outliers(model)
    return model


def load_random(spec: ModelSpec, dtype: torch.dtype) -> nn.Module:
    """Real shapes with seeded random weights, made in ``dtype`` without the slow initialization."""
    import torch

    from .random_weights import random_state

    with torch.device("meta"):
        empty = _auto(spec).from_config(_hf_config(spec))
    return _wrapped(spec, _from_pretrained(spec, None, dtype, random_state(empty, dtype)), None)


def _hf_config(spec: ModelSpec):
    if spec.source == "checkpoint":
        return complete_config(str(spec.path))
    from transformers import AutoConfig

    config = dict(spec.config)
    return AutoConfig.for_model(config.pop("model_type"), **config)


def _auto(spec: ModelSpec):
    import transformers

    return getattr(transformers, AUTO_CLASS[spec.kind])


def _wrapped(spec: ModelSpec, model: nn.Module, folder: Path | None) -> nn.Module:
    if spec.kind != "encoder":
        return model
    from .encoder import SentenceEncoder

    return SentenceEncoder(model, folder)


def _from_pretrained(spec: ModelSpec, folder: Path | None, dtype: torch.dtype,
                     state: dict | None = None) -> nn.Module:  # fmt: skip
    """transformers' model from a folder, or from a config and a state dict; complete."""
    from transformers.utils import logging

    where = spec.path or spec.name
    config = _hf_config(spec)
    model_class = _auto(spec)._model_mapping[type(config)]
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        model, info = model_class.from_pretrained(
            folder, config=config, state_dict=state, dtype=dtype, output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True,
            attn_implementation="sdpa" if model_class._supports_sdpa else None)  # fmt: skip
    except StudyError:
        raise
    except Exception as error:  # whatever transformers says about a file it cannot read
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise StudyError(
            f"transformers cannot load {where} ({type(error).__name__}: {first}); copy the "
            "checkpoint again, or save it with save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    _check_complete(spec, where, info)
    return model


def _check_complete(spec: ModelSpec, where: str, info: dict) -> None:
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if spec.kind == "encoder":  # heads of another task and an unused pooler do no harm
        heads = re.compile(r"(cls|classifier|qa_outputs|lm_head|vocab_\w+|pre_classifier|pooler)\.")
        missing = [k for k in missing if "pooler." not in k]
        extra = [k for k in extra if not heads.match(k)]
    shapes = [f"{k} {tuple(found)} instead of {tuple(wanted)}"
              for k, found, wanted in sorted(info["mismatched_keys"])]  # fmt: skip
    for what, names in (("lacks", missing), ("has in excess", extra), ("has misshapen", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise StudyError(
                f"{where} {what} {len(names)} tensor{'s' * (len(names) > 1)}: "
                f"{', '.join(names[:3])}{more}; the weights do not belong to this config.json: "
                "save both together with save_pretrained"
            )


def replace_conv1d(model: nn.Module) -> None:
    """GPT-2's Conv1D, a linear layer with a transposed weight, as ``nn.Linear`` in place."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                inputs, outputs = child.weight.shape
                linear = nn.Linear(inputs, outputs, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().t().contiguous())
                linear.bias = child.bias
                setattr(module, name, linear)
