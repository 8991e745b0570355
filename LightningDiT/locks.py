"""A folder that one process at a time writes into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from LightningDiT.errors import LightningDiTError

LOCK = ".lock"  # stays, empty: a lock that is removed is one that two runs can hold


@contextlib.contextmanager
def held_folder(folder: Path, what: str) -> Iterator[None]:
    """Keep others out of `folder`, which is made, until the block or the process ends.

    Args:
        what: they would do there, for the message.

    Raises:
        LightningDiTError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a file of its own: the manifest's lock would go where another one replaces it
        opened = (folder / LOCK).open("a+b")
    except OSError as error:
        raise LightningDiTError(
            f"{folder} cannot be written ({error.strerror})", "choose a folder that you may write to"
        ) from error
    with opened:
        if not _lock(opened):
            raise LightningDiTError(
                f"another {what} writes into {folder}", "wait for its end, or choose another --output"
            )
        yield


def _lock(file: IO[bytes]) -> bool:
    """Take the lock of an open file, which its end or a kill gives back; False where another process has it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and network disks without locks: two runs there do double work
        return True
    return True
