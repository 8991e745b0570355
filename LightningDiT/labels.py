"""Classes by number and by name."""

from __future__ import annotations

import difflib
import importlib.util
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from LightningDiT.config import Config
from LightningDiT.errors import LightningDiTError

IMAGENET_CLASSES = 1000
LISTED_CLASSES = 20  # so many names fit one line of an error
NEAREST_NAMES = 3


@dataclass(frozen=True)
class Labels:
    """The classes of a model.

    Attributes:
        count: number of classes.
        names: one a class, synonyms separated by commas, or None where there are none.
    """

    count: int
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, config: Config) -> Labels:
        """Return the classes of a configuration: its own names, or ImageNet's where there are 1000."""
        names = config.data.class_names
        if names is None and config.data.num_classes == IMAGENET_CLASSES:
            names = _imagenet_names()
        return cls(config.data.num_classes, names)

    def number(self, name: SupportsIndex | str) -> int:
        """Return the number of a class given by number or name (one of its synonyms, in any case).

        Raises:
            LightningDiTError: out of range, or no such name; known names are given.
        """
        if not isinstance(name, str) or name.strip().lstrip("-").isdecimal():
            number = int(name) if isinstance(name, str) else operator.index(name)  # tensors and NumPy's integers too
            if not 0 <= number < self.count:
                raise LightningDiTError(
                    f"class {number} is out of range; 0 to {self.count - 1} are expected", "choose one of these"
                )
            return number
        synonyms = self._synonyms()
        wanted = name.strip().lower()
        if wanted not in synonyms:
            raise LightningDiTError(
                f"class {name!r} is unknown; {self._hint(wanted, synonyms)}", "choose a known name or a number"
            )
        return synonyms[wanted]

    def numbers(self, names: Iterable[SupportsIndex | str]) -> list[int]:
        """Return the numbers of several classes."""
        return [self.number(name) for name in names]

    def caption(self, label: int) -> str:
        """Return the name of a class for people: its first synonym, or its number."""
        return self.names[label].split(",")[0] if self.names else f"class {label}"

    def _synonyms(self) -> dict[str, int]:
        table: dict[str, int] = {}
        for number, names in enumerate(self.names or ()):
            for synonym in (names, *names.split(",")):
                table.setdefault(synonym.strip().lower(), number)
        return table

    def _hint(self, wanted: str, synonyms: dict[str, int]) -> str:
        near = difflib.get_close_matches(wanted, synonyms, NEAREST_NAMES, 0.5)
        near += [known for known in synonyms if wanted in known][: NEAREST_NAMES - len(near)]
        if near:
            return f"near to it: {', '.join(dict.fromkeys(near))}"
        if self.names and self.count <= LISTED_CLASSES:
            return f"known: {', '.join(self.names)}"
        return f"numbers 0 to {self.count - 1} always work"


def _imagenet_names() -> tuple[str, ...]:
    """Return ImageNet's class names from timm's tables, read without timm, whose import takes 130 MB and seconds."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise LightningDiTError("timm, which has ImageNet's class names, is not installed", "pip install timm")
    tables = Path(found.submodule_search_locations[0]) / "data" / "_info"
    lines = (tables / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    with_names = dict(line.split("\t", 1) for line in lines)
    return tuple(with_names[synset] for synset in (tables / "imagenet_synsets.txt").read_text("utf-8").split())
