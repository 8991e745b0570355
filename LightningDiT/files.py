"""The one gate to the disk, by the standard library alone: reading, writing, locks, fingerprints and free space.

Reading takes regular files only and never waits for a pipe or a device. Writing makes a new file beside the target and
renames it over the target; the last component of a path is never followed, links among its parents are. A test walks
the code for other ways to open and write (tests/test_files.py); docs/trust.md says what is promised.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from LightningDiT.console import format_bytes
from LightningDiT.errors import OS_FIXES, LightningDiTError

# Flags that not every system has: without them a pipe or a link is found by its kind alone.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISLNK, "link"),
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "device"),
)


def kind_of(path: str | Path) -> str | None:
    """Return "file", "link", "folder", "pipe", "socket" or "device"; None if nothing has the name."""
    try:
        return _kind(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str:
    return next((name for test, name in KINDS if test(mode)), "special file")


# ---- reading

MOST_TEXT = 2**26  # bytes of a text, JSON or YAML file


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a regular file, or a link to one, for reading, without waiting for the other end of a pipe.

    Raises:
        OSError: it cannot be opened; its `strerror` says so if it is a folder, pipe, socket or device.
    """
    handle = os.open(path, _READ)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(number, f"a {_kind(mode)}, a file was expected", str(path))


def require_regular(path: str | Path) -> None:
    """Raise OSError unless `path` is a regular file, or a link to one, that can be opened: for readers that open a path
    themselves.
    """
    open_regular(path).close()


def require_unicode(path: str | Path) -> None:
    """Raise LightningDiTError for a path that is no UTF-8, which the readers of tensors do not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        text = str(path).encode("utf-8", "backslashreplace").decode()
        raise LightningDiTError(f"the path {text} is no UTF-8, which files of tensors need", "rename that") from None


def read_bytes(path: str | Path, at_most: int = MOST_TEXT) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: see `open_regular`; or the file has more than `at_most` bytes.
    """
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EINVAL, f"larger than {format_bytes(at_most)}", str(path))
    return content


def read_text(path: str | Path, at_most: int = MOST_TEXT, encoding: str = "utf-8", errors: str = "strict") -> str:
    """Return a text with the line ends of Python; raises as `read_bytes`, or UnicodeDecodeError."""
    text = read_bytes(path, at_most).decode(encoding, errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, at_most: int = MOST_TEXT) -> Any:
    """Return the content of a JSON file; raises as `read_text`, or ValueError, also for nesting without end."""
    try:
        return json.loads(read_text(path, at_most))
    except RecursionError:
        raise ValueError("nested too deeply") from None


# ---- writing

#: Ending of the names of files that are being written: `.NAME.RANDOM.lightningdit.tmp`.
UNFINISHED = ".lightningdit.tmp"
MARKED = 2**12  # bytes at the beginning of a file in which a mark of this program may stand
WITHOUT_LOCKS = 3600.0  # seconds without a change after which a leftover on a disk without locks is one
if TYPE_CHECKING:
    #: Whether a file that is there was written by this program and may be replaced.
    Ours = Callable[[Path], bool]


@contextlib.contextmanager
def atomic_path(
    path: str | Path, aside: Path | None = None, ours: Ours | None = None, over_link: bool = False
) -> Iterator[Path]:
    """Give an empty file beside `path`, which takes its place if the block ends without an error.

    Args:
        aside: new name of the file, link or folder that was there.
        ours: refuse to replace a file for which it is false; an empty file holds nothing and may go.
        over_link: replace a link, as one that this program made; what it leads to stays.

    Raises:
        LightningDiTError: the system refuses to write; or a link, folder, pipe, socket or device has the name.
    """
    target = Path(path)
    with disk_errors(target):
        with contextlib.suppress(FileExistsError):  # of a file; the next line says what is wrong
            target.parent.mkdir(parents=True, exist_ok=True)
        require_replaceable(target, aside is not None, ours, over_link)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=UNFINISHED, dir=target.parent)
        temporary = Path(name)
        try:
            _lock(handle)  # until the end, so that `remove_leftovers` knows the file for one in use
            yield temporary
            if not temporary.is_symlink():  # the mode of the file that it leads to is not ours
                temporary.chmod(0o666 & ~_umask())
            require_replaceable(target, aside is not None, None, over_link)
            if os.name == "nt":  # where open files have no new names
                os.close(handle)
                handle = -1
            if aside is not None:
                target.replace(aside)
            temporary.replace(target)
        finally:
            if handle >= 0:
                os.close(handle)
            temporary.unlink(missing_ok=True)


