"""Files that are whole or not there: writing, locks, fingerprints and free space. The standard library is enough."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
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


FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 64, 2**16


def fingerprint(path: str | Path) -> str:
    """Return a short text that changes with a file's content: a hash of its size and of 64 samples of it.

    Whole for files of up to 4 MiB; a file of 6 GB is answered at once.
    """
    file = Path(path)
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for index in range(FINGERPRINT_SAMPLES):
            stream.seek(index * max(0, size - FINGERPRINT_BYTES) // (FINGERPRINT_SAMPLES - 1))
            digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its place only if the block ends without error."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise LightningDiTError(
            f"{target} cannot be written ({error.strerror})", "choose a folder that you may write to"
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn what the system says while `path` is written into one line."""
    try:
        yield
    except OSError as error:
        raise LightningDiTError(
            f"{path} cannot be written ({error.strerror or error})",
            "free space on that disk, and give the same command again",
        ) from error


BYTES_PER_PIXEL = 3  # an upper bound of what a PNG of photographs takes


def check_space(folder: Path, images: int, side: int) -> None:
    """Refuse a run whose images may not fit the disk.

    Raises:
        LightningDiTError: the worst case is larger than the free space.
    """
    place = folder
    while not place.exists():
        place = place.parent
    needed = images * side * side * BYTES_PER_PIXEL
    free = shutil.disk_usage(place).free
    if needed > free:
        raise LightningDiTError(
            f"{images} images may take {needed / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free",
            "ask for fewer images or choose another --output",
        )


def check_target(file: Path) -> None:
    """Refuse a file that cannot be written at the end of a run, before it begins.

    Raises:
        LightningDiTError: it is a folder, or what should be its folder is a file.
    """
    if file.is_dir():
        raise LightningDiTError(
            f"{file} is a folder; a file to write is expected", f"name a file, such as {file}/samples.npz"
        )
    place = next(parent for parent in file.absolute().parents if parent.exists())
    if not place.is_dir():
        raise LightningDiTError(f"{file} cannot be written ({place} is a file)", "name a file in a folder")
