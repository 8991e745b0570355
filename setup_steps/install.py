"""What step 1 compares and installs: pins, what is there, the constraints, and who may install where."""

from __future__ import annotations

import os
import platform
import re
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from setup_steps import pip_calls
from setup_steps.console import StepError, format_bytes
from setup_steps.machine import free_bytes, installed_version, lacks_record
from setup_steps.pip_calls import InstallError, Source, again, in_own_venv
from setup_steps.releases import REPLACE, Decision, public, version_pair

#: Bytes that an installation takes where the packages lie and, meanwhile, in the folder for temporary files.
TORCH_DISK = (6_000_000_000, 3_000_000_000)  # torch with its GPU libraries
OTHER_DISK = (700_000_000, 300_000_000)
UNPACKED = 3  # at most this many times a wheel's own size is taken by what it holds
HELD = ("torch", "torchvision", "numpy")  # compiled modules that must not change under a process
_PIN = re.compile(
    r"(?P<name>[A-Za-z0-9_.-]+)==(?P<version>[A-Za-z0-9_.+!-]+)"
    r"(?:\s*;\s*python_version\s*(?P<sign>>=|<)\s*[\"'](?P<major>\d+)\.(?P<minor>\d+)[\"'])?"
)


@dataclass(frozen=True)
class Pin:
    """One requirement: a distribution and the version that is wanted."""

    name: str
    version: str


@dataclass(frozen=True)
class Row:
    """One distribution: the version that is wanted on this machine, and the one that is there.

    Args:
        pinned: the version in the requirements file.
        wanted: a version, "0.29.*" or "<2"; another than the pinned one where the torch here asks for it.
        installed: None where it is absent.
        fault: why it will not do although the version does; empty where it will.
    """

    name: str
    pinned: str
    wanted: str
    installed: str | None
    fault: str = ""

    @property
    def as_wanted(self) -> bool:
        """True where the version will do."""
        return self.installed is not None and satisfies(self.installed, self.wanted)

    @property
    def met(self) -> bool:
        return self.as_wanted and not self.fault

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return self.name + ("" if self.wanted.startswith("<") else "==") + self.wanted

    @property
    def state(self) -> str:
        """What a person is told about it."""
        if self.fault:
            return f"not usable: {self.fault}"
        if not self.met:
            return f"{self.requirement} is wanted"
        same = satisfies(str(self.installed), self.pinned)
        return "right" if same else f"right on this machine ({self.pinned} is pinned)"

    @property
    def constraint(self) -> str:
        """The line that holds it where it is, or where it is to be."""
        return f"{self.name}=={self.installed}" if self.met else self.requirement


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is the wanted release, a build of it, or within "0.29.*" or "<2"."""
    if wanted.startswith("<"):
        return version_pair(version) < (int(wanted[1:]), 0)
    if wanted.endswith(".*"):
        return f"{public(version)}.".startswith(wanted[:-1])
    return public(version) == wanted


def read_pins(path: Path, python: tuple[int, int] | None = None) -> list[Pin]:
    """Read NAME==VERSION lines, `-r FILE` lines and python_version markers.

    Args:
        path: a requirements file of this project.
        python: (major, minor) that the markers are judged by; this interpreter's by default.

    Raises:
        StepError: the file is absent or a line has another form.
    """
    here = python or sys.version_info[:2]
    if not path.is_file():
        raise StepError(f"{path} is not there", "fetch the project again (git clone)")
    pins: list[Pin] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = text.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("-r "):
            pins += read_pins(path.parent / line[3:].strip(), python)
            continue
        match = _PIN.fullmatch(line)
        if not match:
            raise StepError(
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
    """The version that a pin names.

    Raises:
        StepError: no pin has this name.
    """
    for pin in pins:
        if pin.name == name:
            return pin.version
    raise StepError(f"{source} pins no {name}", "fetch the project again (git clone)")


def make_rows(pins: list[Pin], decision: Decision, faults: dict[str, str]) -> list[Row]:
    """Compare pins with what is installed; torch and what goes with it are as decided.

    Args:
        faults: why an installed distribution does not import, by name; empty where it does.
    """
    decided = {"torch": decision.torch, "torchvision": decision.torchvision, "numpy": decision.numpy}
    rows = []
    for pin in pins:
        wanted = decided.get(pin.name) or pin.version
        row = Row(pin.name, pin.version, wanted, installed_version(pin.name), faults.get(pin.name, ""))
        if row.name in ("torch", "torchvision") and decision.action == REPLACE and row.met:
            row = replace(row, fault=decision.reason)  # the right version, but not the build for this machine
        rows.append(row)
    return rows


def constraint_text(rows: list[Row]) -> str:
    """The whole set of versions, what is kept included, so that no dependency drags another torch in."""
    head = "# The versions that this environment is held to: python -m pip install -c THIS_FILE NAME\n"
    return head + "".join(f"{row.constraint}\n" for row in rows)


def refuse_unfit_process(rows: list[Row]) -> None:
    """Raise StepError where packages must not be installed from this process or for its interpreter."""
    refuse_managed_interpreter()
    refuse_imported_torch(rows)


def refuse_managed_interpreter() -> None:
    """Raise StepError where the system's package manager owns this interpreter (PEP 668)."""
    in_venv = sys.prefix != sys.base_prefix
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if in_venv or not marker.is_file() or os.environ.get("PIP_BREAK_SYSTEM_PACKAGES") == "1":
        return
    raise StepError(
        f"{sys.executable} belongs to the operating system, packages must not be installed into it",
        f"{in_own_venv()}, or python quickstart.py",
    )


