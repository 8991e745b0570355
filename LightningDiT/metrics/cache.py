"""Views of an image set and figures drawn from them, kept on the disk part by part: a rerun goes on, or is done."""

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
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path
from LightningDiT.metrics.extractors import Extractor, Views
from LightningDiT.metrics.sources import ImageSource

PART = 1000  # images in a file
THUMBNAIL = 32  # pixels a side in which distances between images are measured


def digest(*parts: object) -> str:
    """Return a short text that belongs to these parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:12]


def thumbnails(pixels: Tensor) -> Tensor:
    """Return (N, 3, H, W) uint8 with sides of at most 32 pixels, each the mean of those it stands for."""
    side = [min(length, THUMBNAIL) for length in pixels.shape[2:]]
    if side == list(pixels.shape[2:]):
        return pixels.contiguous()
    return F.adaptive_avg_pool2d(pixels.float(), side).round().to(torch.uint8)


def views_of(source: ImageSource, extractor: Extractor, folder: Path, title: str, batch_size: int) -> Views:
    """Return what `extractor` sees in all images of `source`, and their `pixels` as thumbnails.

    Every thousand images make a file in `folder`, which is written whole or not at all. What is there is not
    computed again, as long as the images (names, sizes and times of the files) and the network are the same.

    Args:
        title: what the set is called in messages and in the name of its folder.
    """
    place = folder / f"{title}-{digest(source.key, extractor.key, THUMBNAIL)}"
    starts = range(0, source.count, PART)
    parts = [_part_in(place / f"{start:08d}.safetensors") for start in starts]
    missing = [index for index, part in enumerate(parts) if part is None]
    if missing:
        left = sum(min(PART, source.count - starts[index]) for index in missing)
        print(f"Looking at {left} of {source.count} {title} images by {extractor.name}", flush=True)
        progress = Progress(left, "image")
        try:
            for index in missing:
                stop = min(starts[index] + PART, source.count)
                part = _seen(source, extractor, range(starts[index], stop), batch_size, progress)
                save_weights(part, place / f"{starts[index]:08d}.safetensors")
                parts[index] = part
        finally:
            progress.close()
    whole = [part for part in parts if part is not None]
    return {name: torch.cat([part[name] for part in whole]) for name in whole[0]}


def kept_values(file: Path, count: int, value_of: Callable[[int], float], progress: Progress) -> list[float]:
    """Return value_of(0), ..., value_of(count - 1), those in `file` as they are there; each new one is written."""
    values: list[float] = kept(file, list, list)
    progress.update(min(len(values), count))
    for index in range(len(values), count):
        values.append(value_of(index))
        _write(file, values)
        progress.update()
    return values[:count]


def kept(file: Path, compute: Callable[[], Any], kind: type[list] | type[dict]) -> Any:
    """Return the list or dictionary of numbers in the JSON file, or what `compute` gives, which is then written."""
    with contextlib.suppress(OSError, ValueError):  # not there yet, or cut short by a full disk
        value = json.loads(file.read_text(encoding="utf-8"))
        numbers = value.values() if isinstance(value, dict) else value
        if isinstance(value, kind) and all(isinstance(number, int | float) for number in numbers):
            return value
    value = compute()
    _write(file, value)
    return value


def _write(file: Path, value: Any) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def _part_in(file: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a part; None where it is not there, or is no whole file."""
    if not file.exists():
        return None
    try:
        return load_weights(file)
    except LightningDiTError:
        return None


def _seen(
    source: ImageSource, extractor: Extractor, numbers: range, batch_size: int, progress: Progress
) -> dict[str, Tensor]:
    """Return the views of the images `numbers`, batch by batch."""
    batches = []
    for start in range(numbers.start, numbers.stop, batch_size):
        pixels = source.read(start, min(start + batch_size, numbers.stop))
        seen = extractor(pixels)
        if not all(bool(view.isfinite().all()) for view in seen.values()):
            raise LightningDiTError(
                f"what {extractor.name} sees in image {start} of {source.name} or the {len(pixels) - 1} after it is not"
                " finite",
                "give other weights of that network, or other --features",
            )
        batches.append({**seen, "pixels": thumbnails(pixels)})
        progress.update(len(pixels))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
