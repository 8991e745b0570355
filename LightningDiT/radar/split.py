"""Training, validation and test by walking pass, in folds, and the file that later steps read."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from LightningDiT.data.labels import natural_key
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_json, write_text
from LightningDiT.radar.layouts import Window
from LightningDiT.radar.overlap import Overlap, Passes, places

FORMAT = "passes of spectrograms, 1"
FOLDS = 5  # by default
PARTS = ("training", "validation", "test", "guard")
BLOCK = 0.2  # of a training pass: the end that validates where a person has two passes
LEAST = 0.5  # of an equal share: what the smallest fold of a person holds at least
RERUN = "run step5_prepare_spectrograms.py again"
STEP5 = "python step5_prepare_spectrograms.py --data FOLDER --write spectrograms/levels --size 64"
MOST_BYTES = 2**28
PARENT, PARENT_FILE = "parent", "parent_file"  # settings of a restricted split: digest and file of the whole one
MOST = 10**18  # of a number, which 64 bits hold


@dataclass(frozen=True)
class Row:
    """One window of a split.

    Attributes:
        file, index, person, condition, recording, number: see `layouts.Window`.
        pass_number: of the person, from 1.
        fold: in which the window is tested, from 0; None where the person has one pass and is in no verdict.
        parts: of `PARTS`, in each fold; "guard" is used by nothing.
        digest: of the pixels.
    """

    file: str
    index: int | None
    person: str
    condition: str
    recording: str
    number: int
    pass_number: int
    fold: int | None
    parts: tuple[str, ...]
    digest: str

    @property
    def name(self) -> str:
        return self.file if self.index is None else f"{self.file}[{self.index}]"

    @property
    def part(self) -> str:
        """The part in fold 0."""
        return self.parts[0]


def make_split(
    windows: Sequence[Window],
    passes: Passes,
    overlap: Overlap,
    digests: Mapping[str, str],
    folds: int = FOLDS,
    seed: int = 0,
) -> list[Row]:
    """Return the rows of a split by pass; the same for the same seed.

    The passes of each person are dealt to at most `folds` folds, the longest first, so that each tests about as many
    windows of the person and of each condition. Fold f tests its own passes, and from three folds of passes on those
    of the next one validate. With two passes the other one trains, its end validates, and the windows between that
    share pixels with both are a guard. One pass trains in every fold.
    """
    people: dict[str, dict[int, list[Window]]] = defaultdict(lambda: defaultdict(list))
    for window in windows:
        people[window.person][passes.numbers[window.name]].append(window)
    rows = []
    for at, person in enumerate(sorted(people, key=natural_key)):
        own = people[person]
        bins = _dealt(own, folds, np.random.default_rng([seed, at]))
        in_verdict = len(bins) > 1
        for fold, numbers in enumerate(bins):
            for number in numbers:
                members = sorted(own[number], key=lambda window: window.number)
                parts = [_parts(members, fold, tested, bins, overlap) for tested in range(folds)]
                for place, window in enumerate(members):
                    own_parts = tuple(part[place] for part in parts)
                    tested_in = fold if in_verdict else None
                    rows.append(
                        Row(
                            **_fields(window),
                            pass_number=number,
                            fold=tested_in,
                            parts=own_parts,
                            digest=digests[window.name],
                        )
                    )
    order = {window.name: place for place, window in enumerate(windows)}
    return sorted(rows, key=lambda row: order[row.name])


def _fields(window: Window) -> dict[str, Any]:
    return {key: value for key, value in asdict(window).items() if key != "part"}


def _dealt(own: Mapping[int, Sequence[Window]], folds: int, rng: np.random.Generator) -> list[list[int]]:
    """Return the passes of a person in at most `folds` bins, the smallest first, none of them empty.

    There are as many bins as keep the smallest above `LEAST` of an equal share, and three where there are three
    passes. Fold 0, which most people use alone, tests the smallest and trains on the largest.
    """
    shuffled = [sorted(own)[at] for at in rng.permutation(len(own))]
    ordered = sorted(shuffled, key=lambda number: -len(own[number]))
    total = sum(len(members) for members in own.values())
    for count in range(min(folds, len(own)), 0, -1):
        bins: list[list[int]] = [[] for _ in range(count)]
        conditions: list[Counter[str]] = [Counter() for _ in range(count)]
        filled = [0] * count
        for number in ordered:
            condition = own[number][0].condition
            keys = [(bool(bins[at]), conditions[at][condition], filled[at]) for at in range(count)]
            at = keys.index(min(keys))
            bins[at].append(number)
            conditions[at][condition] += 1
            filled[at] += len(own[number])
        if count <= 3 or min(filled) >= LEAST * total / count:
            break
    return [bins[at] for at in sorted(range(count), key=lambda at: filled[at])]


def _parts(
    members: Sequence[Window], fold: int, tested: int, bins: Sequence[Sequence[int]], overlap: Overlap
) -> list[str]:
    """Return the part of each window of a pass of bin `fold`, while bin `tested` is tested."""
    if len(bins) > 1 and fold == tested:
        return ["test"] * len(members)
    if len(bins) > 2:
        return ["validation" if fold == (tested + 1) % len(bins) else "training"] * len(members)
    if len(bins) == 2 and tested < 2:
        return _with_end_block(members, overlap)
    if len(bins) == 2 and fold == tested % 2:
        return _with_end_block(members, overlap)
    return ["training"] * len(members)


def _with_end_block(members: Sequence[Window], overlap: Overlap) -> list[str]:
    """Return the parts of a pass that trains and whose end validates; no block where no training would be left."""
    stand = places([window.number for window in members], [0] * len(members), overlap)
    start = stand[len(members) - max(1, round(BLOCK * len(members)))]
    parts = [
        "validation" if place >= start else "guard" if overlap.shares(start, place) else "training" for place in stand
    ]
    return parts if "training" in parts else ["training"] * len(members)


def overlapping_pair(rows: Sequence[Row], overlap: Overlap, fold: int) -> tuple[Row, Row] | None:
    """Return two windows of different parts, neither a guard, that share pixels; None if there are none."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.person, row.condition, row.recording].append(row)
    for members in groups.values():
        members.sort(key=lambda row: row.number)
        stand = places([row.number for row in members], [row.pass_number for row in members], overlap)
        used = [(place, row) for place, row in zip(stand, members, strict=True) if row.parts[fold] != "guard"]
        for at, (place, row) in enumerate(used):
            for next_place, other in used[at + 1 :]:
                if not overlap.shares(place, next_place):
                    break
                if row.parts[fold] != other.parts[fold]:
                    return row, other
    return None


