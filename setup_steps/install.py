"""What step 1 compares and installs: pins, tested ranges, installed versions, constraints, permission to install."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from LightningDiT.console import format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_bytes, read_text
from setup_steps import conflicts, pip_calls
from setup_steps.machine import UNKNOWN, installed_version, lacks_record
from setup_steps.pip_calls import InstallError, Source, again, in_own_venv
from setup_steps.project import interpreter
from setup_steps.releases import KEEP, REPLACE, Decision, public, vision_of

#: Bytes that an installation takes in the folder of the packages and, meanwhile, in that for temporary files.
TORCH_DISK = (6_000_000_000, 3_000_000_000)  # torch with its GPU libraries
OTHER_DISK = (700_000_000, 300_000_000)
UNPACKED = 3  # most bytes of a wheel's content per byte of the wheel
HELD = ("torch", "torchvision", "numpy")  # compiled modules that must not change under a process
#: What does not work without a package. Steps 2 to 4 run without these; they need all others of requirements.txt.
USES = {
    "torchvision": "the data sets of torchvision, the models of timm and the evaluation do not work",
    "torchdiffeq": "its solvers (midpoint, rk4, dopri5 and others) do not work; fast, published, euler and ab3 do",
    "timm": "the published weights, which take ImageNet's class names from it, and vision models do not work",
    "huggingface_hub": "step 2 downloads nothing; it takes the files that are attached or in models/",
    "accelerate": "several processes at once (torchrun) do not work",
    "torch-fidelity": "the evaluation by Inception (FID, IS, precision, recall) does not work",
}
_RANGE = re.compile(r"\s*\"(?P<name>[A-Za-z0-9_.-]+)(?P<tested>>=[0-9.]+,<[0-9.]+)\",?")
_RELEASE = re.compile(r"(?P<numbers>\d+(?:\.\d+)*)(?P<early>[._-]?(?:a|b|c|rc|alpha|beta|pre|preview|dev))?")
_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9_.-]+)==(?P<version>[A-Za-z0-9_.+!-]+)"
    r"(?:\s*;\s*python_version\s*(?P<sign>>=|<)\s*[\"'](?P<major>\d+)\.(?P<minor>\d+)[\"'])?"
)


@dataclass(frozen=True)
class Pin:
    """One requirement: a distribution and its version."""

    name: str
    version: str


@dataclass(frozen=True)
class Row:
    """One distribution: the version that this machine needs, and the installed one.

    Args:
        pinned: the version in the requirements file.
        wanted: a version, "0.29.*" or ">=1.26.4,<2"; it differs from the pinned one if the torch here needs that.
        installed: None if it is absent.
        tested: the tested range, ">=2.2.0,<2.15"; empty if only the wanted version will do.
        fault: why it will not do although the version does; empty if it will.
        kept: why it stays although its version is outside the tested range; empty if it does not.
    """

    name: str
    pinned: str
    wanted: str
    installed: str | None
    tested: str = ""
    fault: str = ""
    kept: str = ""

    @property
    def as_wanted(self) -> bool:
        """Whether it has the very version that pip would install."""
        return self.installed is not None and satisfies(self.installed, self.wanted)

    @property
    def in_range(self) -> bool:
        """Whether it has a tested version."""
        return self.installed is not None and (not self.tested or satisfies(self.installed, self.tested))

    @property
    def will_do(self) -> bool:
        """Whether the version will do: the wanted one, or a tested one if this machine needs no particular one."""
        return self.as_wanted or bool(self.tested and self.wanted == self.pinned and self.in_range)

    @property
    def met(self) -> bool:
        """Whether nothing is to be installed."""
        return (self.will_do or bool(self.kept)) and not self.fault

    @property
    def works(self) -> bool:
        """Whether some version is there and imports."""
        return self.installed is not None and not self.fault

    @property
    def needed(self) -> bool:
        """Whether steps 2 to 4 import it."""
        return self.name not in USES

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return self.name + ("" if self.wanted.startswith((">", "<")) else "==") + self.wanted

    @property
    def state(self) -> str:
        """The state in words for a person."""
        if self.fault:
            return f"not usable: {self.fault}"
        if self.installed is None:
            return f"{self.requirement} is wanted" + " (not needed by steps 2 to 4)" * (not self.needed)
        if not self.in_range:
            return f"outside the tested range {self.tested}" + f", stays: {self.kept}" * bool(self.kept)
        if not self.met:
            return f"{self.requirement} is wanted"
        usual = self.wanted == self.pinned or satisfies(self.installed, self.pinned)
        return "right" if usual else f"right on this machine ({self.pinned} is pinned)"

    @property
    def warning(self) -> str:
        """What does not work or is not tested and what would fix that, in one line; empty if all is well."""
        mend = f"{interpreter()} -m pip install {shlex.quote(self.requirement)}"
        if self.works:
            place = "here" if self.in_range else f"outside the tested range {self.tested}"
            doubt = f"{self.name} {self.installed} is {place}"
            if self.kept:
                return f"{doubt} and stays, because {self.kept}; fix: {pip_calls.in_own_venv()}"
            return "" if self.met else f"{doubt} and imports, {self.requirement} is wanted; fix: {mend}"
        lack = f"{self.name} does not import ({self.fault})" if self.fault else f"{self.name} is missing"
        return f"{lack}: {USES.get(self.name, 'steps 2 to 4 do not work')}; fix: {mend}"

    @property
    def constraint(self) -> str:
        """The line that holds it at its version, or at the wanted one."""
        return f"{self.name}=={self.installed}" if self.met else self.requirement


def satisfies(version: str, wanted: str) -> bool:
    """Return whether a version is the wanted release, a build of it, or within "0.29.*", "<2" or ">=1.26.4,<2"."""

    def holds(clause: str) -> bool:
        if clause.startswith(">="):
            return _order(version) >= _order(clause[2:])
        if clause.startswith("<"):  # an early version of a release is not below that release, as pip has it
            return () < _order(version)[0] < _order(clause[1:])[0]
        if clause.endswith(".*"):
            return f"{public(version)}.".startswith(clause[:-1])
        return public(version) == clause

    return all(holds(clause) for clause in wanted.split(","))


def _order(version: str) -> tuple[tuple[int, ...], bool]:
    """Return the numbers of a version without zeros at the end, and whether it is no early version of this release;
    versions compare as these do.
    """
    match = _RELEASE.match(version)
    if match is None:
        return (), False
    numbers = [int(number) for number in match["numbers"].split(".")]
    while numbers[1:] and not numbers[-1]:
        numbers.pop()
    return tuple(numbers), not match["early"]


def read_ranges(path: Path) -> dict[str, str]:
    """Return by name the tested ranges (">=2.2.0,<2.15") of a pyproject.toml, which has each in a line of its own; no
    Python before 3.11 reads TOML.

    Raises:
        LightningDiTError: the file is absent or has no range.
    """
    lines = read_text(path).splitlines() if path.is_file() else ()
    matches = [_RANGE.fullmatch(line) for line in lines]
    ranges = {match["name"]: match["tested"] for match in matches if match}
    if not ranges:
        fault = "has no tested range" if path.is_file() else "is not there"
        raise LightningDiTError(f"{path} {fault}", "fetch the project again (git clone)")
    return ranges


def read_pins(path: Path, python: tuple[int, int] | None = None) -> list[Pin]:
    """Read NAME==VERSION lines, `-r FILE` lines and python_version markers.

    Args:
        path: a requirements file of this project.
        python: (major, minor) for the markers; this interpreter's by default.

    Raises:
        LightningDiTError: the file is absent or a line has another form.
    """
    here = python or sys.version_info[:2]
    if not path.is_file():
        raise LightningDiTError(f"{path} is not there", "fetch the project again (git clone)")
    pins: list[Pin] = []
    for number, text in enumerate(read_text(path).splitlines(), 1):
        line = text.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("-r "):
            pins += read_pins(path.parent / line[3:].strip(), python)
            continue
        match = _PIN.fullmatch(line)
        if not match:
            raise LightningDiTError(
                f"{path}:{number}: {line!r} is no pin, NAME==VERSION was expected",
                f"put the line right, then {again()}",
            )
        if match["sign"]:
            newer = here >= (int(match["major"]), int(match["minor"]))
            if newer != (match["sign"] == ">="):
                continue
        pins.append(Pin(match["name"], match["version"]))
    return pins


def pinned(pins: list[Pin], name: str, source: Path) -> str:
    """Return the version of a pin; raise LightningDiTError if no pin has this name."""
    for pin in pins:
        if pin.name == name:
            return pin.version
    raise LightningDiTError(f"{source} pins no {name}", "fetch the project again (git clone)")


def make_rows(
    pins: list[Pin], decision: Decision, faults: dict[str, str], ranges: Mapping[str, str] | None = None
) -> list[Row]:
    """Compare pins with what is installed; torch and the packages that go with it are as decided.

    Args:
        faults: why an installed distribution does not import, by name; empty if it does.
        ranges: versions that will do as well as the pinned one, by name; by default none will.
    """
    decided = {"torch": decision.torch, "torchvision": decision.torchvision, "numpy": decision.numpy}
    rows = []
    for pin in pins:
        wanted, installed = decided.get(pin.name) or pin.version, installed_version(pin.name)
        tested = (ranges or {}).get(pin.name, "")
        row = Row(pin.name, pin.version, wanted, installed, tested, faults.get(pin.name, ""))
        rows.append(_as_decided(row, decision))
    leaving = {row.name for row in rows if not row.met}
    return [_unless_others_need_it(row, leaving) for row in rows]


def _as_decided(row: Row, decision: Decision) -> Row:
    """Return the row of torch, torchvision or numpy with what the decision about torch means for it."""
    if row.name == "numpy" and decision.numpy:
        row = replace(row, wanted=f"{row.tested.split(',')[0]},{decision.numpy}".lstrip(","))
        if row.works and not satisfies(str(row.installed), decision.numpy):
            return replace(row, fault=f"torch {decision.torch} works with numpy{decision.numpy} alone")
    if row.name == "torchvision" and not satisfies(row.installed or "", vision_of(decision.torch)):
        row = replace(row, tested="")  # it belongs to another torch
    if row.name in ("torch", "torchvision"):
        if decision.action == REPLACE and row.met:  # the right version, but not the build for this machine
            return replace(row, fault=decision.reason)
        if decision.action == KEEP and row.works and not row.in_range and row.installed != UNKNOWN:
            return replace(row, kept="it works on this machine")
    return row


def _unless_others_need_it(row: Row, leaving: Set[str]) -> Row:
    """Return a row whose version stays if the wanted one breaks what another package requires that itself stays."""
    if row.met or row.in_range or not row.works or row.wanted != row.pinned:
        return row
    return replace(row, kept=conflicts.who_needs(row.name, str(row.installed), row.wanted, leaving))


def constraint_text(rows: list[Row]) -> str:
    """Return constraints for all versions, kept ones included, so that no dependency brings another torch."""
    head = "# The versions that this environment is held to: python -m pip install -c THIS_FILE NAME\n"
    return head + "".join(f"{row.constraint}\n" for row in rows)


def refuse_unfit_process(rows: list[Row]) -> None:
    """Raise LightningDiTError if packages must not be installed by this process: the system's package manager owns the
    interpreter (PEP 668), or a compiled package that this process has imported would be replaced, as with `%run` in a
    notebook.
    """
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    in_venv, overruled = sys.prefix != sys.base_prefix, os.environ.get("PIP_BREAK_SYSTEM_PACKAGES") == "1"
    if marker.is_file() and not in_venv and not overruled:
        raise LightningDiTError(
            f"{sys.executable} belongs to the operating system, packages must not be installed into it",
            f"{in_own_venv()}, or python quickstart.py",
        )
    held = [row.name for row in rows if not row.met and row.name in sys.modules and row.name in HELD]
    if held:
        raise LightningDiTError(
            f"{', '.join(held)} is imported in this process and cannot be replaced under it",
            f"restart the notebook's kernel, then !{again()} (with an exclamation mark, before any import)",
        )


def require_disk(rows: list[Row], source: Source) -> None:
    """Raise InstallError if the disks of the packages and of temporary files lack the space."""
    gpu_libraries = platform.system() == "Linux" and any(row.name == "torch" and not row.met for row in rows)
    amounts = TORCH_DISK if gpu_libraries else OTHER_DISK
    if source.wheel_bytes is not None:
        amounts = (min(amounts[0], UNPACKED * source.wheel_bytes), 0)  # local wheels are not copied first
    needed: dict[int, int] = {}
    for folder, amount in zip((_site(), Path(tempfile.gettempdir())), amounts, strict=True):
        disk = folder.stat().st_dev
        needed[disk] = needed.get(disk, 0) + amount
        if free_bytes(folder) < needed[disk]:
            raise InstallError(
                f"the packages need up to {format_bytes(needed[disk])} at {folder}, "
                f"{format_bytes(free_bytes(folder))} are free",
                f"free space there (or name a roomier folder for temporary files in TMPDIR), then {again()}",
            )


def _site() -> Path:
    """Return the folder of the packages, or the nearest parent that exists."""
    site = Path(sysconfig.get_path("purelib"))
    return next(folder for folder in (site, *site.parents) if folder.is_dir())


@dataclass(frozen=True)
class Call:
    """One call of pip: the rows that it installs, and options other than source and constraint."""

    wanted: list[Row]
    options: tuple[str, ...] = ()

    @property
    def requirements(self) -> list[str]:
        return [row.requirement for row in self.wanted]


def calls(rows: list[Row], forced: list[Row]) -> list[Call]:
    """Return the calls of pip, in turn, that meet every row.

    Args:
        forced: rows whose files are first installed again, whatever pip finds there; so are, over the old files, those
            that pip cannot uninstall.
    """
    lacking = [row for row in rows if not row.met]
    unrecorded = [row for row in lacking if lacks_record(row.name)]
    renewed = (
        Call(unrecorded, ("--ignore-installed", "--no-deps")),
        Call([row for row in forced if row not in unrecorded], ("--force-reinstall", "--no-deps")),
        Call(lacking),
    )
    return [call for call in renewed if call.wanted]


def put_right(rows: list[Row], forced: list[Row], sources: tuple[Source, ...]) -> None:
    """Install what is lacking; requirements and constraints together hold every version of the profile. Raise
    InstallError if the disk is too small or pip failed, then nothing has changed. For `forced` see `calls`.
    """
    pip_calls.require_pip()
    for source in sources:
        require_disk(rows, source)
        if all(_install(call, rows, source) for call in calls(rows, forced)):
            return
        print("The attached wheels do not suffice; asking the package index too")


def put_some_right(rows: list[Row], source: Source) -> None:
    """Install each lacking package alone, as far as the source has it; without torch, which goes with the others."""
    lacking = [row for row in rows if not row.met and row.name not in ("torch", "torchvision")]
    for row in lacking if len(lacking) > 1 else ():
        _install(Call([row], ("--retries", "0", "--timeout", "5")), rows, replace(source, last=False))


def _install(call: Call, rows: list[Row], source: Source) -> bool:
    """Make one call with all other rows held; return False if the source does not suffice."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        # pip tells an unavailable version from a conflict only if it is not constrained as well
        constraints.write_text(constraint_text([row for row in rows if row not in call.wanted]), encoding="utf-8")
        return pip_calls.pip_install(call.requirements, source, "--constraint", str(constraints), *call.options)
