"""List files: an image and its class in each line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from LightningDiT.data.image_sets import MOST_DIGITS, FileImages, number_classes
from LightningDiT.errors import LightningDiTError

CSV_HEADERS = ("path", "file", "filename", "image")  # of the first column, in the first line of a table


def open_list(file: str | Path) -> FileImages:
    """Return the images that a text file lists: `path class` in each line, apart by a tab, the last space or a comma.

    Paths are relative to the folder of the list. Classes are numbers, or names, see `number_classes`. Empty lines,
    lines that begin with # and the header of a table (.csv) are passed over.

    Raises:
        LightningDiTError: the file cannot be read, lists nothing, or a line has no class or an impossible one.
    """
    listing = Path(file)
    rows = list(_rows(listing))
    if not rows:
        raise LightningDiTError(f"{listing} lists no images", "write one `path class` a line")
    names, classes = [path for path, _ in rows], [label for _, label in rows]
    if all(re.fullmatch(r"-?\d+", label) for label in classes):
        for name, label in rows:
            if label.startswith("-") or len(label) > MOST_DIGITS:
                raise LightningDiTError(f"{listing}: {name[:80]} has the class {label[:40]}", "number classes from 0")
    files = [listing.parent / name for name in names]
    return FileImages(str(listing), files, number_classes(classes, keep_numbers=True), names)


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
