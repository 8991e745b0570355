"""Are generated images copies? Their nearest training images, in pixels and in features, beside those of real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.console import Progress
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import image_grid
from LightningDiT.metrics.extractors import Views
from LightningDiT.metrics.formulas import nearest_neighbours
from LightningDiT.metrics.sources import ImageSource

SPACES = ("pixels", "features")
SHOWN = 10  # images in a row of the picture
REFERENCE_QUANTILE = 0.01

Report = dict[str, Any]


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of every image of a set, in one space.

    Attributes:
        distances: (N,) float64, Euclidean.
        indices: (N,) of the training images.
    """

    distances: Tensor
    indices: Tensor


def search(images: Tensor, known: Tensor, title: str) -> Neighbours:
    """Return the nearest of `known` (M, ...) for each of `images` (N, ...), with progress under `title`."""
    print(f"Searching the training set for the nearest neighbours of {title} images", flush=True)
    progress = Progress(len(images), "image")
    try:
        return Neighbours(*nearest_neighbours(images, known, progress=progress.update))
    finally:
        progress.close()


def distance_summary(distances: Tensor) -> dict[str, float]:
    """Return median, first percentile and minimum of distances (N,)."""
    return {
        "median": float(distances.median()),
        "percentile_1": float(distances.quantile(REFERENCE_QUANTILE)),
        "minimum": float(distances.min()),
    }


def memorisation(
    samples: Views, training: Views, reference: Views | None, folder: Path
) -> tuple[Report, dict[str, Neighbours]]:
    """Compare distances to the training set: those of generated images with those of real ones that were held out.

    Pixels are those of the thumbnails in [-1, 1]. `nearer_than_real` is the share of generated images that are nearer
    to the training set than all but 1 % of the real ones: 0.01 is what images that are no copies have.

    Args:
        folder: where each search is kept once it is done.

    Returns:
        The figures by space, and the neighbours of the generated images by space.

    Raises:
        LightningDiTError: the images of two sets have different sizes.
    """
    sets = {"generated": samples} | ({} if reference is None else {"reference": reference})
    report: Report = {}
    found: dict[str, Neighbours] = {}
    for space in SPACES:
        known = _points(training, space)
        nearest = {
            title: _kept(folder / f"{title}-{space}.safetensors", _points(views, space), known, f"{title} ({space})")
            for title, views in sets.items()
        }
        found[space] = nearest["generated"]
        report[space] = {title: distance_summary(neighbours.distances) for title, neighbours in nearest.items()}
        if reference is not None:
            limit = nearest["reference"].distances.quantile(REFERENCE_QUANTILE)
            report[space]["nearer_than_real"] = float((found[space].distances < limit).double().mean())
    return report, found


def _kept(file: Path, images: Tensor, known: Tensor, title: str) -> Neighbours:
    """Return the neighbours in `file`, or those that a search finds, which are then written there."""
    if images.shape[1:] != known.shape[1:]:
        raise LightningDiTError(
            f"{title} images and those of the training set differ in size:"
            f" {tuple(images.shape[1:])} and {tuple(known.shape[1:])}",
            "give --size N, which crops every image to N x N",
        )
    with contextlib.suppress(LightningDiTError, TypeError):  # not there yet, or damaged, or of other names
        return Neighbours(**load_weights(file))
    neighbours = search(images, known, title)
    save_weights({"distances": neighbours.distances, "indices": neighbours.indices}, file)
    return neighbours


def neighbour_picture(samples: ImageSource, training: ImageSource, found: Mapping[str, Neighbours]) -> Image.Image:
    """Return, for each space, the generated images that are nearest to the training set above those neighbours."""
    rows: list[Image.Image] = []
    captions: list[str] = []
    for space, neighbours in found.items():
        nearest = neighbours.distances.argsort()[:SHOWN].tolist()
        made = _pictures(samples, nearest)
        real = _pictures(training, neighbours.indices[nearest].tolist())
        rows += made + [picture.resize(made[0].size) for picture in real]
        captions += [f"image {index}" for index in nearest]
        captions += [f"{neighbours.distances[index]:.1f} away ({space})" for index in nearest]
    return image_grid(rows, captions, min(SHOWN, samples.count))


def _points(views: Views, space: str) -> Tensor:
    return views[space].float() / 127.5 - 1.0 if space == "pixels" else views[space]


def _pictures(source: ImageSource, numbers: list[int]) -> list[Image.Image]:
    """Return images by number, read in rising order: an .npz file is read as a stream."""
    found = {number: source.read(number, number + 1)[0] for number in sorted(set(numbers))}
    return [Image.fromarray(torch.einsum("chw->hwc", found[number]).numpy()) for number in numbers]
