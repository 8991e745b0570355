"""Classes: which number, name and folder belong together, and how two sides that meet are compared."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex

from LightningDiT.config import Config
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json, require_regular

IMAGENET_CLASSES = 1000
LATENTS_MANIFEST = "manifest.json"  # beside latent shards: their origin, with the names of the classes
CLASS_NAMES = "class_names"  # key in every manifest and in the metadata of a transformer: names in order of number
CONDITION_NAMES = "condition_names"  # the same of the second label
NULL_TRAINED = "null_trained"  # key in the metadata of weights: whether rows of no class and condition were trained
PLURALS = {"class": "classes", "condition": "conditions"}
MOST_DIGITS = 9  # of a class number
LISTED_CLASSES = 20  # names that fit one line of an error
NEAREST_NAMES = 3

Names = Sequence[str]


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that orders runs of digits by value: ID_1, ID_2, ..., ID_10; ties by the text itself."""
    parts = re.split(r"([0-9]+)", name)
    # a number by its length and its digits: Python makes no integers of thousands of digits
    digits = [part.lstrip("0") for part in parts]
    return [(len(digits[at]), digits[at]) if at % 2 else (0, part) for at, part in enumerate(parts)], name


def whole_number(value: object, what: str) -> int:
    """Return a whole number, NumPy's and one in a tensor too; raise LightningDiTError for anything else.

    Args:
        what: the value's meaning, for the message.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise LightningDiTError(f"{what} is {value!r}; a whole number is expected", "give a whole number") from error


def is_one(given: object) -> bool:
    """Return whether one item was given, and not several."""
    return isinstance(given, str | bytes) or getattr(given, "ndim", None) == 0 or not isinstance(given, Iterable)


def listed(given: Any, what: str) -> list[Any]:
    """Return the items of a sequence, an iterator or an array, or the one item that was given.

    Args:
        what: the meaning of the items, for the message.

    Raises:
        LightningDiTError: the items have no order, or lie in several dimensions.
    """
    if is_one(given):
        return [given]
    dimensions = getattr(given, "ndim", None)
    if isinstance(given, set | frozenset | Mapping) or (dimensions or 1) > 1:
        kind = f"{type(given).__name__} of {dimensions} dimensions" if dimensions else type(given).__name__
        raise LightningDiTError(f"{what} are in a {kind}; a list is expected", "give a list")
    return list(given)


def balance_of(labels: Iterable[int], names: Names | int | None = None) -> str:
    """Return in a few words how evenly images lie on classes, as it belongs beside every figure.

    Args:
        labels: class of each image.
        names: of all classes, or their number; None: the classes that occur are all.
    """
    counts = Counter(labels)
    total = names if isinstance(names, int) else len(names) if names else len(counts)
    fewest, most = (min(counts.values()), max(counts.values())) if len(counts) == total else (0, max(counts.values()))
    if most - fewest <= 1:
        each = f"{most}" if most == fewest else f"{fewest} or {most}"
        return f"balanced, {each} images of each of {total} classes"
    if len(set(counts.values())) == 1:
        return f"balanced over {len(counts)} of {total} classes, {most} images of each"
    return f"not balanced, {fewest} to {most} images of each of {total} classes"


@dataclass(frozen=True)
class Labels:
    """The classes of a model, or the values of its second label.

    Attributes:
        count: number of classes.
        names: what people call them, one per class, synonyms separated by commas; None if they have no names.
        folders: what manifests call them, where that is another word: WordNet's number of each.
        kind: `class`, or `condition` for the second label.
    """

    count: int
    names: tuple[str, ...] | None = None
    folders: tuple[str, ...] | None = None
    kind: str = "class"

    @classmethod
    def of(cls, config: Config, trained: bool = True) -> Labels:
        """Return the classes of a configuration.

        The names are those of the configuration, of its latents' manifest, of its model, or for 1000 ImageNet's, in
        this order. Those of two of these must agree, see `check_agreement`.

        Args:
            trained: false for a model that is yet to be trained, which has the names of its latents alone.

        Raises:
            LightningDiTError: they contradict one another, or a manifest is damaged.
        """
        count, known = config.data.num_classes, _agreed(config, trained, "class", config.data.num_classes)
        if not known:
            synsets = imagenet_synsets() if trained and count == IMAGENET_CLASSES else ()
            return cls(count, _words(synsets), synsets) if synsets else cls(count)
        names, folders = _padded(known[0], count), _padded(known[-1], count)
        return cls(count, _words(names), folders)

    @classmethod
    def conditions_of(cls, config: Config, trained: bool = True) -> Labels | None:
        """Return the values of a configuration's second label, named as its classes are; None if it has none.

        Raises:
            LightningDiTError: as `of`.
        """
        if not (count := config.data.num_conditions):
            return None
        known = _agreed(config, trained, "condition", count)
        return cls(count, _padded(known[0], count, "condition") if known else None, kind="condition")

    @property
    def identity(self) -> tuple[str, ...] | None:
        """The names that a manifest carries, by which two sides are compared; None without names."""
        return self.folders or self.names

    def number(self, name: SupportsIndex | str) -> int:
        """Return the number of a class given by number or name.

        A whole name counts before one of its synonyms, and the same case before another one. Where all names are
        decimal numbers, a text is a name.

        Raises:
            LightningDiTError: it is neither a whole number nor a text, the number is out of range, or the name unknown
                or that of several classes; known names are listed.
        """
        if not isinstance(name, str):
            return self._checked(whole_number(name, f"a {self.kind}"))
        wanted = name.strip()
        if (found := self._find(wanted)) is not None:
            return found
        if is_number(wanted.removeprefix("-")) and not all_decimal(self.names):
            return self._checked(int(wanted))
        raise LightningDiTError(
            f"{self.kind} {name!r} is unknown; {self._hint(wanted)}", "choose a known name or a number"
        )

    def numbers(self, names: Iterable[SupportsIndex | str]) -> list[int]:
        """Return the numbers of several classes."""
        return [self.number(name) for name in names]

    def caption(self, label: int) -> str:
        """Return the first synonym of a class, or `class` and its number."""
        return self.names[label].split(",")[0] if self.names else f"{self.kind} {label}"

    def listing(self, numbers: Iterable[int]) -> str:
        """Return numbers with their full names in one line, each class once."""
        chosen = list(dict.fromkeys(numbers))
        shown = [f"{number} {self.names[number]}" if self.names else str(number) for number in chosen[:LISTED_CLASSES]]
        more = f" and {len(chosen) - LISTED_CLASSES} more" if len(chosen) > LISTED_CLASSES else ""
        return "; ".join(shown) + more

    def _checked(self, number: int) -> int:
        if not 0 <= number < self.count:
            raise LightningDiTError(
                f"{self.kind} {number} is out of range; 0 to {self.count - 1} are expected", "choose one of these"
            )
        return number

    def _find(self, wanted: str) -> int | None:
        """Return the class of a name, or None; raises LightningDiTError for a name of several classes."""
        spellings: tuple[Callable[[str], str], ...] = (str, str.casefold)
        for spelt in spellings:
            for split in (lambda names: [names], _synonyms):
                found = [
                    number
                    for number, names in enumerate(self.names or ())
                    if spelt(wanted) in [spelt(one.strip()) for one in split(names)]
                ]
                if len(found) > 1:
                    raise LightningDiTError(
                        f"{wanted!r} names {len(found)} {PLURALS[self.kind]}: {self.listing(found)}",
                        "choose one by its number",
                    )
                if found:
                    return found[0]
        return None

    def _hint(self, wanted: str) -> str:
        names = dict.fromkeys(one for names in self.names or () for one in (names, *_synonyms(names)))
        by_case = {one.casefold(): one for one in names}
        near = difflib.get_close_matches(wanted.casefold(), by_case, NEAREST_NAMES, 0.5)
        near += [known for known in by_case if wanted.casefold() in known][: NEAREST_NAMES - len(near)]
        if near:
            return f"near to it: {', '.join(dict.fromkeys(by_case[one] for one in near))}"
        if self.names and self.count <= LISTED_CLASSES:
            return f"known: {', '.join(self.names)}"
        if all_decimal(self.names):
            return f"the names are numbers, from {self.names[0]} to {self.names[-1]}" if self.names else ""
        return f"numbers 0 to {self.count - 1} always work"


# ---- two sides that meet


@dataclass(frozen=True)
class Match:
    """The common numbering of two sides.

    Attributes:
        names: of the classes; None: neither side has names.
        ours, theirs: the common number of each class of one side; None: its numbers stay.
        note: one line that says how names and numbers were brought together; empty if there was nothing to say.
    """

    names: tuple[str, ...] | None
    ours: tuple[int, ...] | None = None
    theirs: tuple[int, ...] | None = None
    note: str = ""


def match(ours: Names | None, theirs: Names | None, where_ours: str, where_theirs: str) -> Match:
    """Return the common numbering of two sides, of which each has class names in the order of its numbers, or none.

    Names on both sides are compared: those of `theirs` that `ours` lacks come after the others. Names that are decimal
    numbers meet numbers, or names of the other kind, by their value.

    Raises:
        LightningDiTError: the numbers of one side reach beyond the names of the other.
    """
    if ours and theirs and all_decimal(ours) == all_decimal(theirs):
        numbers, names = {key: number for number, key in enumerate(_keys(ours, theirs))}, list(ours)
        their_keys = _keys(theirs, ours)
        for name, key in zip(theirs, their_keys, strict=True):
            if key not in numbers:
                numbers[key] = len(names)
                names.append(name)
        return Match(tuple(names), None, tuple(numbers[key] for key in their_keys))
    if ours and all_decimal(ours):
        numbers, note = _by_value(ours, theirs, where_ours, where_theirs)
        return Match(tuple(theirs) if theirs else None, numbers, None, note)
    if theirs and all_decimal(theirs):
        numbers, note = _by_value(theirs, ours, where_theirs, where_ours)
        return Match(tuple(ours) if ours else None, None, numbers, note)
    if not ours and not theirs:
        return Match(None)
    named, plain = (where_ours, where_theirs) if ours else (where_theirs, where_ours)
    note = f"{plain} has class numbers without names; they count the classes of {named} in its order, from 0"
    return Match(tuple(ours or theirs or ()), None, None, note)


def check_agreement(ours: Names, theirs: Names, where_ours: str, where_theirs: str, kind: str = "class") -> None:
    """Check that two sides give every number the same class; synonyms, separated by commas, count as one name.

    Args:
        kind: of the labels, as in `Labels`.

    Raises:
        LightningDiTError: they do not; the first contradiction is named.
    """
    _, _, file = where_ours.partition(f"data.{kind}_names in ")
    fix = f"remove data.{kind}_names in {file}" if file else "choose what belongs together"
    if len(ours) != len(theirs):
        raise LightningDiTError(f"{where_ours} has {len(ours)} {PLURALS[kind]}, {where_theirs} has {len(theirs)}", fix)
    words = _words(tuple(theirs))
    for number, (our, their, shown) in enumerate(zip(ours, theirs, words, strict=True)):
        if not {our, *_synonyms(our)} & {their, shown, *_synonyms(their), *_synonyms(shown)}:
            raise LightningDiTError(f"{kind} {number} is {our!r} in {where_ours} and {their!r} in {where_theirs}", fix)


def is_number(text: str) -> bool:
    """Whether a text is a class number: ASCII digits, not too many."""
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS


def all_decimal(names: Names | None) -> bool:
    """Whether there are names, and each is a decimal number with a value of its own."""
    return bool(names) and all(map(is_number, names or ())) and len(set(map(int, names or ()))) == len(names or ())


def _keys(names: Names, others: Names) -> list[int | str]:
    """Return what names are compared by: values where both sides are decimal (01 is 1), else texts."""
    return [int(name) for name in names] if all_decimal(names) and all_decimal(others) else list(names)


def _by_value(names: Names, others: Names | None, where: str, there: str) -> tuple[tuple[int, ...], str]:
    numbers = tuple(map(int, names))
    if others and max(numbers) >= len(others):
        raise LightningDiTError(
            f"{where} has the class {names[numbers.index(max(numbers))]!r}, and {there} has {len(others)} classes,"
            f" 0 to {len(others) - 1}",
            "give the folders of both sides the same names",
        )
    return numbers, f"the class names of {where} are numbers, and count as the class numbers of {there}"


# ---- where names come from


def _agreed(config: Config, trained: bool, kind: str, count: int) -> list[Names]:
    """Return the names of `count` labels of a kind in each place that has some, the configuration's own first.

    Raises:
        LightningDiTError: two places contradict one another, or there are more names than labels.
    """
    own = getattr(config.data, f"{kind}_names")
    known = [(own, f"data.{kind}_names in {config.source}")] if own else []
    carried = _carried(config if trained else replace(config, ckpt_path=None, adapter_path=None), f"{kind}_names")
    known += [(names, where) for names, where in carried if names]
    for (ours, where), (theirs, there) in itertools.pairwise(known):
        check_agreement(ours, theirs, where, there, kind)
    if known and len(known[0][0]) > count:
        (names, where), key = known[0], f"data.num_{PLURALS[kind]}"
        raise LightningDiTError(
            f"{where} has {len(names)} {PLURALS[kind]}, {key} is {count}",
            f"set {key}: {len(names)} in {config.source}",
        )
    return [names for names, _ in known]


def _carried(config: Config, key: str) -> list[tuple[tuple[str, ...] | None, str]]:
    """Return the names that the latents of a configuration, and its model, carry under a key, with where each is.

    Those of an adapter go before those of the weights that it changes: its classes may be others.
    """
    folder, files = config.data.data_path, (("adapter", config.adapter_path), ("model", config.ckpt_path))
    found = (
        [(names_of_latents(folder, key), f"the latents' manifest {Path(folder) / LATENTS_MANIFEST}")] if folder else []
    )
    of_network = [(names_of_model(file, key), f"the {what} {file}") for what, file in files if file]
    return found + [named for named in of_network if named[0]][:1]


def names_of_model(path: str | Path, key: str = CLASS_NAMES) -> tuple[str, ...] | None:
    """Return the names in the metadata of a transformer's weights, None where there are none.

    Args:
        key: or `CONDITION_NAMES`, for those of the second label.

    Raises:
        LightningDiTError: they are no list of texts.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return None
    try:
        require_regular(file)
        with safe_open(file, framework="numpy") as opened:
            text = (opened.metadata() or {}).get(key)
    except (SafetensorError, OSError):
        return None  # whoever loads the weights says what is wrong with them
    try:
        return checked_names(json.loads(text), key) if text else None
    except (ValueError, RecursionError) as error:
        kind = key.replace("_", " ")
        raise LightningDiTError(f"{file}: its {kind} cannot be read ({error})", "train it again") from error


