"""Image sets: Fashion-MNIST as tensors, and any folder of images, with or without one subfolder per class."""

from __future__ import annotations

import contextlib
import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.errors import LightningDiTError

T = TypeVar("T")
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TORCHVISION_FOLDER = Path("FashionMNIST", "raw")  # where torchvision keeps it
FASHION_MNIST_SIDE = 28  # pixels
WHITE_16_BIT = 65535
IDX_UINT8 = 0x08  # type code of unsigned bytes in the IDX header
#: A picture so many times as long as it is wide shows next to nothing in a square, and takes gigabytes to get there.
LONGEST = 256


def read_idx(path: Path) -> Tensor:
    """Return the uint8 tensor of a gzipped IDX file (LeCun's MNIST format).

    Raises:
        LightningDiTError: it is damaged, or another file.
    """
    fix = "download Fashion-MNIST again"
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:3] != bytes([0, 0, IDX_UINT8]):
            raise LightningDiTError(f"{path} is no IDX file of bytes", fix)
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        return torch.from_numpy(values.reshape(shape).copy())
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise LightningDiTError(f"{path} is cut short or damaged ({error})", fix) from error


def fashion_mnist(root: str | Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (N, 28, 28) uint8 and labels (N,) int64 of Fashion-MNIST (Xiao et al., arXiv 1708.07747).

    Args:
        root: a folder that holds the four `*-ubyte.gz` files; where they are missing they are fetched
            into it by torchvision.
        train: the 60,000 training photographs, or the 10,000 test photographs.

    Raises:
        LightningDiTError: they are not there and cannot be fetched, or are damaged.
    """
    prefix = "train" if train else "t10k"
    folder = Path(root)
    names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    if all((folder / name).is_file() for name in names):
        images, labels = (read_idx(folder / name) for name in names)
    else:
        images, labels = _fetched_fashion_mnist(folder, train)
    if images.shape[1:] != (FASHION_MNIST_SIDE, FASHION_MNIST_SIDE) or labels.shape != images.shape[:1]:
        raise LightningDiTError(
            f"{folder} has images {list(images.shape)} and labels {list(labels.shape)}; those of Fashion-MNIST are"
            " [N, 28, 28] and [N]",
            "download Fashion-MNIST again",
        )
    return images, labels.long()


def _fetched_fashion_mnist(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Return images and labels by torchvision, which fetches them where they are missing."""
    from torchvision.datasets import FashionMNIST

    places = (folder / TORCHVISION_FOLDER, (folder / TORCHVISION_FOLDER).parent, folder)
    absent = [place for place in places if not place.exists()]
    try:
        dataset = FashionMNIST(str(folder), train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        for place in absent:  # torchvision makes them before it fetches anything
            with contextlib.suppress(OSError):
                place.rmdir()
        reason = " ".join(str(error).split())
        raise LightningDiTError(
            f"Fashion-MNIST is not in {folder} and could not be downloaded ({reason[:200]})",
            "name a folder with the four *-ubyte.gz files",
        ) from error
    return dataset.data, dataset.targets


def holds_fashion_mnist(folder: Path) -> bool:
    """Whether `folder` has the training photographs of Fashion-MNIST, plain or as torchvision keeps them."""
    unpacked = Path(TRAIN_IMAGES).stem
    return any(
        (folder / file).is_file()
        for file in (TRAIN_IMAGES, TORCHVISION_FOLDER / TRAIN_IMAGES, TORCHVISION_FOLDER / unpacked)
    )


def pad_to_32(images: Tensor) -> Tensor:
    """Return (N, 3, 32, 32) float32 in [-1, 1] of grey uint8 images (N, 28, 28): two black pixels around."""
    padded = F.pad(images, (2, 2, 2, 2)).float() / 127.5 - 1.0  # (N, 32, 32)
    return padded.unsqueeze(1).repeat(1, 3, 1, 1)  # (N, 3, 32, 32)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened image with 8 bits for each of red, green and blue; the first picture of an animation.

    Grey values of 16 bits are divided by 257, so that white stays white; Pillow's own conversion cuts them at 255.

    Raises:
        ValueError: the pixels have no fixed range: fractions, or whole numbers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are fractions, for which no range is fixed")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.int64)  # "I;16", or "I", as which older releases of Pillow open such files
    if values.min() < 0 or values.max() > WHITE_16_BIT:
        raise ValueError(f"its pixels reach from {values.min()} to {values.max()}, beyond 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def read_image(file: str | Path) -> Image.Image:
    """Return the image in a file as `as_rgb` does, read to its end.

    Raises:
        Exception: arbitrary bytes make Pillow's readers fail in arbitrary ways; ValueError where it has the shape of a
            thread, whose crop would take gigabytes.
    """
    with Image.open(file) as opened:
        if max(opened.size) > LONGEST * min(opened.size):
            raise ValueError(f"it has {opened.width}x{opened.height} pixels, which make no square")
        return as_rgb(opened)


def shown(path: str | Path) -> str:
    """Return a path as text that any terminal prints: what is no Unicode in a name becomes a question mark."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def image_files(folder: str | Path) -> list[Path]:
    """Return every file below `folder` whose name ends as that of an image that Pillow reads, sorted.

    Links are followed; those that lead nowhere are among the files, so that who reads them says so.

    Raises:
        LightningDiTError: no such folder, one that may not be read, or nothing in it.
    """
    place = Path(folder)
    if place.is_file():
        raise LightningDiTError(f"{place} is a file, a folder of images was expected", f"name {place.parent}")
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(path for path in _files_below(place) if path.suffix.lower() in endings) if place.is_dir() else []
    if not files:
        reason = "no file there is called like an image" if place.is_dir() else "it is not there"
        raise LightningDiTError(f"no images in {place}: {reason}", "name a folder with images (.jpg, .png, ...)")
    return files


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield files and dead links at any depth; a link to one of the folders `above` it is passed over."""
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


def evenly_spaced(items: Sequence[T], at_most: int) -> list[T]:
    """Return all items, or `at_most` of them at equal distances, the first among them."""
    count = min(len(items), at_most)
    return [items[index * len(items) // count] for index in range(count)]


class ImageBatches:
    """Batches of image files; what cannot be read is passed over and remembered.

    Attributes:
        unreadable: files that no image could be made of so far.
    """

    def __init__(self, files: Sequence[Path], transform: Callable[[Image.Image], Tensor], batch_size: int) -> None:
        self.files = files
        self.unreadable: list[Path] = []
        self._transform = transform
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, list[Path]]]:
        """Yield images (N, C, H, W) and the files that they are from."""
        images: list[Tensor] = []
        files: list[Path] = []
        for path in self.files:
            try:
                images.append(self._transform(read_image(path)))
            except Exception:  # arbitrary bytes make Pillow's readers fail in arbitrary ways
                self.unreadable.append(path)
                continue
            files.append(path)
            if len(files) == self._batch_size:
                yield torch.stack(images), files
                images, files = [], []
        if files:
            yield torch.stack(images), files
