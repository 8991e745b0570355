"""Files that are whole or absent: writing, locks, fingerprints and free space, by the standard library alone."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from LightningDiT.console import format_bytes
from LightningDiT.errors import OS_FIXES, LightningDiTError

# ---- writing


@contextlib.contextmanager
def atomic_path(path: str | Path, aside: Path | None = None) -> Iterator[Path]:
    """Give an empty file beside `path`, which takes its place if the block ends without an error.

    Args:
        aside: new name of the file that was there.

    Raises:
        LightningDiTError: the system refuses to write.
    """
    target = Path(path)
    with disk_errors(target):
        with contextlib.suppress(FileExistsError):  # of a file; the next line says what is wrong
            target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            if not temporary.is_symlink():  # the mode of the file that it leads to is not ours
                temporary.chmod(0o666 & ~_umask())
            if aside is not None:
                target.replace(aside)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, by `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of `atomic_path(path)`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn an operating system's error while `path` is written into one line."""
    try:
        yield
    except OSError as error:
        fix = OS_FIXES.get(error.errno or 0, "write to another folder")
        raise LightningDiTError(f"{path} cannot be written ({error.strerror or error})", fix) from error


def bring_to_disk(path: Path) -> None:
    """Wait until the disk holds what was written to a file."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def free_name(path: Path, tag: str) -> Path:
    """Return the first of NAME.tag-1, NAME.tag-2, ... that is not taken."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.{tag}-{number}")):
        number += 1
    return path.with_name(f"{path.name}.{tag}-{number}")


def rename_command(path: Path, ending: str) -> str:
    """Return the command that moves a file or folder out of the way."""
    return shlex.join(["mv", str(path), f"{path}{ending}"])


def require_writable(folder: Path) -> None:
    """Raise LightningDiTError if `folder` (or the nearest parent that exists) takes no new file."""
    parent = _existing(folder)
    if not parent.is_dir():
        raise LightningDiTError(f"{parent} is a file, a folder was expected", rename_command(parent, ".old"))
    # os.access alone says yes to root on a read-only file system and to some network disks
    with disk_errors(parent), tempfile.TemporaryFile(dir=parent):
        pass


def check_target(file: Path) -> None:
    """Raise LightningDiTError if `file` cannot be written because it, or its folder, is of the other kind."""
    if file.is_dir():
        raise LightningDiTError(
            f"{file} is a folder; a file to write is expected", f"name a file, such as {file}/samples.npz"
        )
    parent = _existing(file.absolute().parent)
    if not parent.is_dir():
        raise LightningDiTError(f"{file} cannot be written ({parent} is a file)", "name a file in a folder")


def _existing(folder: Path) -> Path:
    """Return `folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


# ---- locks

LOCK = ".lock"  # stays, empty: a lock that is removed is one that two runs can hold


@contextlib.contextmanager
def held_folder(folder: Path, what: str) -> Iterator[None]:
    """Make `folder` and keep other processes out of it until the block or this process ends.

    Args:
        what: the work that others would do there, for the message.

    Raises:
        LightningDiTError: another process holds it, or it cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # a file of its own: a lock on the manifest would go when a new one replaces it
        opened = (folder / LOCK).open("a+b")
    with opened:
        if not try_lock(opened):
            raise LightningDiTError(
                f"another {what} writes into {folder}", "wait for its end, or choose another --output"
            )
        yield


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or this process ends; return False if another process holds it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and network disks without locks: two runs there do double work
        return True
    return True


# ---- fingerprints

FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 64, 2**16


def fingerprint(path: str | Path) -> str:
    """Return a short text that changes with a file's content: a hash of its size and of 64 samples.

    A file of up to 4 MiB is read whole; one of 6 GB is answered at once.
    """
    file = Path(path)
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for index in range(FINGERPRINT_SAMPLES):
            stream.seek(index * max(0, size - FINGERPRINT_BYTES) // (FINGERPRINT_SAMPLES - 1))
            digest.update(stream.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]


# ---- free space

BYTES_PER_PIXEL = 3  # an upper bound of what a PNG of photographs takes


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def require_space(folder: Path, needed: int, what: str, fix: str) -> None:
    """Raise LightningDiTError if the disk of `folder` has fewer than `needed` bytes free.

    Args:
        what: what is written, in the plural.
    """
    free = free_bytes(folder)
    if needed > free:
        raise LightningDiTError(
            f"{what} may take {format_bytes(needed)}, and {folder} has {format_bytes(free)} free", fix
        )


def check_space(folder: Path, images: int, side: int) -> None:
    """Raise LightningDiTError if images of `side` pixels might not fit the disk."""
    fix = "ask for fewer images or choose another --output"
    require_space(folder, images * side * side * BYTES_PER_PIXEL, f"{images} images", fix)
