"""Image sets with a class for each image: folders by class, list files, and the data sets of torchvision."""

from __future__ import annotations

import csv
import difflib
import hashlib
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from LightningDiT.data.images import (
    FASHION_MNIST_CLASSES,
    as_rgb,
    fashion_mnist,
    image_files,
    pad_to_32,
    read_image,
    shown,
)
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import to_uint8

FASHION_MNIST = "FashionMNIST"
MOST_DIGITS = 9  # of a class number
CSV_HEADERS = ("path", "file", "filename", "image")  # names that the first column of a table has in its first line


@dataclass(frozen=True)
class ImageSet:
    """Images that are read when they are wanted, from several threads.

    Attributes:
        source: where they are, as a person named it.
        count: how many there are.
        read: number of an image -> the image (8-bit RGB) and its class; raises whatever a damaged file makes
            Pillow raise.
        name_of: number of an image -> its name, for messages.
        key: a text that changes with the list of images, their sizes and classes, and not with the place of a folder.
        class_names: by class number; None where there are only numbers.
    """

    source: str
    count: int
    read: Callable[[int], tuple[Image.Image, int]]
    name_of: Callable[[int], str]
    key: str
    class_names: tuple[str, ...] | None = None


def open_folder(folder: str | Path) -> ImageSet:
    """Return the images below `folder`, whose subfolders are the classes, numbered in the order of their names.

    Names that are numbers are ordered as numbers.

    Raises:
        LightningDiTError: there is no image, or one that lies in no subfolder.
    """
    place = Path(folder)
    files = image_files(place)
    flat = [path for path in files if path.parent == place]
    if flat:
        raise LightningDiTError(
            f"{flat[0]} lies in no subfolder, which would name its class", "put images into one subfolder a class"
        )
    classes = [path.relative_to(place).parts[0] for path in files]
    names = _ordered(classes)
    return _of_files(str(place), files, [path.relative_to(place).as_posix() for path in files], classes, names)


def open_list(file: str | Path) -> ImageSet:
    """Return the images that a text file lists, one `path class` a line, apart by a tab, the last space or a comma.

    Paths are relative to the folder of the list. Classes are numbers, or names, which are numbered in their order.
    Empty lines and those that begin with # are passed over, and so is the header of a table (.csv).

    Raises:
        LightningDiTError: the file cannot be read, a line has no class or one that cannot be, or there is no line.
    """
    listing = Path(file)
    rows = list(_rows(listing))
    if not rows:
        raise LightningDiTError(f"{listing} lists no images", "write one `path class` a line")
    names, classes = [path for path, _ in rows], [label for _, label in rows]
    numbered = all(re.fullmatch(r"-?\d+", label) for label in classes)
    wrong = [row for row in rows if row[1].startswith("-") or len(row[1]) > MOST_DIGITS] if numbered else []
    if wrong:
        name, label = wrong[0]
        raise LightningDiTError(f"{listing}: {name[:80]} has the class {label[:40]}", "number classes from 0")
    files = [listing.parent / name for name in names]
    return _of_files(str(listing), files, names, classes, None if numbered else _ordered(classes))


def open_torchvision(name: str, root: str | Path, split: str) -> ImageSet:
    """Return the images of a torchvision data set, fetched into `root` where it is missing and can be fetched.

    The photographs of Fashion-MNIST get two black pixels around, as the bundled model has them.

    Args:
        split: `train` or `test`, or what else the data set calls its parts.

    Raises:
        LightningDiTError: torchvision has no such data set, or it cannot be had, or has no class for each image.
    """
    if name == FASHION_MNIST:
        return _fashion_mnist(root, split)
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        near = difflib.get_close_matches(name, datasets.__all__, 3, 0.4)
        hint = f"; near to it: {', '.join(near)}" if near else ""
        raise LightningDiTError(f"torchvision has no data set {name!r}{hint}", "python -m pydoc torchvision.datasets")
    try:
        data = kind(**_options(kind, name, root, split))
        first = _target(data[0][1])
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LightningDiTError(
            f"{name} ({split}) of torchvision cannot be had from {root}: {reason}",
            "put its files into --data-root, or choose another --split",
        ) from error
    if first is None:
        raise LightningDiTError(f"{name} of torchvision has no class for each image", "choose a set for classification")

    def read(index: int) -> tuple[Image.Image, int]:
        image, target = data[index]
        return as_rgb(image), operator.index(target)

    content = getattr(data, "data", None)
    digest = hashlib.sha256(np.ascontiguousarray(content)).hexdigest() if content is not None else ""
    return ImageSet(
        f"{name} {split} in {root}",
        len(data),
        read,
        lambda index: f"{name} {split} image {index}",
        f"{name} {split} {len(data)} {digest}".strip(),
        _class_names(getattr(data, "classes", None)),
    )


