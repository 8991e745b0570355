"""The one exception for what a user can cause and fix, its fix in Chinese, and the one way to warn."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import json
import pkgutil
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
#: What joins two fixes in one line, in English and in Chinese.
JOINTS = {", or ": "，或", "; or ": "；或", ", then ": "，然后", ", and ": "，并", "; ": "；"}
#: The beginning of a fix that is a command.
COMMAND = re.compile(
    r"!?([A-Z_]+=\S+ )?('[^']*python[^' ]*'|\S*python[\w.]*|pip|git|mv|ren|cp|rm|mkdir|ls|dir|chmod|unset"
    r"|export|%env|cd|curl|torchrun|nvidia-smi|lightningdit) "
)
#: Words and signs of sentences, which stand neither in a command outside quotes nor, the words, in a value.
WORDS = r"(?<!\S)(?:a|an|and|as|by|for|in|is|it|of|on|one|or|that|the|then|to|with) "
SIGNS = r"[,;:(]( |$)| \("


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


def in_chinese(fix: str) -> str | None:
    """Return a fix in Chinese by the catalogue `fixes_zh.json`, or None for a text that it does not have.

    A row of the catalogue is an English text and its Chinese one, both with `{}` for each value; `{1}` and `{0}` if
    Chinese has the values in another order. Of the rows that fit, the one with the longest text counts. A command needs
    no row, nor does a fix whose parts (see JOINTS) have theirs.
    """
    whole = _whole_in_chinese(fix)
    if whole:
        return whole
    for joint in re.finditer("|".join(JOINTS), fix):
        first = _whole_in_chinese(fix[: joint.start()])
        rest = first and in_chinese(fix[joint.end() :])
        if rest:
            return f"{first}{JOINTS[joint[0]]}{rest}"
    return None


def _whole_in_chinese(fix: str) -> str | None:
    fitting = [(row, values) for row in _catalogue() for values in [_pattern(row).fullmatch(fix)] if values]
    if fitting:
        row, values = max(fitting, key=lambda pair: len(pair[0].replace("{}", "")))
        return _catalogue()[row].format(*values.groups())
    is_command = COMMAND.match(fix) and not re.search(f"{WORDS}|{SIGNS}", re.sub("'[^']*'", "", fix))
    return f"运行 {fix}" if is_command else None


@functools.cache
def _catalogue() -> dict[str, str]:
    return json.loads(pkgutil.get_data("LightningDiT", "fixes_zh.json") or "{}")


@functools.cache
def _pattern(row: str) -> re.Pattern[str]:
    """Return the pattern of a row's English text, whose values are no sentences."""
    value = f"((?:(?!{'|'.join(JOINTS)}|{WORDS}).)+)"
    return re.compile(value.join(map(re.escape, row.split("{}"))), re.DOTALL)


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
