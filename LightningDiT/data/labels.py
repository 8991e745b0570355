"""Classes by number and by name."""

from __future__ import annotations

import difflib
import importlib.util
import json
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

from LightningDiT.config import Config
from LightningDiT.errors import LightningDiTError

IMAGENET_CLASSES = 1000
LATENTS_MANIFEST = "manifest.json"  # beside latent shards: their origin, with the names of the classes
LISTED_CLASSES = 20  # names that fit one line of an error
NEAREST_NAMES = 3


@dataclass(frozen=True)
class Labels:
    """The classes of a model.

    Attributes:
        count: number of classes.
        names: one per class, synonyms separated by commas; None if the classes have no names.
    """

    count: int
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, config: Config) -> Labels:
        """Return the classes of a configuration: its own names, those of its latents, or ImageNet's for 1000."""
        names = config.data.class_names or _names_of_latents(config)
        if names is None and config.data.num_classes == IMAGENET_CLASSES:
            names = _imagenet_names()
        return cls(config.data.num_classes, names)

    def number(self, name: SupportsIndex | str) -> int:
        """Return the number of a class given by number or name (one of its synonyms, in any case).

        Raises:
            LightningDiTError: the number is out of range, or the name unknown; known names are listed.
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
        """Return the first synonym of a class, or `class` and its number."""
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


def _names_of_latents(config: Config) -> tuple[str, ...] | None:
    """Return the class names in the manifest of `data.data_path`, or None unless it has one for each class.

    WordNet's synset numbers, the names of ImageNet's folders, are replaced by words.

    Raises:
        LightningDiTError: the manifest is damaged.
    """
    file = Path(config.data.data_path or "") / LATENTS_MANIFEST
    if not config.data.data_path or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LightningDiTError(
            f"the manifest {file} cannot be read ({error})", "set data.class_names, or move it away"
        ) from error
    names = content.get("class_names") if isinstance(content, dict) else None
    if not isinstance(names, list) or len(names) != config.data.num_classes:
        return None
    if all(re.fullmatch(r"n\d{8}", str(name)) for name in names):
        words, _ = _imagenet_tables()
        return tuple(words.get(name, name) for name in names)
    return tuple(map(str, names))


def _imagenet_names() -> tuple[str, ...]:
    """Return the names of ImageNet's 1000 classes."""
    words, synsets = _imagenet_tables()
    return tuple(words[synset] for synset in synsets)


def _imagenet_tables() -> tuple[dict[str, str], list[str]]:
    """Return words by synset, and the synsets of the 1000 classes, from timm's tables.

    The files are read without importing timm, which takes 130 MB and seconds.
    """
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise LightningDiTError("timm, which has ImageNet's class names, is not installed", "pip install timm")
    tables = Path(found.submodule_search_locations[0]) / "data" / "_info"
    lines = (tables / "imagenet_synset_to_lemma.txt").read_text(encoding="utf-8").splitlines()
    words = dict(line.split("\t", 1) for line in lines)
    return words, (tables / "imagenet_synsets.txt").read_text("utf-8").split()
