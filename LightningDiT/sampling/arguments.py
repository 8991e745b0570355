"""Arguments of a pipeline's call, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from LightningDiT.data.labels import listed, whole_number
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.seeds import SEEDS


def seeds_of(seed: int, indices: Sequence[int] | None, count: int) -> list[tuple[int, int]]:
    """Return seed and index of each of `count` images, by default the indices 0, 1, ...

    Raises:
        LightningDiTError: one is no whole number from 0 to below `SEEDS`, or there are too few or too many.
    """
    seed = _in_range(seed, "seed")
    if indices is None:
        return [(seed, index) for index in range(count)]
    chosen = [_in_range(index, "an index") for index in listed(indices, "indices")]
    if len(chosen) != count:
        raise LightningDiTError(f"{len(chosen)} indices are given for {count} images", "give one for each image")
    return [(seed, index) for index in chosen]


def _in_range(value: object, what: str) -> int:
    number = whole_number(value, what)
    if not 0 <= number < SEEDS:
        raise LightningDiTError(f"{what} is {number}; 0 to {SEEDS - 1} are expected", "choose another value")
    return number


def checked_noise(latents: Any, shape: tuple[int, ...], reverse: bool) -> Tensor | None:
    """Return the latents to start from, None for noise of the seeds.

    Args:
        shape: (N, C, h, w), one latent for each image.
        reverse: whether sampling runs from data to noise, for which there is no noise to draw.

    Raises:
        LightningDiTError: they are no real numbers of this shape, or missing.
    """
    if latents is None:
        if reverse:
            raise LightningDiTError("sample.reverse runs from data to noise and no latents are given", "give latents=")
        return None
    try:
        noise = torch.as_tensor(latents)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"latents are of type {type(latents).__name__}; a tensor is expected ({first_line(error)})"
        raise LightningDiTError(message, "give a tensor of floats") from error
    if not noise.is_floating_point():
        raise LightningDiTError(f"latents are of {noise.dtype}; real numbers are expected", "give a tensor of floats")
    if tuple(noise.shape) != shape:
        raise LightningDiTError(
            f"latents have the shape {list(noise.shape)}; {list(shape)} is expected", "give one latent per class label"
        )
    return noise
