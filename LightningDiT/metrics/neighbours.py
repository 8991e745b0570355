"""Nearest training images of generated and of real images, which show whether generated ones are copies."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.console import Progress
from LightningDiT.data.image_sets import ImageSet
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import image_grid, to_float
from LightningDiT.metrics.extractors import Activations
from LightningDiT.metrics.formulas import nearest_neighbours

SPACES = ("pixels", "features")
COLUMNS = 10  # images in a row of the picture
REFERENCE_QUANTILE = 0.01

Report = dict[str, Any]


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each image of a set, in one space.

    Attributes:
        distances: (N,) float64, Euclidean.
        indices: (N,) of the training images.
    """

    distances: Tensor
    indices: Tensor


def search(images: Tensor, known: Tensor, title: str) -> Neighbours:
    """Return the nearest of `known` (M, ...) for each of `images` (N, ...), and show progress under `title`."""
    print(f"Searching the training set for the nearest neighbours of {title} images", flush=True)
    with Progress(len(images), "image") as progress:
        return Neighbours(*nearest_neighbours(images, known, progress=progress.update))


def distance_summary(distances: Tensor) -> dict[str, float]:
    """Return median, first percentile and minimum of distances (N,)."""
    return {
        "median": float(distances.median()),
        "percentile_1": float(distances.quantile(REFERENCE_QUANTILE)),
        "minimum": float(distances.min()),
    }


def memorisation(
    samples: Activations, training: Activations, reference: Activations | None, folder: Path
) -> tuple[Report, dict[str, Neighbours]]:
    """Compare the distances of generated images to the training set with those of held-out real images.

    Pixels are the thumbnails in [-1, 1]. `nearer_than_real` is the share of generated images that are nearer to the
    training set than 99 % of the real ones: 0.01 is expected without copies.

    Args:
        folder: where each search is cached.

    Returns:
        The report and the neighbours of the generated images, both by space.

    Raises:
        LightningDiTError: the images of two sets differ in size.
    """
    sets = {"generated": samples} | ({} if reference is None else {"reference": reference})
    report: Report = {}
    found: dict[str, Neighbours] = {}
    for space in SPACES:
        known = _points(training, space)
        nearest = {
            title: _cached_search(folder / f"{title}-{space}.safetensors", _points(points, space), known, title, space)
            for title, points in sets.items()
        }
        found[space] = nearest["generated"]
        report[space] = {title: distance_summary(neighbours.distances) for title, neighbours in nearest.items()}
        if reference is not None:
            limit = nearest["reference"].distances.quantile(REFERENCE_QUANTILE)
            report[space]["nearer_than_real"] = float((found[space].distances < limit).double().mean())
    return report, found


def _cached_search(file: Path, images: Tensor, known: Tensor, title: str, space: str) -> Neighbours:
    """Return the neighbours in `file`, or those of a search, which are then written."""
    if images.shape[1:] != known.shape[1:]:
        raise LightningDiTError(
            f"{title} and training images differ in size ({space}):"
            f" {tuple(images.shape[1:])} and {tuple(known.shape[1:])}",
            "give --size N, which crops every image to N x N",
        )
    with contextlib.suppress(LightningDiTError, TypeError):  # not there yet, damaged, or with other names
        return Neighbours(**load_weights(file))
    neighbours = search(images, known, f"{title} ({space})")
    save_weights(asdict(neighbours), file)
    return neighbours


def neighbour_picture(samples: ImageSet, training: ImageSet, found: Mapping[str, Neighbours]) -> Image.Image:
    """Return a picture, for each space, of the generated images nearest to the training set above their neighbours."""
    rows: list[Image.Image] = []
    captions: list[str] = []
    for space, neighbours in found.items():
        nearest = neighbours.distances.argsort()[:COLUMNS].tolist()
        made = _pictures(samples, nearest)
        real = _pictures(training, neighbours.indices[nearest].tolist())
        rows += made + [picture.resize(made[0].size) for picture in real]
        captions += [f"image {index}" for index in nearest]
        captions += [f"{neighbours.distances[index]:.1f} away ({space})" for index in nearest]
    return image_grid(rows, captions, min(COLUMNS, samples.count))


def _points(activations: Activations, space: str) -> Tensor:
    return to_float(activations[space]) if space == "pixels" else activations[space]


def _pictures(images: ImageSet, numbers: list[int]) -> list[Image.Image]:
    """Return images by number, read in rising order: an .npz file is a stream."""
    found = {number: images.batch([number]).pixels[0] for number in sorted(set(numbers))}
    return [Image.fromarray(torch.einsum("chw->hwc", found[number]).numpy()) for number in numbers]
