"""What step 1 decides and does: which pins are met, which are installed, which torch is kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setup_steps.console import StepError, format_bytes
from setup_steps.machine import TorchFacts, free_bytes, installed_version

OLDEST_TORCH = (2, 2)  # the oldest release that the library's tests pass on
NUMPY2_TORCH = (2, 3)  # the first release that was built for numpy 2
TORCH_DISK = 9_000_000_000  # torch with its GPU libraries: wheels and what they unpack to
OTHER_DISK = 1_000_000_000
AGAIN = "python step1_install_environment.py"
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
    """One distribution: the wanted version, the one that is there, and whether that will do.

    Args:
        wanted: a version, "0.29.*" or "<2".
        installed: None where it is absent.
        kept: it stays whatever release it is.
        fault: why it does not import; empty where it does.
    """

    name: str
    wanted: str
    installed: str | None
    kept: bool = False
    fault: str = ""

    @property
    def as_pinned(self) -> bool:
        """True for the pinned release; a local build of it ("+cpu") is that release."""
        return self.installed is not None and self.installed.split("+")[0] == self.wanted

    @property
    def met(self) -> bool:
        return not self.fault and (self.kept or self.as_pinned)

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return self.name + ("" if self.wanted.startswith("<") else "==") + self.wanted


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
                f"put the line right, then {AGAIN}",
            )
        if match["sign"]:
            newer = here >= (int(match["major"]), int(match["minor"]))
            if newer != (match["sign"] == ">="):
                continue
        pins.append(Pin(match["name"], match["version"]))
    return pins


def version_pair(version: str) -> tuple[int, int]:
    """'2.14.1+cpu' -> (2, 14); (0, 0) where there is no such beginning."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def make_rows(pins: list[Pin], torch: TorchFacts, faults: dict[str, str]) -> list[Row]:
    """Compare pins with what is installed. A torch that works here is kept with its torchvision,
    whatever release it is: it may be the only build that serves this machine's device.
    """
    keep = torch.works and version_pair(torch.version) >= OLDEST_TORCH
    pinned_torch = any(pin == Pin("torch", torch.version.split("+")[0]) for pin in pins)
    rows = []
    for pin in pins:
        installed, wanted, kept = installed_version(pin.name), pin.version, False
        pair = version_pair(installed or "")
        if keep and pin.name == "torch":
            kept = True
        elif keep and pin.name == "torchvision" and not pinned_torch:
            # torchvision 0.(x + 15) belongs to torch 2.x.
            belongs = (0, version_pair(torch.version)[1] + 15)
            wanted, kept = f"0.{belongs[1]}.*", pair == belongs
        elif keep and pin.name == "numpy" and version_pair(torch.version) < NUMPY2_TORCH:
            wanted, kept = "<2", installed is not None and pair < (2, 0)
        rows.append(Row(pin.name, wanted, installed, kept, faults.get(pin.name, "")))
    return rows


def kept_rows(rows: list[Row]) -> list[Row]:
    """What stays as it is although another release is pinned."""
    return [row for row in rows if row.met and not row.as_pinned]


def refuse_managed_interpreter() -> None:
    """Raise StepError where the system's package manager owns this interpreter (PEP 668)."""
    in_venv = sys.prefix != sys.base_prefix
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    if in_venv or not marker.is_file() or os.environ.get("PIP_BREAK_SYSTEM_PACKAGES") == "1":
        return
    raise StepError(
        f"{sys.executable} belongs to the operating system, packages must not be installed into it",
        f"{sys.executable} -m venv .venv && .venv/bin/{AGAIN}, or python quickstart.py",
    )


def pip_command(requirements: list[str], *options: str) -> list[str]:
    """The pip call that installs `requirements` into this interpreter."""
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    return [*command, *options, *requirements]


def install(rows: list[Row]) -> None:
    """Install what `rows` lack, with the kept packages held in place by a constraint.

    Raises:
        StepError: no pip, too little disk, or pip failed.
    """
    lacking = [row for row in rows if not row.met]
    needed = TORCH_DISK if any(row.name == "torch" for row in lacking) else OTHER_DISK
    site = Path(sysconfig.get_path("purelib"))
    if site.is_dir() and free_bytes(site) < needed:
        raise StepError(
            f"the packages need up to {format_bytes(needed)} at {site}, {format_bytes(free_bytes(site))} are free",
            f"free space there, then {AGAIN}",
        )
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "kept.txt"
        lines = [f"{row.name}=={row.installed}\n" for row in kept_rows(rows)]
        constraints.write_text("".join(lines), encoding="utf-8")
        _run_pip([row.requirement for row in lacking], "--constraint", str(constraints))


def reinstall(rows: list[Row]) -> None:
    """Install again, without their dependencies, packages that are there but do not import."""
    _run_pip([row.requirement for row in rows], "--force-reinstall", "--no-deps")


def _run_pip(requirements: list[str], *options: str) -> None:
    """pip in a process of its own: nothing is replaced under an imported module."""
    have_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], check=False, capture_output=True)
    if have_pip.returncode:
        raise StepError(f"{sys.executable} has no pip", f"{sys.executable} -m ensurepip --upgrade")
    code = subprocess.run(pip_command(requirements, *options), check=False).returncode
    if code:
        raise StepError(
            f"pip ended with code {code} while it installed {' '.join(requirements)} (its last lines are above)",
            f"check the internet connection, then {AGAIN}",
        )
