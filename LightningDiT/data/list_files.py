"""List files: an image and its class in each line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import torch
from PIL import Image

from LightningDiT.data.image_sets import Classes, FileImages, number_classes
from LightningDiT.data.labels import MOST_DIGITS
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_text

FIX = "write `path class` in each line"
CLASS_COLUMNS = ("label", "labels", "class", "class_name", "classname", "target", "category", "y", "id", "label_id")


class _Line(NamedTuple):
    """The fields of a line that is not empty, with its number in the file."""

    number: int
    fields: list[str]


def open_list(file: str | Path) -> FileImages:
    """Return the images that a text file lists: `path class` in each line, apart by a tab, the last space or a comma.

    Paths are relative to the folder of the list, with / or \\ between folders. Classes are all numbers, or all names,
    see `number_classes`. Empty lines, lines that begin with # and a header are passed over.

    Raises:
        LightningDiTError: the file cannot be read, lists nothing, has other columns, or a line has no class, an
            impossible one, or one of another kind.
    """
    listing = Path(file)
    lines = _lines(listing)
    notes: tuple[str, ...] = ()
    if lines and _is_header(lines, listing.parent):
        notes = (f"{listing}: the first line is taken as a header: {', '.join(lines[0].fields)}"[:160],)
        _check_columns(listing, lines[1:], lines[0].fields)
        lines = lines[1:]
    else:
        _check_columns(listing, lines, [])
    if not lines:
        raise LightningDiTError(f"{listing} lists no images", FIX)
    names = [_own_path(line.fields[0], listing.parent) for line in lines]
    files = [listing.parent / name for name in names]
    return FileImages(str(listing), files, _classes(listing, lines), names, notes)


def _classes(listing: Path, lines: Sequence[_Line]) -> Classes:
    """Return the classes of lines: numbers as they are, names numbered."""
    given = [line.fields[1] for line in lines]
    numeric = [_is_integer(label) for label in given]
    if not any(numeric):
        return number_classes(given)
    if not all(numeric):
        odd = lines[numeric.index(not numeric[0])]
        raise LightningDiTError(
            f"{listing}, line {odd.number}: the class is {odd.fields[1][:40]!r}, in line {lines[0].number}"
            f" {given[0][:40]!r}; numbers and names are mixed",
            "give every class a name, or every class a number",
        )
    for line in lines:
        if line.fields[1].startswith("-") or len(line.fields[1]) > MOST_DIGITS:
            raise LightningDiTError(
                f"{listing}: {line.fields[0][:80]} has the class {line.fields[1][:40]}", "number classes from 0"
            )
    return Classes(torch.tensor([int(label) for label in given]))


def _is_header(lines: Sequence[_Line], folder: Path) -> bool:
    """Whether the first line names columns: it alone has no image, or no number where the others have numbers."""
    (_, fields), *others = lines
    if len(fields) < 2 or any(map(_is_image, fields[:2])) or os.path.isfile(folder / fields[0]):  # noqa: PTH113 - pathlib raises for impossible names
        return False
    if not others:
        return fields[1].lower() in CLASS_COLUMNS
    if any(len(line.fields) < 2 for line in others):
        return False
    numbers = not _is_integer(fields[1]) and all(_is_integer(line.fields[1]) for line in others)
    alone = all(any(map(_is_image, line.fields[:2])) for line in others)
    return numbers or alone


def _check_columns(listing: Path, lines: Sequence[_Line], header: Sequence[str]) -> None:
    """Refuse an index before the paths, classes before the paths, and columns of which it is unclear what they are."""
    for number, fields in lines:
        where = f"{listing}, line {number}"
        if len(fields) > 2 and _is_integer(fields[0]) and _is_image(fields[1]):
            raise LightningDiTError(
                f"{where}: the first column counts the rows, as pandas writes it",
                "write it by to_csv(..., index=False)",
            )
        if len(fields) < 2 or not fields[0] or not fields[1]:
            raise LightningDiTError(
                f"{where}: {' '.join(fields).strip()[:80]!r} has no class", "write `path class` there"
            )
        if _is_image(fields[1]) and not _is_image(fields[0]):
            raise LightningDiTError(
                f"{where}: the class {fields[0][:40]!r} stands before the path {fields[1][:80]!r}",
                "swap the columns: the path comes first",
            )
        if len(fields) > 2 and not (len(header) > 1 and header[1].lower() in CLASS_COLUMNS):
            raise LightningDiTError(
                f"{where} has {len(fields)} columns; a path and its class are expected",
                "keep these two, or begin with a header `path,label,...`",
            )


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", text) is not None


def _is_image(text: str) -> bool:
    """Whether a text ends like the name of an image."""
    Image.init()
    return PureWindowsPath(text).suffix.lower() in Image.registered_extensions()


def _own_path(name: str, folder: Path) -> str:
    r"""Return a path with / between folders where it was written as on Windows: cats\000.png."""
    if "\\" not in name or os.path.exists(folder / name):  # noqa: PTH110 - pathlib raises for impossible names
        return name
    return PureWindowsPath(name).as_posix()


def _lines(listing: Path) -> list[_Line]:
    """Return the lines of a list file that are not empty and no comments."""
    try:
        texts = read_text(listing, encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LightningDiTError(f"the list {listing} cannot be read ({error})", "name a text file in UTF-8") from error
    table, lines = listing.suffix.lower() == ".csv", list[_Line]()
    for number, text in enumerate(texts, 1):
        if text.strip() and not text.startswith("#"):
            try:
                lines.append(_Line(number, _fields(text, table)))
            except csv.Error as error:
                raise LightningDiTError(
                    f"{listing}, line {number} is no CSV ({error})", "write `path,class` there"
                ) from error
    return lines


def _fields(line: str, table: bool) -> list[str]:
    if table or ("\t" not in line and " " not in line.strip()):
        parts = next(csv.reader([line], skipinitialspace=True))
    else:
        parts = line.split("\t") if "\t" in line else line.strip().rsplit(" ", 1)
    return [part.strip() for part in parts]
