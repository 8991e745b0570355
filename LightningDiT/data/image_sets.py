"""Image sets: which images there are, what each is called, its class and its pixels.

`number_classes` numbers classes that have names; `labels.match` compares those of two sets.
"""

from __future__ import annotations

import copy
import enum
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES, fashion_mnist, padded
from LightningDiT.data.image_files import LITTER, find_images, read_image, shown
from LightningDiT.data.labels import CLASS_NAMES, checked_names, natural_key
from LightningDiT.data.prefetching import prefetched
from LightningDiT.data.reading import ReadingProcesses, pixels_of
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json

FASHION_MNIST = "FashionMNIST"
MANIFEST = "manifest.json"  # of a sampling run, beside its images
OWN_FILES = (MANIFEST, "images.sha256", "made.json")  # of a run of sampling, beside its images
AGAIN = "delete it, and run the command again"  # the fix for a damaged image that a program has made
LISTED = 5  # folders in a note
MOST_READERS = 16  # threads or processes that read images by default, at most

T = TypeVar("T")


class Unreadable(enum.Enum):
    """What stands for an image that cannot be read."""

    RAISE = "an error that names it"
    BLACK = "a black image; the set must be cropped"
    NEXT = "the next image that can be read"


class ImageBatch(NamedTuple):
    """Images as they were read.

    Attributes:
        pixels: (N, 3, H, W) uint8, or (N, 1, H, W) float32 in [-1, 1] of levels.
        labels: (N,) int64; 0 where the class is unknown.
        read: (N,) bool; false where a black image stands for one that cannot be read.
        unreadable: name and reason of each image that cannot be read.
        cut: (N,) float32, share of the longer side that the square crop leaves out.
        conditions: (N,) int64, a second label; None if there is none.
        augmentation: (N, A) float32, what was done to each image; None if nothing was.
        windows: (N,) int64, the row of its split that each image comes from; None if there is no split.
    """

    pixels: Tensor
    labels: Tensor
    read: Tensor
    unreadable: list[tuple[str, str]]
    cut: Tensor
    conditions: Tensor | None = None
    augmentation: Tensor | None = None
    windows: Tensor | None = None


#: Of one image: number, pixels (H, W, 3), class (None for a black image), `ImageBatch.unreadable` and `cut`.
_Row = tuple[int, np.ndarray, int | None, list[tuple[str, str]], float]


@dataclass(frozen=True)
class Classes:
    """The classes of a set.

    Attributes:
        labels: (N,) int64, the class of each image; None where it is unknown before the image is read.
        names: by class number; None where there are only numbers.
    """

    labels: Tensor | None = None
    names: tuple[str, ...] | None = None


def number_classes(given: Sequence[str]) -> Classes:
    """Return the classes of images whose class is a name: of a folder, or in a list; see `natural_key`."""
    names = sorted(set(given), key=natural_key)
    numbers = {name: number for number, name in enumerate(names)}
    return Classes(torch.tensor([numbers[name] for name in given]), tuple(names))


