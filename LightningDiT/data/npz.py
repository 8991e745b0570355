"""The sample file of ADM's evaluation, written from a folder's images one by one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, disk_errors


def write_npz(
    images: Sequence[Path] | range,
    labels: Sequence[int] | None,
    side: int,
    target: str | Path,
    each: Callable[[], None],
    read: Callable[[Any, int], bytes] | None = None,
) -> None:
    """Write `target` whole or not at all, in memory for one image, calling `each` after every image.

    The layout is that of `image_sample.py` in guided-diffusion (Dhariwal and Nichol, arXiv 2105.05233), which its
    `evaluator.py` reads: `arr_0` uint8 (N, side, side, 3) in the order of `images`, `arr_1` int64 (N,) labels where
    there are any. The bytes depend on pixels and labels alone.

    Args:
        read: one of `images` and `side` -> its pixels (side, side, 3); that of image files where left out.

    Raises:
        LightningDiTError: an image is missing, damaged or of another size, or the file cannot be written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), side, side, 3)}
    with disk_errors(target), atomic_path(target) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for path in images:
                member.write((read or _pixels)(path, side))
                each()
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))


def _pixels(path: Path, side: int) -> bytes:
    fix = "delete it, and give the same command again"
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken chunks
        raise LightningDiTError(f"{path} is no whole image ({error})", fix) from error
    if pixels.shape != (side, side, 3):
        raise LightningDiTError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, {side}x{side} expected", fix)
    return pixels.tobytes()