# ---- the file


@dataclass(frozen=True)
class Split:
    """A split as later steps use it.

    Attributes:
        data: the folder, list or array file that it is of.
        root: the folder that the files' paths start from.
        rows: one for each window.
        folds: number of folds.
        settings: everything else that the file says: window, stride, colour map, native columns, dB range.
        digest: of the rows, changes with each of them.
    """

    data: str
    root: str
    rows: tuple[Row, ...]
    folds: int
    settings: Mapping[str, Any]
    digest: str

    @property
    def people(self) -> list[str]:
        return sorted({row.person for row in self.rows}, key=natural_key)

    def part(self, name: str, fold: int = 0) -> list[Row]:
        """Return the windows of a part of `PARTS` in a fold."""
        if name not in PARTS or not 0 <= fold < self.folds:
            raise LightningDiTError(
                f"part {name!r} of fold {fold} is asked for; {', '.join(PARTS)} and folds 0 to {self.folds - 1} are"
                " there",
                "choose one of these",
            )
        return [row for row in self.rows if row.parts[fold] == name]

    @property
    def parent(self) -> str | None:
        """The digest of the split that this one restricts, None for a split of its own."""
        return self.settings.get(PARENT)

    def refuse_tested(self, names: Iterable[str], digests: Iterable[str] = (), fold: int = 0) -> None:
        """Raise LightningDiTError if a window that is to be trained on is one of the test, by name or by pixels.

        Args:
            names: as in `Row.name`.
            digests: of the pixels, as in `Row.digest`.
        """
        tested = {row.name: row for row in self.part("test", fold)}
        by_pixels = {row.digest: row for row in tested.values()}
        found = [tested[name] for name in names if name in tested]
        found += [by_pixels[digest] for digest in digests if digest in by_pixels]
        if found:
            raise LightningDiTError(
                f"{found[0].name} of {found[0].person} is a test window of fold {fold} and stands among the training"
                f" windows, as {len({row.name for row in found})} do",
                "train on the windows of the part training alone",
            )