def names_of_latents(folder: str | Path, key: str = CLASS_NAMES) -> tuple[str, ...] | None:
    """Return the names in the manifest of latents, None where it has none or there is no manifest.

    Args:
        key: or `CONDITION_NAMES`, for those of the second label.

    Raises:
        LightningDiTError: the manifest is damaged.
    """
    file = Path(folder) / LATENTS_MANIFEST
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        return checked_names(content.get(key), key) if isinstance(content, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise LightningDiTError(
            f"the manifest {file} cannot be read ({error})", "extract the latents again, or move it away"
        ) from error


def checked_names(names: object, key: str = CLASS_NAMES) -> tuple[str, ...] | None:
    """Return the names that a manifest holds under a key, None for none; raises ValueError for what are no names."""
    if names is None or names == []:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is no list of texts")
    return tuple(names)


def _synonyms(names: str) -> list[str]:
    return [one.strip() for one in names.split(",")]


def _padded(names: Names, count: int, kind: str = "class") -> tuple[str, ...]:
    return (*names, *(f"{kind} {number}" for number in range(len(names), count)))


def _words(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return words for WordNet's synset numbers, the names of ImageNet's folders; other names as they are."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    words, _ = _imagenet_tables()
    return tuple(words.get(name, name) for name in names)


def imagenet_synsets() -> tuple[str, ...]:
    """Return WordNet's synset numbers of ImageNet's 1000 classes, the names of its folders."""
    return tuple(_imagenet_tables()[1])


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
