"""Folders of spectrograms with a known structure: a scrolling texture, cut into windows with a known stride."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from LightningDiT.radar.colour_maps import coloured

SIDE, NATIVE, STRIDE = 128, 32, 8  # pixels of a window, its native columns, and native columns between neighbours


def scroll(seed: int, columns: int, rows: int = SIDE) -> NDArray[np.float32]:
    """Return levels (rows, columns) of a walking pass: speckle that is smooth in Doppler around a ridge."""
    rng = np.random.default_rng(seed)
    speckle = 10 * np.log10(rng.exponential(size=(rows, columns)) + 0.05)
    kernel = np.hanning(7)[1:-1] / np.hanning(7).sum()
    smooth = np.apply_along_axis(lambda column: np.convolve(column, kernel, "same"), 0, speckle)
    ridge = 30 * np.exp(-(((np.arange(rows) - 0.64 * rows) / (rows / 9)) ** 2))[:, None]
    return np.clip((smooth + ridge + 20) / 55, 0, 1).astype(np.float32)


def enlarged(levels: NDArray[np.float32], width: int = SIDE) -> NDArray[np.float32]:
    image = Image.fromarray(levels).resize((width, levels.shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def windows_of(seed: int, count: int) -> list[NDArray[np.float32]]:
    """Return `count` windows of a pass, (SIDE, NATIVE), `STRIDE` columns apart."""
    levels = scroll(seed, NATIVE + STRIDE * (count - 1))
    return [levels[:, at * STRIDE : at * STRIDE + NATIVE] for at in range(count)]


def render(
    root: Path,
    passes: Mapping[str, Sequence[int]],
    gap: int = 12,
    name: str = "ID_{person}/ID{person}_case1_1_Doppler{number}.jpg",
    colour_map: str = "jet",
) -> Path:
    """Write JPEG windows of people: for each a recording whose passes have the given numbers of windows.

    Args:
        gap: distance in number between the last window of a pass and the first of the next.
    """
    for person, counts in passes.items():
        number = 1
        for pass_number, count in enumerate(counts):
            for window in windows_of(1000 * int(person) + pass_number, count):
                file = root / name.format(person=person, number=number)
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(coloured(enlarged(window), colour_map)).save(file, quality=90)
                number += 1
            number += gap - 1
    return root


def prepared(root: Path, passes: Mapping[str, Sequence[int]], *options: str, size: str = "16", **named: Any) -> Path:
    """Write walkers, their split (out/split.json) and their levels (levels/) into a folder by step 5, and return it."""
    render(root / "data", passes, **named)
    return levels_of(root, size, *options)


def levels_of(root: Path, size: str, *options: str) -> Path:
    """Write split and levels of the folder `data` in `root`, see `prepared`; native columns are not looked for."""
    import step5_prepare_spectrograms as step5

    own = ("--data", root / "data", "--output", root / "out", "--write", root / "levels", "--size", size, *options)
    with mock.patch("LightningDiT.radar.preparation.native_columns", return_value=None):
        assert step5.main([str(option) for option in own]) == 0
    return root
