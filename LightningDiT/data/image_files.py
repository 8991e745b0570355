"""Image files: which ones a folder holds, and their pixels as 8-bit RGB."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from LightningDiT.errors import LightningDiTError

WHITE_16_BIT = 65535
#: Limit of width over height, or the reverse. The square crop of a longer image shows next to nothing of it, and
#: enlarges it to gigabytes first.
LONGEST = 256


def read_image(file: str | Path) -> Image.Image:
    """Return the whole image in a file with 8 bits for each of red, green and blue, see `as_rgb`.

    Raises:
        Exception: arbitrary bytes make Pillow's readers fail in arbitrary ways; ValueError for an image beyond
            `LONGEST`.
    """
    with Image.open(file) as opened:
        if max(opened.size) > LONGEST * min(opened.size):
            raise ValueError(f"it has {opened.width}x{opened.height} pixels, which make no square")
        return as_rgb(opened)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image with 8 bits for each of red, green and blue; the first picture of an animation.

    Grey values of 16 bits are divided by 257, so that white stays white; Pillow's own conversion cuts them at 255.

    Raises:
        ValueError: the pixels have no fixed range: fractions, or integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are fractions, for which no range is fixed")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.int64)  # "I;16", or "I", as which older releases of Pillow open such files
    if values.min() < 0 or values.max() > WHITE_16_BIT:
        raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def shown(path: str | Path) -> str:
    """Return a path as text that any terminal prints: what is no Unicode in a name becomes a question mark."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def find_images(folder: str | Path) -> list[Path]:
    """Return every file below `folder` whose name ends like that of an image that Pillow reads, sorted.

    Links are followed. Links that lead nowhere are included, so that a reader reports them.

    Raises:
        LightningDiTError: the folder does not exist, may not be read, or holds no such file.
    """
    root = Path(folder)
    if root.is_file():
        raise LightningDiTError(f"{root} is a file, a folder of images was expected", f"name {root.parent}")
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(path for path in _files_below(root) if path.suffix.lower() in endings) if root.is_dir() else []
    if not files:
        reason = "no file there is called like an image" if root.is_dir() else "it is not there"
        raise LightningDiTError(f"no images in {root}: {reason}", "name a folder with images (.jpg, .png, ...)")
    return files


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield files and dead links at any depth; a link to one of the folders `above` is passed over."""
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise LightningDiTError(f"{folder} cannot be read ({error.strerror})", "give yourself the right to") from error
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(Path(entry.path), (*above, real))
        elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
            yield Path(entry.path)
