"""Files that are whole or not there: another name first, the final one when all is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; what is there then takes the place of `path` if the block
    ends without an error, and is removed otherwise.
    """
    fresh = path.with_name(f".new.{path.name}")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def bring_to_disk(path: Path) -> None:
    """Wait until the disk has what was written to a file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def free_name(path: Path, tag: str) -> Path:
    """The first of NAME.tag-1, NAME.tag-2, ... that is not taken."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.{tag}-{number}")):
        number += 1
    return path.with_name(f"{path.name}.{tag}-{number}")
