"""Activations of image sets, and figures computed from them, cached on the disk part by part."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.console import Progress
from LightningDiT.data.image_sets import ImageSet
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json, write_text
from LightningDiT.metrics.extractors import Activations, Extractor

PART = 1000  # images in a file
THUMBNAIL = 32  # side in pixels of the images between which distances are measured


def digest(*parts: object) -> str:
    """Return a short text that changes with the parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:12]


def thumbnails(pixels: Tensor) -> Tensor:
    """Return pixels (N, 3, H, W) uint8 with sides of at most 32, by means over areas of equal size."""
    side = [min(length, THUMBNAIL) for length in pixels.shape[2:]]
    if side == list(pixels.shape[2:]):
        return pixels.contiguous()
    return F.adaptive_avg_pool2d(pixels.float(), side).round().to(torch.uint8)


def cached_activations(
    images: ImageSet, extractor: Extractor, folder: Path, title: str, batch_size: int
) -> Activations:
    """Return the activations of all images, and their thumbnails as `pixels`.

    Each thousand images make a file below `folder`. A file is reused as long as the images (names, sizes and times of
    the files) and the network stay the same.

    Args:
        title: name of the set, for messages and the folder.

    Raises:
        LightningDiTError: an activation is not finite.
    """
    folder /= f"{title}-{digest(images.state, extractor.key, THUMBNAIL)}"
    files = {start: folder / f"{start:08d}.safetensors" for start in range(0, images.count, PART)}
    parts = {start: _whole(file) for start, file in files.items()}
    missing = [range(start, min(start + PART, images.count)) for start, part in parts.items() if part is None]
    if missing:
        count = sum(map(len, missing))
        print(f"Computing {extractor.name} features of {count} of {images.count} {title} images", flush=True)
        with Progress(count, "image") as progress:
            for numbers in missing:
                part = _computed(images, extractor, numbers, batch_size, progress)
                save_weights(part, files[numbers.start])
                parts[numbers.start] = part
    return _joined([part for part in parts.values() if part is not None])


def cached_list(file: Path, count: int, compute: Callable[[int], float], progress: Progress) -> list[float]:
    """Return compute(0), ..., compute(count - 1), reusing the values in `file`; each new value is written at once."""
    values: list[float] = cached(file, list, list)
    progress.update(min(len(values), count))
    for index in range(len(values), count):
        values.append(compute(index))
        write_text(file, json.dumps(values))
        progress.update()
    return values[:count]


def cached(file: Path, compute: Callable[[], Any], kind: type[list] | type[dict]) -> Any:
    """Return the list or dictionary of numbers in a JSON file, or that of `compute`, which is then written."""
    with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged
        value = read_json(file)
        numbers = value.values() if isinstance(value, dict) else value
        if isinstance(value, kind) and all(isinstance(number, int | float) for number in numbers):
            return value
    value = compute()
    write_text(file, json.dumps(value))
    return value


def _whole(file: Path) -> Activations | None:
    """Return the activations in a file; None if it is missing or damaged."""
    with contextlib.suppress(LightningDiTError):
        return load_weights(file)
    return None


def _computed(
    images: ImageSet, extractor: Extractor, numbers: range, batch_size: int, progress: Progress
) -> dict[str, Tensor]:
    """Return the activations of the images `numbers`."""
    batches = []
    for start, batch in zip(numbers[::batch_size], images.batches(numbers, batch_size), strict=True):
        activations = extractor(batch.pixels)
        if not all(bool(values.isfinite().all()) for values in activations.values()):
            last = start + len(batch.pixels) - 1
            raise LightningDiTError(
                f"{extractor.name} features of images {start} to {last} of {images.source} are not finite",
                "give other weights of that network, or other --features",
            )
        batches.append({**activations, "pixels": thumbnails(batch.pixels)})
        progress.update(len(batch.pixels))
    return _joined(batches)


def _joined(parts: list[Activations]) -> dict[str, Tensor]:
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
