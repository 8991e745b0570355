"""What can be compared: folders of images, ADM's .npz files, Fashion-MNIST, and statistics of a reference set."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.data.images import (
    FASHION_MNIST_CLASSES,
    fashion_mnist,
    holds_fashion_mnist,
    image_files,
    read_image,
)
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import fingerprint
from LightningDiT.images import centre_crop

MANIFEST = "manifest.json"  # what a run of LightningDiT.inference leaves beside its images
PARTS = {"train": True, "test": False}  # FOLDER:train and FOLDER:test of Fashion-MNIST
PIXELS, LABELS = "arr_0", "arr_1"  # names in ADM's .npz files
#: Names under which ADM (and EDM, but for the spatial ones) keeps mean and covariance of a feature.
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
MOST_DIGITS = 9  # of a class number
DECODERS = 8  # threads that read image files
BORDER = 2  # pixels that make 28x28 to 32x32, as `pad_to_32` does

UNREADABLE = (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile)  # what a damaged .npz file raises

Moments = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ImageSource:
    """Images that are read when they are wanted.

    Attributes:
        name: as the user gave it.
        count: how many they are.
        read: (start, stop) -> (stop - start, 3, H, W) uint8.
        key: a text that changes with what the images are read from.
        labels: (count,) int64, None where unknown.
        class_names: by class number; empty where there are only numbers.
        files: the image files in order; empty where the images are in one file.
    """

    name: str
    count: int
    read: Callable[[int, int], Tensor]
    key: str
    labels: Tensor | None = None
    class_names: Sequence[str] = ()
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class Source:
    """One side of a comparison: images, or mean and covariance of their features, or both.

    Attributes:
        moments: `features` and, for sFID, `spatial` -> mean (F,) and covariance (F, F), float64.
    """

    images: ImageSource | None
    moments: Moments


def open_source(name: str, size: int | None = None) -> Source:
    """Return what `name` says: a folder, `FOLDER:train` or `FOLDER:test` of Fashion-MNIST, or an .npz file.

    Args:
        size: images are reduced and cropped to size x size pixels (the crop of ADM); as they are where left out.

    Raises:
        LightningDiTError: nothing is there, or it holds neither images nor statistics.
    """
    path = Path(name)
    folder, _, part = name.rpartition(":")
    if part in PARTS and not path.exists():
        return Source(_fashion_mnist(name, Path(folder), PARTS[part]), {})
    if path.suffix == ".npz":
        return _archive(name, path, size)
    if holds_fashion_mnist(path):
        raise LightningDiTError(f"{name} holds Fashion-MNIST, and not which part of it", f"say {name}:test")
    return Source(_folder(name, path, size), {})


def open_images(name: str, size: int | None = None) -> ImageSource:
    """Return the images that `name` says; see `open_source`.

    Raises:
        LightningDiTError: as `open_source`, or there are statistics alone.
    """
    images = open_source(name, size).images
    if images is None:
        raise LightningDiTError(
            f"{name} holds statistics and no images ({PIXELS})", "name a folder or an .npz file with images"
        )
    return images


def _fashion_mnist(name: str, folder: Path, train: bool) -> ImageSource:
    photographs, labels = fashion_mnist(folder, train)

    def read(start: int, stop: int) -> Tensor:
        padded = torch.nn.functional.pad(photographs[start:stop], [BORDER] * 4)  # (N, 32, 32)
        return padded[:, None].repeat(1, 3, 1, 1)

    key = f"fashion-mnist {train} {hashlib.sha256(photographs.numpy()).hexdigest()}"
    return ImageSource(name, len(labels), read, key, labels, FASHION_MNIST_CLASSES)


def _folder(name: str, folder: Path, size: int | None) -> ImageSource:
    files = image_files(folder)
    parts = [(str(file.relative_to(folder)), *_stamp(file)) for file in files]
    labels, class_names = _labels_of(folder, files)

    def read(start: int, stop: int) -> Tensor:
        with ThreadPoolExecutor(DECODERS) as pool:  # Pillow decodes outside the interpreter's lock
            pixels = list(pool.map(lambda file: _pixels(file, size), files[start:stop]))
        return _batch(list(zip(map(str, files[start:stop]), pixels, strict=True)))

    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return ImageSource(name, len(files), read, f"folder {digest} {size}", labels, class_names, files)


def _stamp(file: Path) -> tuple[int, int]:
    """Return size and time of a file; zeros for a dead link, which nothing can be read from either."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _labels_of(folder: Path, files: Sequence[Path]) -> tuple[Tensor | None, Sequence[str]]:
    """Return the classes of `files`: those of a run's manifest, or of one subfolder per class; else None.

    Subfolders that are numbers are the numbers of the classes; else classes are numbered in the order of the names.
    """
    if (folder / MANIFEST).is_file():
        return _labels_of_run(folder / MANIFEST, files), ()
    if any(file.parent.parent != folder for file in files):
        return None, ()
    parents = [file.parent.name for file in files]
    names = sorted(set(parents))
    if all(name.isdecimal() and len(name) <= MOST_DIGITS for name in names):
        return torch.tensor([int(parent) for parent in parents]), ()
    numbers = {name: number for number, name in enumerate(names)}
    return torch.tensor([numbers[parent] for parent in parents]), names