class ImageSet:
    """Numbered images, which are read when they are wanted, from several threads.

    Attributes:
        source: where they are, as a person named it.
        count: number of images.
        labels, class_names: see `Classes`.
        size: side in pixels of the square; None: images stay as they are.
        fit: how images become squares, see `images.FITS`.
        notes: lines about what was passed over or assumed when the set was opened.
        sequential: whether images are read best in rising order by one thread.
        is_files: whether each image is a file, so that processes can read it.
        has_statistics: whether latents of the set may be normalised by their own statistics.
    """

    sequential = False
    is_files = False
    has_statistics = True

    def __init__(self, source: str, count: int, classes: Classes) -> None:
        self.source, self.count = source, count
        self.labels, self.class_names = classes.labels, classes.names
        self.size: int | None = None
        self.fit = "crop"
        self.notes: tuple[str, ...] = ()
        self._processes: ReadingProcesses | None = None

    def read(self, number: int) -> tuple[Image.Image, int]:
        """Return an image (8-bit grey or RGB, not cropped) and its class, 0 where unknown.

        Raises:
            Exception: arbitrary bytes make Pillow's readers fail in arbitrary ways.
        """
        raise NotImplementedError

    def name(self, number: int) -> str:
        """Return what messages call an image."""
        return f"image {number} of {self.source}"

    @property
    def key(self) -> str:
        """A text that changes with the list of images, their sizes and classes, and not with the folder's path."""
        raise NotImplementedError

    @property
    def state(self) -> str:
        """A text that changes with everything that the pixels depend on: names, times, size and fit."""
        return f"{self.key} {self._square}"

    @property
    def _square(self) -> str:
        return str(self.size) if self.fit == "crop" else f"{self.size} {self.fit}"

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values, by name, that the latents of the set depend on beside `key`."""
        return {}

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, by name, that the manifest of the set's latents has beside the usual ones."""
        return {}

    @property
    def extras(self) -> dict[str, Tensor]:
        """Empty tensors with the forms of those fields of an `ImageBatch` that the set has beside the usual ones."""
        return {}

    def cropped(self, size: int | None, fit: str = "crop") -> ImageSet:
        """Return the same images as squares of `size` x `size` pixels.

        Args:
            fit: of `images.FITS`.
        """
        images = copy.copy(self)
        images.size, images.fit = size, fit
        return images

    def read_by(self, processes: ReadingProcesses) -> ImageSet:
        """Return the same images, read by processes if each is a file; others stay with threads."""
        images = copy.copy(self)
        images._processes = processes
        return images

    def numbered(self, classes: Classes) -> ImageSet:
        """Return the same images with other class numbers and names."""
        images = copy.copy(self)
        images.labels, images.class_names = classes.labels, classes.names
        return images

    def in_order(self, names: Sequence[str] | None) -> ImageSet:
        """Return the same images with their classes numbered in the order of `names`, if these are the set's own."""
        if self.labels is None or not names or sorted(names) != sorted(self.class_names or ()):
            return self
        order = {name: number for number, name in enumerate(names)}
        numbers = torch.tensor([order[name] for name in self.class_names or ()])
        return self.numbered(Classes(numbers[self.labels], tuple(names)))

    def class_list(self) -> str:
        """Return number, name and count of images of every class in one line; empty where they are not known."""
        if self.labels is None:
            return ", ".join(f"{number} {name}" for number, name in enumerate(self.class_names or ()))
        counts = torch.bincount(self.labels, minlength=len(self.class_names or ())).tolist()
        names = self.class_names or ("",) * len(counts)
        rows = enumerate(zip(names, counts, strict=True))
        return ", ".join(f"{number} {name} ({count})".replace("  ", " ") for number, (name, count) in rows)

    def batch(self, numbers: Iterable[int], unreadable: Unreadable = Unreadable.RAISE) -> ImageBatch:
        """Return the images `numbers`.

        Raises:
            LightningDiTError: an image cannot be read (see `Unreadable`), or images differ in size.
        """
        return self._batch([self._row(number, unreadable) for number in numbers])

    def batches(
        self,
        numbers: Iterable[int],
        batch_size: int,
        unreadable: Unreadable = Unreadable.RAISE,
        threads: int | None = None,
    ) -> Iterator[ImageBatch]:
        """Yield the images `numbers`, `batch_size` at a time; threads read the next batch while one is used.

        Args:
            threads: by default one for each process of `read_by`, else one a core, at most `MOST_READERS`.

        Raises:
            LightningDiTError: see `batch`.
        """
        usual = self._processes.count if self._processes else min(os.cpu_count() or 1, MOST_READERS)
        threads = 1 if self.sequential else threads or usual
        rows = prefetched(functools.partial(self._row, unreadable=unreadable), numbers, threads, ahead=batch_size)
        return map(self._batch, chunks(rows, batch_size))

    def _row(self, number: int, unreadable: Unreadable) -> _Row:
        failed: list[tuple[str, str]] = []
        for candidate in range(number, number + (self.count if unreadable is Unreadable.NEXT else 1)):
            candidate %= self.count
            try:
                (pixels, cut), label = self._pixels(candidate)
                return candidate, pixels, label, failed, cut
            except (MemoryError, LightningDiTError):
                raise
            except Exception as error:  # see `read`
                failed.append((self.name(candidate), " ".join(str(error).split())[:160]))
        name, reason = failed[0]
        if unreadable is Unreadable.BLACK and self.size:
            return number, np.zeros((self.size, self.size, 3), np.uint8), None, failed, 0.0
        if unreadable is Unreadable.NEXT:
            raise LightningDiTError(
                f"none of the {self.count} images of {self.source} can be read ({name}: {reason})",
                "name a folder of images",
            )
        raise LightningDiTError(f"{name} is no whole image ({reason})", AGAIN)

    def _pixels(self, number: int) -> tuple[tuple[np.ndarray, float], int]:
        """Return what `pixels_of` does of an image, and its class; raises as `read`."""
        image, label = self.read(number)
        return pixels_of(image, self.size, self.fit), label

    def _batch(self, rows: Sequence[_Row]) -> ImageBatch:
        numbers, pixels, labels, unreadable, cut = zip(*rows, strict=True)
        for number, image in zip(numbers, pixels, strict=True):
            if image.shape != pixels[0].shape:
                (height, width, _), (first_height, first_width, _) = image.shape, pixels[0].shape
                raise LightningDiTError(
                    f"{self.name(number)} has {width}x{height} pixels, {self.name(numbers[0])} has"
                    f" {first_width}x{first_height}",
                    "give --size N, which crops every image to N x N",
                )
        return ImageBatch(
            torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
            torch.tensor([label or 0 for label in labels]),
            torch.tensor([label is not None for label in labels]),
            [pair for pairs in unreadable for pair in pairs],
            torch.tensor(cut),
        )

    def _label(self, number: int) -> int:
        return 0 if self.labels is None else int(self.labels[number])


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield `size` items at a time, in the end those that are left."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def evenly_spaced(count: int, at_most: int) -> list[int]:
    """Return the numbers below `count`, or `at_most` of them at equal distances, from 0 on."""
    chosen = min(count, at_most)
    return [index * count // chosen for index in range(chosen)]


class FileImages(ImageSet):
    """A file for each image.

    Args:
        names: of the files, as `key` has them; by default their paths.
        notes: see `ImageSet`.
    """

    is_files = True

    def __init__(
        self,
        source: str,
        files: Sequence[Path],
        classes: Classes | None = None,
        names: Sequence[str] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(source, len(files), classes or Classes())
        self.notes = notes
        self.files, self._names = files, names or [path.as_posix() for path in files]

    def read(self, number: int) -> tuple[Image.Image, int]:
        return read_image(self.files[number]), self._label(number)

    def _pixels(self, number: int) -> tuple[tuple[np.ndarray, float], int]:
        if self._processes is None:
            return super()._pixels(number)
        return self._processes.read(self.files[number], self.size, self.fit), self._label(number)

    def name(self, number: int) -> str:
        return shown(self.files[number])

    @property
    def key(self) -> str:
        labels = [0] * self.count if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256()
        for name, file, label in zip(self._names, self.files, labels, strict=True):
            digest.update(f"{name}\t{_stamp(file)[0]}\t{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def state(self) -> str:
        rows = [(name, *_stamp(file)) for name, file in zip(self._names, self.files, strict=True)]
        return f"folder {hashlib.sha256(json.dumps(rows).encode()).hexdigest()} {self._square}"


def _stamp(file: Path) -> tuple[int, int]:
    """Return size and time of a file; -1 where there is none of that name, and for a dead link."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


class ArrayImages(ImageSet):
    """Images in memory.

    Args:
        pixels: (N, H, W, 3) uint8.
        key: see `ImageSet`.
    """

    def __init__(self, source: str, pixels: np.ndarray, classes: Classes | None = None, key: str = "") -> None:
        super().__init__(source, len(pixels), classes or Classes())
        self.pixels, self._key = pixels, key

    def read(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[number]), self._label(number)

    def batch(self, numbers: Iterable[int], unreadable: Unreadable = Unreadable.RAISE) -> ImageBatch:
        chosen = np.fromiter(numbers, np.int64)
        if self.size and self.pixels.shape[1:3] != (self.size, self.size):
            return super().batch(chosen.tolist(), unreadable)
        labels = torch.tensor([self._label(number) for number in chosen])
        pixels = torch.from_numpy(np.ascontiguousarray(self.pixels[chosen].transpose(0, 3, 1, 2)))
        return ImageBatch(pixels, labels, torch.ones(len(chosen), dtype=torch.bool), [], torch.zeros(len(chosen)))

    def batches(
        self, numbers: Iterable[int], batch_size: int, unreadable: Unreadable = Unreadable.RAISE, threads: Any = None
    ) -> Iterator[ImageBatch]:
        return (self.batch(chunk, unreadable) for chunk in chunks(numbers, batch_size))

    @property
    def key(self) -> str:
        return self._key


def open_files(folder: str | Path) -> FileImages:
    """Return all images below a folder, at any depth and without classes.

    Raises:
        LightningDiTError: see `find_images`.
    """
    found = find_images(folder)
    return FileImages(str(folder), found.files, notes=found.notes)


def open_folder(folder: str | Path) -> FileImages:
    """Return the images below a folder whose subfolders are the classes, each with its name; see `number_classes`.

    A folder without subfolders of images is one class.

    Raises:
        LightningDiTError: there is no image, or some lie in subfolders and others do not.
    """
    root = Path(folder)
    found = find_images(root)
    names = [path.relative_to(root) for path in found.files]
    flat = [path for path in found.files if path.parent == root]
    if flat and len(flat) < len(names):
        raise LightningDiTError(
            f"{shown(flat[0])} lies in no subfolder, which would name its class, and other images do",
            "put images into one subfolder a class",
        )
    one = root.resolve().name or "images"
    folders = [one if flat else name.parts[0] for name in names]
    notes = [f"{root} has no subfolders of images: all of them are one class, {shown(one)}"] if flat else []
    if empty := sorted(_folders_in(root) - set(folders), key=natural_key):
        more = f" and {len(empty) - LISTED} more" if len(empty) > LISTED else ""
        notes.append(f"subfolders without images, which are no classes: {', '.join(map(shown, empty[:LISTED]))}{more}")
    texts = [name.as_posix() for name in names]
    return FileImages(str(root), found.files, number_classes(folders), texts, (*found.notes, *notes))


def _folders_in(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in LITTER}


def open_samples(folder: str | Path) -> FileImages:
    """Return the images below a folder that are to be evaluated, with their classes as far as they are known.

    These come from the manifest of a sampling run, or from one subfolder a class; see `number_classes`.

    Raises:
        LightningDiTError: see `find_images`.
    """
    root = Path(folder)
    found = find_images(root, known=OWN_FILES)
    names = [path.relative_to(root) for path in found.files]
    classes = Classes()
    if (root / MANIFEST).is_file():
        classes = _classes_of_run(root / MANIFEST, found.files)
    elif all(len(name.parts) == 2 for name in names):
        classes = number_classes([name.parts[0] for name in names])
    return FileImages(str(folder), found.files, classes, [str(name) for name in names], found.notes)


def _classes_of_run(manifest: Path, files: Sequence[Path]) -> Classes:
    """Return the class of each `000000.png`, ... by the run's manifest; none where it does not tell."""
    try:
        content = read_json(manifest)
        found = torch.tensor([int(content["labels"][int(file.stem)]) for file in files])
        names = checked_names(content.get(CLASS_NAMES))
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RuntimeError, AttributeError):
        return Classes()  # another program's manifest, or other images beside the run's
    is_good = int(found.min()) >= 0 and (names is None or int(found.max()) < len(names))
    return Classes(found, names) if is_good else Classes()


def open_fashion_mnist(root: str | Path, split: str) -> ArrayImages:
    """Return the photographs of Fashion-MNIST, 32x32 pixels with their border; see `fashion_mnist`.

    Raises:
        LightningDiTError: `split` is neither train nor test, or the files cannot be had.
    """
    images, labels = fashion_mnist(root, is_train(FASHION_MNIST, split))
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    return ArrayImages(
        f"{FASHION_MNIST} {split} in {root}",
        padded(images).unsqueeze(3).expand(-1, -1, -1, 3).numpy(),  # (N, 32, 32, 3), without a copy
        Classes(labels, FASHION_MNIST_CLASSES),
        f"{FASHION_MNIST} {split} {len(images)} {digest.hexdigest()}",
    )


def is_train(name: str, split: str) -> bool:
    """Whether `split` is `train`; raises LightningDiTError unless that or `test`."""
    if split not in ("train", "test"):
        raise LightningDiTError(f"{name} has no part {split!r}; train and test are", "choose another --split")
    return split == "train"
