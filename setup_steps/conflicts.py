"""What the other installed packages require, and what of it an installation broke."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Set
from importlib import metadata
from types import ModuleType

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def who_needs(name: str, present: str, instead: str, leaving: Set[str]) -> str:
    """Return which installed distribution requires `name` in a way that version `present` meets and `instead` does not,
    as "transformers 4.57.1 requires huggingface-hub<1.0,>=0.34.0"; empty if none does.

    Args:
        leaving: distributions that do not count, because they are replaced themselves.
    """
    requirements = _requirements_module()
    if requirements is None:
        return ""
    without = {canonical(one) for one in leaving}
    for holder_name, holder in _distributions().items():
        for text in () if canonical(holder_name) in without else holder.requires or ():
            match = _NAME.match(text)
            if match is None or canonical(match[0]) != canonical(name):
                continue
            try:
                needed = requirements.Requirement(text)
                applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
                met, then = (needed.specifier.contains(one, prereleases=True) for one in (present, instead))
            except ValueError:  # what pip passes over, too
                continue
            if applies and met and not then:
                return f"{holder_name} {holder.version} requires {match[0]}{needed.specifier}"
    return ""


def canonical(name: str) -> str:
    """Return the one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def speaks_of(conflict: str, name: str) -> bool:
    """Return whether a line of `pip check` names a distribution."""
    return canonical(name) in map(canonical, _NAME.findall(conflict))


def _distributions() -> dict[str, metadata.Distribution]:
    """Return each installed distribution by name: the first on the path, which is the one that imports."""
    found: dict[str, metadata.Distribution] = {}
    for one in metadata.distributions():
        with contextlib.suppress(UnicodeError, KeyError):
            if name := one.metadata["Name"]:  # damaged metadata have none
                found.setdefault(name, one)
    return found


def _requirements_module() -> ModuleType | None:
    """Return the module that reads requirements: that of `packaging`, or of pip's own copy; None if neither is here."""
    try:
        from packaging import requirements
    except ImportError:
        try:
            from pip._vendor.packaging import requirements
        except ImportError:
            return None
    return requirements


def broken_requirements() -> dict[str, str]:
    """Return the lines of `pip check`, each by the requirement that is not met; none without pip."""
    command = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    lines = done.stdout.splitlines() if done.returncode else ()
    return {line.partition(", but you have ")[0]: line for line in lines}
