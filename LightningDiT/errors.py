"""The one exception that the library raises for what a user can cause and fix, and the one way it warns."""

import sys
import warnings


class LightningDiTError(Exception):
    """A wrong file, value or setting, said in one line.

    Args:
        message: names the value that is wrong and what was expected instead.
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
