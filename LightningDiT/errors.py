"""The one exception for what a user can cause and fix, the one way to warn, and what both need to speak in one line."""

from __future__ import annotations

import contextlib
import errno
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

#: Fixes for what the operating system refuses, by error number.
OS_FIXES = {
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to, or copy the project to one"
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space on that disk, then run the command again"),
}
#: Words of torch's, oneDNN's and the system's errors for an allocation or a mapping that failed.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|not enough memory|out of memory|ALLOC_FAILED|Cannot allocate memory|bad_alloc|bad allocation"
    r"|could not create a (primitive|memory( object)?)$",
    re.MULTILINE,
)


class LightningDiTError(Exception):
    """A wrong file, value or setting, said in one line.

    Args:
        message: names the wrong value and the expected one.
        fix: the command or edit that puts it right, shown behind the message.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message}; fix: {fix}" if fix else message)


def warn_user(message: str) -> None:
    """Warn at the line outside the library and torch that led here, however many calls lie between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("LightningDiT", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on the CPU or on a GPU, by its type or its words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's for GPUs
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    has_words = isinstance(error, (RuntimeError, OSError)) or type(error).__name__ == "SafetensorError"
    return has_words and bool(OUT_OF_MEMORY.search(str(error)))


def first_line(error: object) -> str:
    """Return the first line of an error's text, or its class name, in at most 160 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


@contextlib.contextmanager
def fixed_by(fix: str) -> Iterator[None]:
    """Give a LightningDiTError of the block another fix."""
    try:
        yield
    except LightningDiTError as error:
        raise LightningDiTError(error.message, fix) from error


def import_package(name: str, purpose: str, pin: str) -> ModuleType:
    """Return the module `name` of an optional package.

    Args:
        purpose: what the package computes, for the message.
        pin: the package with its version, as pip takes it.

    Raises:
        LightningDiTError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = pin.partition("==")[0]
        raise LightningDiTError(
            f"{package}, which computes {purpose}, is missing ({error})", f"pip install {pin}"
        ) from error