def require_replaceable(target: Path, aside: bool = False, ours: Ours | None = None, over_link: bool = False) -> None:
    """Raise LightningDiTError unless a new file may take the name `target`.

    Args:
        aside: what is there gets another name; links and folders can have one too.
        ours, over_link: see `atomic_path`.
    """
    kind = kind_of(target)
    if kind is None or (kind == "file" and (ours is None or not os.lstat(target).st_size or ours(target))):
        return
    if (aside and kind in ("file", "link", "folder")) or (over_link and kind == "link"):
        return
    what = "this program did not write the one that is there" if kind == "file" else f"it is a {kind}"
    other = f"name another file, or {rename_command(target, '.old')}" if kind != "device" else "name another file"
    raise LightningDiTError(f"{target} cannot be written ({what})", other)


def refuse_inputs(target: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raise LightningDiTError if a file to write is one of those that the command reads, under whatever name.

    Args:
        inputs: None, folders and names of nothing are passed over.
    """
    for path in inputs:
        if path and target.is_file() and Path(path).is_file() and Path(path).samefile(target):
            raise LightningDiTError(f"{target} cannot be written (it is an input of this command)", "name another file")


def holding(*marks: str) -> Ours:
    """Return a test that is true of a file that has one of these texts in its first `MARKED` bytes: a mark of ours."""

    def test(path: Path) -> bool:
        with contextlib.suppress(OSError), open_regular(path) as file:
            head = file.read(MARKED)
            return any(mark.encode() in head for mark in marks)
        return False

    return test


def json_with(*keys: str) -> Ours:
    """Return a test that is true of a JSON file whose object has all these keys: a report of ours."""

    def test(path: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            content = read_json(path)
            return isinstance(content, dict) and content.keys() >= {*keys}
        return False

    return test


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str, ours: Ours | None = None) -> None:
    """Write a text file in UTF-8, by `atomic_path`."""
    with atomic_path(path, ours=ours) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names in folders may be no Unicode


def append_text(path: Path, text: str) -> None:
    """Add text in UTF-8 to a file that grows where it is; see `open_own`."""
    with disk_errors(path), open_own(path) as file:
        view = memoryview(text.encode())
        while view:
            view = view[file.write(view) :]


def open_own(path: Path, shared: bool = False) -> IO[bytes]:
    """Open a file that grows where it is (a log, a part of a download), or make it: read, append and cut, unbuffered.

    Args:
        shared: a second name (hard link) does no harm, because nothing is written.

    Raises:
        LightningDiTError: it cannot be written, or it is a link, has a second name, or is no regular file.
    """
    with disk_errors(path):
        if kind_of(path) not in (None, "file"):  # says what it is; the flags below hold if it changes meanwhile
            require_replaceable(path)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _NO_FOLLOW, 0o666)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or (found.st_nlink > 1 and not shared):
        os.close(handle)
        fix = " && ".join(
            shlex.join(row) for row in (["cp", f"{path}", f"{path}.copy"], ["mv", f"{path}.copy", f"{path}"])
        )
        raise LightningDiTError(f"{path} cannot be written (the same file has another name elsewhere)", fix)
    return os.fdopen(handle, "ab+", buffering=0)


def remove_leftovers(folder: Path, alone: bool = False) -> None:
    """Remove what killed processes left of `atomic_path` in `folder`; files in use are locked and stay.

    Also remove the files without locks that safetensors (0.8) renames over those of `atomic_path`.

    Args:
        alone: no other process writes there; else they go an hour after their last change.
    """
    for left in folder.glob(f".*.????????{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if _is_left(left):
                left.unlink()
    for left in folder.glob(".tmp??????"):
        with contextlib.suppress(OSError):
            old = time.time() - os.lstat(left).st_mtime > WITHOUT_LOCKS
            if (alone or old) and kind_of(left) == "file" and _begins_as_tensors(left):
                left.unlink()


def _begins_as_tensors(path: Path) -> bool:
    """Tell whether a file is empty or begins as safetensors: a length in eight bytes, then JSON."""
    with open_regular(path) as file:
        head = file.read(10)
    return not head.strip(b"\0") or head[8:] == b'{"'


def _is_left(path: Path) -> bool:
    if path.is_symlink():
        return True
    with os.fdopen(os.open(path, os.O_RDWR | _NO_FOLLOW), "rb+", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return False
        locked = _lock(file.fileno())
        return time.time() - os.fstat(file.fileno()).st_mtime > WITHOUT_LOCKS if locked is None else locked


def set_aside(path: Path, tag: str) -> Path:
    """Rename a file, link or folder to the first free NAME.tag-N, and return that.

    Raises:
        LightningDiTError: it is a device, pipe or socket, or the system refuses.
    """
    require_replaceable(path, aside=True)
    aside = free_name(path, tag)
    with disk_errors(path):
        path.replace(aside)
    return aside


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
    """Return the command that moves a file or folder out of the way, or shows what nobody should move."""
    if kind_of(path) in ("device", "pipe", "socket"):
        return shlex.join(["ls", "-l", str(path)])
    return shlex.join(["mv", str(path), f"{path}{ending}"])


def require_writable(folder: Path) -> None:
    """Raise LightningDiTError if `folder` (or the nearest parent that exists) takes no new file."""
    parent = _existing(folder)
    if not parent.is_dir():
        kind = _kind(parent.stat().st_mode)
        raise LightningDiTError(f"{parent} is a {kind}, a folder was expected", rename_command(parent, ".old"))
    # os.access alone says yes to root on a read-only file system and to some network disks
    with disk_errors(parent), tempfile.TemporaryFile(dir=parent):
        pass


def check_target(file: Path, ours: Ours | None = None) -> None:
    """Raise LightningDiTError if `file` or its folder is of a kind that cannot be written; see `atomic_path`."""
    if file.is_dir():
        raise LightningDiTError(
            f"{file} is a folder; a file to write is expected", f"name a file, such as {file}/samples.npz"
        )
    parent = _existing(file.absolute().parent)
    if not parent.is_dir():
        raise LightningDiTError(f"{file} cannot be written ({parent} is a file)", "name a file in a folder")
    require_replaceable(file, ours=ours)


def _existing(folder: Path) -> Path:
    """Return `folder`, or the nearest of its parents that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


# ---- locks

LOCK = ".lock"  # stays, empty: a lock that is removed is one that two runs can hold


@contextlib.contextmanager
def held_folder(folder: Path, what: str) -> Iterator[None]:
    """Make `folder`, keep other processes out of it until the block or this process ends, and remove leftovers.

    Args:
        what: the work that others would do there, for the message.

    Raises:
        LightningDiTError: another process holds it, or it cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # a file of its own: a lock on the manifest would go when a new one replaces it
    with open_own(folder / LOCK, shared=True) as opened:
        if not try_lock(opened):
            raise LightningDiTError(
                f"another {what} writes into {folder}", "wait for its end, or choose another --output"
            )
        remove_leftovers(folder, alone=True)
        yield


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or this process ends; return False if another process holds it."""
    return _lock(file.fileno()) is not False


def _lock(handle: int) -> bool | None:
    """Return whether the lock is ours; None without locks (Windows, some network disks), where two runs do double
    work.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


# ---- fingerprints

FINGERPRINT_SAMPLES, FINGERPRINT_BYTES = 64, 2**16


def fingerprint(path: str | Path) -> str:
    """Return a short text that changes with a file's content: a hash of its size and of 64 samples.

    A file of up to 4 MiB is read whole; one of 6 GB is answered at once.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        found = hashlib.sha256(str(size).encode())
        for index in range(FINGERPRINT_SAMPLES):
            stream.seek(index * max(0, size - FINGERPRINT_BYTES) // (FINGERPRINT_SAMPLES - 1))
            found.update(stream.read(FINGERPRINT_BYTES))
    return found.hexdigest()[:16]


def digest(path: str | Path) -> str:
    """Return the sha256 of a whole file, in hexadecimal."""
    found = hashlib.sha256()
    with open_regular(path) as stream:
        while True:
            chunk = stream.read(2**20)
            if not chunk:
                return found.hexdigest()
            found.update(chunk)


# ---- free space

BYTES_PER_PIXEL = 3  # upper bound for a PNG of photographs


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def memory_bytes() -> int | None:
    """Return the memory of this machine, or the limit of its container; None if unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


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
