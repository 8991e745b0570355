"""Files that are whole or not there: another name first, the final one when all is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def claim(file: IO[bytes]) -> bool:
    """Lock an open file for this process until it is closed; False where another process has it.
    Where there are no locks (Windows, some network disks) nobody is refused.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def replacing(path: Path, aside: Path | None = None) -> Iterator[Path]:
    """Give a name beside `path` to write to; what is there then takes the place of `path` if the block
    ends without an error, and is removed otherwise. What had the place is renamed to `aside`, where
    that is given.
    """
    fresh = fresh_name(path)
    fresh.unlink(missing_ok=True)
    try:
        yield fresh
        if aside is not None:
            path.replace(aside)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def fresh_name(path: Path) -> Path:
    """The name that `replacing` writes to."""
    return path.with_name(f".new.{path.name}")


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