def restricted(split: Split, kept: Collection[int], fold: int, validating: Collection[int] | None = None) -> list[Row]:
    """Return the rows of a split in which only some windows of a fold train: the others become guards, used by nothing.

    All other parts and folds stay as they are.

    Args:
        kept: rows of the split, from 0.
        validating: rows that go on validating, the others become guards; None: all.

    Raises:
        LightningDiTError: one of them is no training window of the fold.
    """
    chosen = set(kept)
    valid = None if validating is None else set(validating)
    if odd := [at for at in sorted(chosen) if split.rows[at].parts[fold] != "training"]:
        row = split.rows[odd[0]]
        raise LightningDiTError(
            f"{row.name} is to be trained on and is a {row.parts[fold]} window of fold {fold}",
            "choose training windows alone",
        )
    rows = []
    for at, row in enumerate(split.rows):
        parts = list(row.parts)
        if parts[fold] == "training" and at not in chosen:
            parts[fold] = "guard"
        if parts[fold] == "validation" and valid is not None and at not in valid:
            parts[fold] = "guard"
        rows.append(replace(row, parts=tuple(parts)))
    return rows


def save_restricted(
    path: Path,
    split: Split,
    split_file: Path,
    kept: Collection[int],
    fold: int,
    validating: Collection[int] | None = None,
) -> None:
    """Write the split that `restricted` gives; it names the one that it is of, whose levels it shares."""
    settings = {**split.settings, PARENT: split.digest, PARENT_FILE: str(split_file)}
    save_split(path, Path(split.data), Path(split.root), restricted(split, kept, fold, validating), settings)


def save_split(path: Path, data: Path, root: Path, rows: Sequence[Row], settings: Mapping[str, Any]) -> None:
    """Write a split; one row a line.

    Raises:
        LightningDiTError: a file that is no split has the name.
    """
    lines = [json.dumps(_as_json(row), ensure_ascii=False) for row in rows]
    head = {"format": FORMAT, "data": str(data), "root": str(root), **settings, "digest": rows_digest(rows)}
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    write_text(path, text + ',\n "windows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n", ours=is_split)


def is_split(path: Path) -> bool:
    """Return whether a file is a split."""
    try:
        content = read_json(path, MOST_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT


def _as_json(row: Row) -> dict[str, Any]:
    content = asdict(row)
    content["pass"] = content.pop("pass_number")
    return {"part": row.part, **content}


def rows_digest(rows: Sequence[Row]) -> str:
    """Return a text that changes with each value of each row."""
    return hashlib.sha256(json.dumps([_as_json(row) for row in rows]).encode()).hexdigest()


# What a value of the file must be: its key, the test, words for the message.
_Rules = tuple[tuple[str, Callable[[Any], bool], str], ...]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < MOST


def _is_whole_or_none(value: Any) -> bool:
    return value is None or _is_whole(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < MOST


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)) and value[0] < value[1]


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_whole, value.values()))


