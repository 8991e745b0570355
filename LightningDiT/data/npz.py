"""The sample file of ADM's evaluation, written and read image by image.

The layout is that of `image_sample.py` in guided-diffusion (Dhariwal and Nichol, arXiv 2105.05233), which its
`evaluator.py` reads: `arr_0` uint8 (N, H, W, 3) and, where classes are known, `arr_1` int64 (N,).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.data.image_sets import AGAIN, Classes, ImageSet
from LightningDiT.data.labels import MOST_DIGITS
from LightningDiT.data.numpy_files import UNREADABLE, read_header, unpacked_bytes
from LightningDiT.errors import LightningDiTError, first_line, is_out_of_memory
from LightningDiT.files import atomic_path, check_target, fingerprint, open_regular, remove_leftovers

PIXELS, LABELS = "arr_0", "arr_1"
MARK = b"images of LightningDiT"  # the archive's comment, by which a file is known for this program's
MOST_BYTES = 2**31  # of an array that is read at once


def write_npz(images: ImageSet, side: int, target: str | Path, each: Callable[[], None], fix: str = AGAIN) -> None:
    """Write `target` whole or not at all, in memory for a few images, calling `each` after every image.

    The bytes depend on pixels and labels alone.

    Args:
        fix: for an image of another size than `side`.

    Raises:
        LightningDiTError: an image is damaged or of another size, or the file cannot be written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (images.count, side, side, 3)}
    path = Path(target)
    check_npz_target(path)
    remove_leftovers(path.absolute().parent)  # 9.8 GB for 50,000 images of 256 x 256
    with atomic_path(path, ours=_is_ours) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = MARK
        with archive.open(zipfile.ZipInfo(f"{PIXELS}.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for number, batch in enumerate(images.batches(range(images.count), 1)):
                height, width = batch.pixels.shape[2:]
                if (height, width) != (side, side):
                    raise LightningDiTError(
                        f"{images.name(number)} has {width}x{height} pixels, {side}x{side} expected", fix
                    )
                member.write(batch.pixels[0].permute(1, 2, 0).numpy().tobytes())
                each()
        if images.labels is not None:
            with archive.open(zipfile.ZipInfo(f"{LABELS}.npy"), "w") as member:
                np.lib.format.write_array(member, images.labels.numpy())


def check_npz_target(target: Path) -> None:
    """Raise LightningDiTError unless `write_npz` may write `target`: a new .npz file, or one that it wrote before."""
    if target.suffix != ".npz" and not target.is_dir():
        raise LightningDiTError(f"{target} is to be an .npz file and is not called so", f"name it {target.name}.npz")
    check_target(target, _is_ours)


def _is_ours(path: Path) -> bool:
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            return archive.comment == MARK
    except UNREADABLE:
        return False


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    """Open the arrays of a regular file, each whole and but for the images of at most `MOST_BYTES`; see `reading`."""
    with reading(path), open_regular(path) as stream, np.load(stream) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        for member in archive.zip.infolist():
            size = unpacked_bytes(member, os.fstat(stream.fileno()).st_size)
            if size > MOST_BYTES and member.filename != f"{PIXELS}.npy":
                raise ValueError(f"{member.filename} has {size} bytes")
            with archive.zip.open(member) as content:
                if content.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
                    content.seek(0)
                    read_header(content, size)
        yield archive


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged .npz file raises into one line."""
    try:
        yield
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        raise LightningDiTError(
            f"{path} is no whole .npz file ({first_line(error)})", "write it again, or fetch it"
        ) from error


def real_numbers(values: np.ndarray) -> Tensor:
    """Return numbers as float64; raises ValueError for texts and complex numbers."""
    kind = getattr(values, "dtype", np.dtype("S"))  # NumPy gives bytes for a member that is no array
    if kind.kind not in "fiu":
        raise ValueError(f"{kind} where numbers are expected")
    return torch.from_numpy(values.astype(np.float64))


class NpzImages(ImageSet):
    """The images of a sample file, which stay on the disk: the file may be larger than the memory.

    Raises:
        LightningDiTError: the file is damaged, or holds no images in ADM's layout.
    """

    sequential = True

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with reading(path):
            with open_npz(path) as archive:
                labels = _class_numbers(archive[LABELS]) if LABELS in archive.files else None
            self._open()
        count = self._shape[0] if self._shape else 0
        wrong = self._shape[3:] != (3,) or self._dtype != np.uint8 or self._by_columns
        if wrong or min(self._shape) < 1:
            raise LightningDiTError(
                f"{path}: {PIXELS} is {self._dtype} {self._shape}; uint8 (N, H, W, 3) in C order is expected",
                "write it as ADM's image_sample.py does",
            )
        if labels is not None and labels.shape != (count,):
            raise LightningDiTError(
                f"{path}: {LABELS} has the shape {tuple(labels.shape)} for {count} images", "remove it, or fix it"
            )
        super().__init__(str(path), count, Classes(labels))

    def _open(self) -> None:
        archive = zipfile.ZipFile(open_regular(self._path))  # stays open, since `read` goes on
        self._stream: IO[bytes] = archive.open(f"{PIXELS}.npy")
        size = archive.getinfo(f"{PIXELS}.npy").file_size
        self._shape, self._by_columns, self._dtype = read_header(self._stream, size)
        self._next = 0

    def read(self, number: int) -> tuple[Image.Image, int]:
        """Return an image and its class, going on from the last one, or from the start of the file."""
        size = math.prod(self._shape[1:])
        with self._lock, reading(self._path):
            if number < self._next:
                self._open()
            while self._next <= number:
                content = self._stream.read(size)
                self._next += 1
            pixels = np.frombuffer(content, np.uint8).reshape(self._shape[1:])
        return Image.fromarray(pixels), self._label(number)

    @property
    def key(self) -> str:
        return f"npz {fingerprint(self._path)}"


def _class_numbers(values: np.ndarray) -> Tensor:
    """Return class numbers as int64; raises ValueError for other values."""
    numbers = real_numbers(values)
    if not bool(((numbers >= 0) & (numbers == numbers.floor()) & (numbers < 10**MOST_DIGITS)).all()):
        raise ValueError(f"{LABELS} holds what is no class number; 0, 1, ... are")
    return numbers.long()