def refuse_imported_torch(rows: list[Row]) -> None:
    """Raise StepError where torch or what it computes with would be replaced under this very process,
    as with `%run` in a notebook that has imported it.
    """
    held = [row.name for row in rows if not row.met and row.name in sys.modules and row.name in HELD]
    if held:
        raise StepError(
            f"{', '.join(held)} is imported in this process and cannot be replaced under it",
            f"restart the notebook's kernel, then !{again()} (with an exclamation mark, before any import)",
        )


def require_disk(rows: list[Row], source: Source) -> None:
    """Raise InstallError where the disks of the packages and of temporary files lack the room."""
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
    """The folder that packages go to, or the nearest above it that is there."""
    site = Path(sysconfig.get_path("purelib"))
    return next(folder for folder in (site, *site.parents) if folder.is_dir())


@dataclass(frozen=True)
class Call:
    """One call of pip: the rows that it installs and its options besides source and constraint."""

    wanted: list[Row]
    options: tuple[str, ...] = ()

    @property
    def requirements(self) -> list[str]:
        return [row.requirement for row in self.wanted]


def calls(rows: list[Row], forced: list[Row]) -> list[Call]:
    """What pip is called for, in turn, so that every row is met.

    Args:
        forced: of these the files are first put anew, whatever pip thinks is there; so are those that
            pip cannot uninstall, over what is there.
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
    """Install what `rows` lack; together, requirements and constraint hold every version of the profile.

    Args:
        forced: see `calls`.

    Raises:
        InstallError: too little disk, or pip failed.
    """
    pip_calls.require_pip()
    for source in sources:
        require_disk(rows, source)
        if all(_install(call, rows, source) for call in calls(rows, forced)):
            return
        print("The attached wheels do not suffice: the package index is asked, too")


def _install(call: Call, rows: list[Row], source: Source) -> bool:
    """One call with all other rows held; False where the source does not suffice."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        # pip tells a version that is nowhere to be had from a conflict only if it is not constrained, too.
        constraints.write_text(constraint_text([row for row in rows if row not in call.wanted]), encoding="utf-8")
        return pip_calls.pip_install(call.requirements, source, "--constraint", str(constraints), *call.options)