def _fashion_mnist(root: str | Path, split: str) -> ImageSet:
    images, labels = fashion_mnist(root, _is_train(FASHION_MNIST, split))

    def read(index: int) -> tuple[Image.Image, int]:
        pixels = to_uint8(pad_to_32(images[index : index + 1]))[0]  # (32, 32, 3)
        return Image.fromarray(pixels.numpy()), int(labels[index])

    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    return ImageSet(
        f"{FASHION_MNIST} {split} in {root}",
        len(images),
        read,
        lambda index: f"{FASHION_MNIST} {split} image {index}",
        f"{FASHION_MNIST} {split} {len(images)} {digest.hexdigest()}",
        FASHION_MNIST_CLASSES,
    )


def _of_files(
    source: str, files: Sequence[Path], names: Sequence[str], classes: Sequence[str], class_names: Sequence[str] | None
) -> ImageSet:
    """Return the set of image files with the texts of their classes, which are numbers without `class_names`."""
    if class_names is None:
        labels = [int(label) for label in classes]
    else:
        numbers = {name: number for number, name in enumerate(class_names)}
        labels = [numbers[label] for label in classes]

    def read(index: int) -> tuple[Image.Image, int]:
        return read_image(files[index]), labels[index]

    digest = hashlib.sha256()
    for name, file, label in zip(names, files, labels, strict=True):
        digest.update(f"{name}\t{_size_of(file)}\t{label}\n".encode(errors="surrogateescape"))
    known = None if class_names is None else tuple(class_names)
    return ImageSet(source, len(files), read, lambda index: shown(files[index]), digest.hexdigest(), known)


def _size_of(file: Path) -> int:
    """Return the bytes of a file; -1 where there can be none of that name."""
    try:
        return file.stat().st_size
    except (OSError, ValueError):
        return -1


def _ordered(classes: Iterable[str]) -> list[str]:
    """Return the different names in order: that of the alphabet, or of the numbers where all are numbers."""
    names = sorted(set(classes))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _rows(listing: Path) -> Iterator[tuple[str, str]]:
    """Yield path and class of every line of a list file."""
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LightningDiTError(f"the list {listing} cannot be read ({error})", "name a text file in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            fields = _fields(line, listing.suffix.lower() == ".csv")
        except csv.Error as error:
            raise LightningDiTError(
                f"{listing}, line {number} is no CSV ({error})", "write `path,class` there"
            ) from error
        if number == 1 and fields[0].lower() in CSV_HEADERS:
            continue
        if len(fields) < 2 or not fields[0] or not fields[1]:
            raise LightningDiTError(
                f"{listing}, line {number}: {line.strip()[:80]!r} has no class", "write `path class` there"
            )
        yield fields[0], fields[1]


def _fields(line: str, table: bool) -> list[str]:
    if table or ("\t" not in line and " " not in line.strip()):
        parts = next(csv.reader([line], skipinitialspace=True))
    else:
        parts = line.split("\t") if "\t" in line else line.strip().rsplit(" ", 1)
    return [part.strip() for part in parts]


def _options(kind: type, name: str, root: str | Path, split: str) -> dict[str, Any]:
    """Return what a data set of torchvision is to be called with."""
    own = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": str(root)} if "root" in own else {}
    if "split" in own:
        options["split"] = split
    elif "train" in own:
        options["train"] = _is_train(name, split)
    elif split != "train":
        raise ValueError("it has no parts")
    passed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
    known = [inspect.signature(base).parameters for base in (kind.__mro__[:-1] if passed_on else (kind,))]
    if any("download" in parameters for parameters in known):
        options["download"] = True
    return options


def _is_train(name: str, split: str) -> bool:
    if split not in ("train", "test"):
        raise LightningDiTError(f"{name} has no part {split!r}; train and test are", "choose another --split")
    return split == "train"


def _target(value: Any) -> int | None:
    try:
        return operator.index(value)
    except TypeError:
        return None


def _class_names(classes: Any) -> tuple[str, ...] | None:
    """Return the names of a data set's classes, synonyms (ImageNet has them) joined by commas."""
    if not isinstance(classes, list | tuple) or not classes:
        return None
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes)
