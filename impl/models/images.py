"""A user's own images: a folder per class, in the form the classifier takes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impl.core import StudyError, nearest

if TYPE_CHECKING:
    from . import ModelSpec

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@functools.cache
def labelled_images(spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """(images (N, C, H, W) fp32, labels (N,) int64) of ``--data DIR``: ``DIR/<class>/*.png``.

    A class is called as in the checkpoint's ``id2label``, or by its number.  Images are prepared by
    the checkpoint's own image processor.  Raises ``StudyError`` as ``labelled_files`` does, and for
    an unreadable image or a checkpoint without a processor.
    """
    files, prepare = labelled_files(spec), _processor(spec)
    channels = spec.config.get("num_channels", 3)
    images = torch.cat([_image(file, prepare, channels) for file, _ in files])
    return images, torch.tensor([label for _, label in files])


def labelled_files(spec: ModelSpec) -> list[tuple[Path, int]]:
    """(file, class) of every image below ``--data DIR``; opens none of them.

    Raises ``StudyError`` for a folder that is missing or holds no images, and an unknown class.
    """
    folder = Path(spec.data or "")
    if not spec.data or not folder.is_dir():
        raise StudyError(f"there is no folder {spec.data}; give --data DIR with a folder per class")
    classes, found = _classes(spec), []
    for sub in sorted(p for p in folder.iterdir() if p.is_dir()):
        if sub.name not in classes:
            raise nearest(f"class of {spec.path}", sub.name, classes)
        files = sorted(p for p in sub.iterdir() if p.suffix.lower() in SUFFIXES)
        found += [(file, classes[sub.name]) for file in files]
    if not found:
        raise StudyError(
            f"{folder} holds no images; put them in one folder per class: {folder}/<class>/*.png"
        )
    return found


def _classes(spec: ModelSpec) -> dict[str, int]:
    """Name or number of a class -> its number."""
    names = spec.config.get("id2label") or {}
    known = {str(number): int(number) for number in names}
    return known | {str(name): int(number) for number, name in names.items()}


def _processor(spec: ModelSpec):
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(spec.path)
    except (OSError, ValueError, KeyError) as error:
        raise StudyError(
            f"{spec.path} has no usable image processor ({str(error).splitlines()[0]}); save one "
            "beside the weights with processor.save_pretrained"
        ) from error


def _image(file: Path, prepare, channels: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = image.convert("RGB" if channels == 3 else "L")
            return prepare(pixels, return_tensors="pt")["pixel_values"].float()
    except (OSError, ValueError) as error:
        raise StudyError(f"{file} is not an image that can be read ({error}); remove it") from error
