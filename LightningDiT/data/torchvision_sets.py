"""The data sets of torchvision as image sets."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import operator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from LightningDiT.data.image_files import as_rgb
from LightningDiT.data.image_sets import FASHION_MNIST, Classes, ImageSet, is_train, open_fashion_mnist
from LightningDiT.errors import LightningDiTError


class TorchvisionImages(ImageSet):
    """A data set of torchvision, whose classes are known when an image is read."""

    def __init__(self, title: str, root: str | Path, data: Any) -> None:
        super().__init__(f"{title} in {root}", len(data), Classes(None, _class_names(getattr(data, "classes", None))))
        self._title, self._data = title, data

    def read(self, number: int) -> tuple[Image.Image, int]:
        image, target = self._data[number]
        return as_rgb(image), operator.index(target)

    @property
    def key(self) -> str:
        content = getattr(self._data, "data", None)
        digest = "" if content is None else hashlib.sha256(np.ascontiguousarray(content)).hexdigest()
        return f"{self._title} {self.count} {digest}".strip()


def open_torchvision(name: str, root: str | Path, split: str) -> ImageSet:
    """Return the images of a torchvision data set, which torchvision downloads into `root` if it can.

    Args:
        split: `train`, `test`, or the data set's own name of a part.

    Raises:
        LightningDiTError: torchvision has no such data set, it cannot be had, or its images have no classes.
    """
    if name == FASHION_MNIST:
        return open_fashion_mnist(root, split)
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        near = difflib.get_close_matches(name, datasets.__all__, 3, 0.4)
        hint = f"; near to it: {', '.join(near)}" if near else ""
        raise LightningDiTError(f"torchvision has no data set {name!r}{hint}", "python -m pydoc torchvision.datasets")
    try:
        data = kind(**_options(kind, name, root, split))
        target = data[0][1]
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise LightningDiTError(
            f"{name} ({split}) of torchvision cannot be had from {root}: {reason}",
            "put its files into --data-root, or choose another --split",
        ) from error
    try:
        operator.index(target)
    except TypeError as error:
        fix = "choose a set for classification"
        raise LightningDiTError(f"{name} of torchvision has no class for each image", fix) from error
    return TorchvisionImages(f"{name} {split}", root, data)


def _options(kind: type, name: str, root: str | Path, split: str) -> dict[str, Any]:
    """Return the arguments for the constructor of a torchvision data set."""
    own = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": str(root)} if "root" in own else {}
    if "split" in own:
        options["split"] = split
    elif "train" in own:
        options["train"] = is_train(name, split)
    elif split != "train":
        raise ValueError("it has no parts")
    passed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in own.values())
    known = [inspect.signature(base).parameters for base in (kind.__mro__[:-1] if passed_on else (kind,))]
    if any("download" in parameters for parameters in known):
        options["download"] = True
    return options


def _class_names(classes: Any) -> tuple[str, ...] | None:
    """Return the names of a data set's classes, synonyms (ImageNet has them) joined by commas."""
    if not isinstance(classes, list | tuple) or not classes:
        return None
    return tuple(name if isinstance(name, str) else ", ".join(map(str, name)) for name in classes)