HEAD: _Rules = tuple((key, _is_text, "a text") for key in ("data", "root", "digest"))
#: Settings that later steps read; the file may lack them.
SETTINGS: _Rules = (
    ("seed", lambda value: type(value) is int and value >= 0, "a whole number from 0 on"),
    ("window", lambda value: _is_whole(value, 1), "a number of columns"),
    ("stride", lambda value: value is None or (_is_number(value) and value > 0), "a number of columns, or null"),
    ("number_unit", lambda value: _is_whole(value, 1), "a whole number from 1 on"),
    ("shares_up_to", _is_whole, "a whole number from 0 on"),
    ("colour_maps", _are_counts, "a number of windows for each colour map"),
    ("native_columns", lambda value: value is None or _is_whole(value, 1), "a number of columns, or null"),
    ("db_range", lambda value: value is None or _is_range(value), "two numbers, the lower one first, or null"),
    (PARENT, _is_text, "a text"),
    (PARENT_FILE, _is_text, "a text"),
)
ROW: _Rules = (
    *((key, _is_text, "a text") for key in ("file", "person", "condition", "recording", "digest", "part")),
    ("index", _is_whole_or_none, "a whole number from 0 on, or null"),
    ("number", lambda value: _is_whole(value, -MOST), "a whole number"),
    ("pass", lambda value: _is_whole(value, 1), "a whole number from 1 on"),
    ("fold", _is_whole_or_none, "a whole number from 0 on, or null"),
    ("parts", lambda value: isinstance(value, list) and all(part in PARTS for part in value), ", ".join(PARTS)),
)
ROW_KEYS = frozenset(key for key, *_ in ROW)


def load_split(path: Path) -> Split:
    """Return a split, checked: every row is whole and is the one that was written, and every value has its type.

    Raises:
        LightningDiTError: it is not there, damaged, or was changed by hand.
    """
    try:
        content = read_json(path, MOST_BYTES)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        _require(content, HEAD, "")
        _require(content, [rule for rule in SETTINGS if rule[0] in content], "")
        rows = tuple(_row(entry, at) for at, entry in enumerate(content.pop("windows"), 1))
        data, root, digest = (content.pop(key) for key, *_ in HEAD)
        folds = len(rows[0].parts)
    except FileNotFoundError as error:
        raise LightningDiTError(f"the split {path} does not exist", STEP5) from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise LightningDiTError(f"the split {path} cannot be read ({first_line(error)})", RERUN) from error
    if digest != rows_digest(rows) or not folds or any(len(row.parts) != folds for row in rows):
        raise LightningDiTError(f"the split {path} is not as it was written: its digest does not fit", RERUN)
    return Split(data, root, rows, folds, content, digest)


def _require(content: Mapping[str, Any], rules: Iterable[tuple[str, Callable[[Any], bool], str]], where: str) -> None:
    """Raise ValueError for a value that is missing or breaks its rule."""
    for key, good, expected in rules:
        if key not in content:
            raise ValueError(f"{key}{where} is missing, {expected} is expected")
        if not good(content[key]):
            raise ValueError(f"{key}{where} is {content[key]!r:.60}, {expected} is expected")


def _row(entry: Any, at: int) -> Row:
    """Return a row of the file, whose number there, from 1, is `at`."""
    if not isinstance(entry, dict):
        raise ValueError(f"window {at} is {entry!r:.60}")
    if unknown := entry.keys() - ROW_KEYS:
        raise ValueError(f"window {at} has the unknown key {min(unknown)!r:.60}")
    _require(entry, ROW, f" of window {at}")
    fields = {key: value for key, value in entry.items() if key != "part"}
    fields["pass_number"], fields["parts"] = fields.pop("pass"), tuple(fields["parts"])
    row = Row(**fields)
    if entry["part"] != row.part:
        raise ValueError(f"{row.name} is {entry['part']} and {row.part}")
    return row