def _labels_of_run(manifest: Path, files: Sequence[Path]) -> Tensor | None:
    """Return the class of each `000000.png`, ... as the run's manifest has it; None where it says nothing of them."""
    try:
        labels = json.loads(manifest.read_text(encoding="utf-8"))["labels"]
        found = torch.tensor([int(labels[int(file.stem)]) for file in files])
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RuntimeError):
        return None  # another program's manifest, or other images beside the run's
    return found if bool((found >= 0).all()) else None


def _pixels(file: Path, size: int | None) -> np.ndarray:
    """Return the pixels (H, W, 3) uint8 of one image file."""
    try:
        whole = read_image(file)
    except Exception as error:  # arbitrary bytes make Pillow's readers fail in arbitrary ways
        raise LightningDiTError(
            f"{file} is no whole image ({error})", "delete it, and give the same command again"
        ) from error
    return np.asarray(centre_crop(whole, size) if size else whole)


def _batch(images: Sequence[tuple[str, np.ndarray]]) -> Tensor:
    """Return images (N, 3, H, W) uint8 of names and pixels (H, W, 3), which have to be of one size."""
    first, pixels = images[0]
    for name, other in images:
        if other.shape != pixels.shape:
            raise LightningDiTError(
                f"{name} has {other.shape[1]}x{other.shape[0]} pixels, {first} has {pixels.shape[1]}x{pixels.shape[0]}",
                "give --size N, which crops every image to N x N",
            )
    return torch.from_numpy(np.stack([pixels for _, pixels in images])).permute(0, 3, 1, 2)


def _archive(name: str, path: Path, size: int | None) -> Source:
    """Return images and statistics of an .npz file; the images stay on the disk until they are read."""
    try:
        with np.load(path) as archive:
            there = set(archive.files)
            moments = {
                kind: (_real(archive[mean]), _real(archive[covariance]))
                for kind, (mean, covariance) in MOMENTS.items()
                if mean in there and covariance in there
            }
            labels = _classes(archive[LABELS]) if LABELS in there else None
    except UNREADABLE as error:
        raise LightningDiTError(f"{name} is no whole .npz file ({error})", "name one that NumPy can read") from error
    if PIXELS in there:
        return Source(_archive_images(name, path, labels, size), moments)
    if not moments:
        raise LightningDiTError(
            f"{name} holds {', '.join(sorted(there)) or 'nothing'}; {PIXELS} (images) or mu and sigma are expected",
            "name a file in the layout of ADM",
        )
    return Source(None, moments)


def _real(values: np.ndarray) -> Tensor:
    """Return numbers as float64; raises ValueError for texts and complex numbers."""
    if values.dtype.kind not in "fiu":
        raise ValueError(f"{values.dtype} where numbers are expected")
    return torch.from_numpy(values.astype(np.float64))


def _classes(values: np.ndarray) -> Tensor:
    """Return class numbers as int64; raises ValueError for what is none."""
    numbers = _real(values)
    if not bool(((numbers >= 0) & (numbers == numbers.floor()) & (numbers < 10**MOST_DIGITS)).all()):
        raise ValueError(f"{LABELS} holds what is no class number; 0, 1, ... are")
    return numbers.long()


def _archive_images(name: str, path: Path, labels: Tensor | None, size: int | None) -> ImageSource:
    reader = _MemberReader(path, f"{PIXELS}.npy")
    shape = reader.shape
    if len(shape) != 4 or shape[3] != 3 or reader.dtype != np.uint8 or not shape[0] or reader.by_columns:
        raise LightningDiTError(
            f"{name}: {PIXELS} is {reader.dtype} {tuple(shape)}; uint8 (N, H, W, 3) in C order is expected",
            "write it as ADM's image_sample.py does",
        )
    if labels is not None and labels.shape != (shape[0],):
        raise LightningDiTError(
            f"{name}: {LABELS} has the shape {tuple(labels.shape)} for {shape[0]} images", "leave it out, or fix it"
        )

    def read(start: int, stop: int) -> Tensor:
        pixels = reader.rows(start, stop)
        if size:
            pixels = np.stack([np.asarray(centre_crop(Image.fromarray(image), size)) for image in pixels])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    return ImageSource(name, shape[0], read, f"npz {fingerprint(path)} {size}", labels)


class _MemberReader:
    """Rows of one array in an .npz file, read as a stream: the array may be larger than the memory.

    Attributes:
        shape, dtype: of the array.
        by_columns: whether its values are in Fortran's order.
    """

    def __init__(self, path: Path, member: str) -> None:
        self._path, self._member = path, member
        with _damage_said(path):
            self._open()

    def _open(self) -> None:
        self._stream: IO[bytes] = zipfile.ZipFile(self._path).open(self._member)  # noqa: SIM115  read on in `rows`
        version = np.lib.format.read_magic(self._stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, self.by_columns, self.dtype = header(self._stream)
        self._place = 0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows start, ..., stop - 1, going on from the last call where it can."""
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with _damage_said(self._path):
            if start < self._place:
                self._open()
            while self._place < start:
                self._stream.read(row_bytes)
                self._place += 1
            content = self._stream.read((stop - start) * row_bytes)
            self._place = stop
            return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:]).copy()


@contextlib.contextmanager
def _damage_said(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into one line."""
    try:
        yield
    except UNREADABLE as error:
        raise LightningDiTError(f"{path} is damaged ({error})", "write or fetch it again") from error
