"""The versions here beside the tested ranges: what the installed package requires, or a clone's pyproject.toml."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_text

DISTRIBUTION = "lightningdit-runnable"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Requirement:
    """A package with its tested range.

    Attributes:
        tested: as ">=2.2.0,<2.15".
        extras: that need it; empty if everything does.
        installed: the version here; None if it is absent.
    """

    name: str
    tested: str
    extras: tuple[str, ...]
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is here in a version inside the range."""
        return self.installed is not None and inside(self.installed, self.tested)

    @property
    def fix(self) -> str:
        """The command that installs a version of the range."""
        return f"python -m pip install '{self.name}{self.tested}'"


def requirements() -> list[Requirement]:
    """Return the packages that the library can use, those that everything needs first.

    Raises:
        LightningDiTError: this is neither a clone nor an installed package.
    """
    lines = _of_clone() if PYPROJECT.is_file() else _of_package()
    found: dict[str, tuple[str, list[str]]] = {}
    for name, tested, extra in lines:
        found.setdefault(name, (tested, []))[1].append(extra)
    return [
        Requirement(name, tested, tuple(filter(None, extras)), installed_version(name))
        for name, (tested, extras) in found.items()
    ]


def _of_package() -> Iterator[tuple[str, str, str]]:
    """Yield name, range and extra of each requirement in the metadata of the installed package."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        raise LightningDiTError(
            f"{DISTRIBUTION} is not installed, and {PYPROJECT} is not there", "fetch the project again (git clone)"
        ) from error
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        yield from _split([requirement], extra[1] if extra else "")


def _of_clone() -> Iterator[tuple[str, str, str]]:
    """Yield the same from pyproject.toml, which has each requirement in a line of its own."""
    extra = ""
    for line in read_text(PYPROJECT).splitlines():
        if table := re.match(r"(\w+) = \[$", line):
            extra = "" if table[1] == "dependencies" else table[1]
        yield from _split(re.findall(r'^ {4}"(.*?)"', line), extra)


def _split(requirements: Iterable[str], extra: str) -> Iterator[tuple[str, str, str]]:
    for requirement in requirements:
        if match := re.fullmatch(r"\s*([\w.-]+)\s*([<>=][^\[\]]*)", requirement):
            bounds = sorted(match[2].replace(" ", "").split(","), reverse=True)  # the lower one first
            yield match[1], ",".join(bounds), extra


def installed_version(name: str) -> str | None:
    """Return the version of a distribution by its metadata, without an import; None if it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def inside(version: str, tested: str) -> bool:
    """Return whether a version lies in a range of the form ">=A,<B"; what follows its numbers does not count."""
    lower, upper = (_numbers(bound.lstrip("<>=")) for bound in tested.split(","))
    return lower <= _numbers(version) < upper


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without zeros at their end: (2, 2) for "2.2.0+cu121"."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
