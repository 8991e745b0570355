"""pip in a process of its own: where it looks for wheels, and what its errors mean in one line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setup_steps import console
from setup_steps.console import VENV, StepError, venv_python
from setup_steps.weights import attached_folder, walk

STEP = "step1_install_environment.py"
RETRIES = "2"  # pip's own five make an offline machine wait for minutes


def in_own_venv(system: str = os.name) -> str:
    """The command that makes the project's virtual environment and runs step 1 in it; `system` is "nt"
    for Windows.
    """
    made = shlex.join([sys.executable, "-m", "venv", VENV.name])
    return f"{made} && {venv_python(Path(VENV.name), system)} {STEP}"


def again(*added: str) -> str:
    """The command that is running, or step 1, with more options."""
    return console.again(STEP, *added)


class InstallError(StepError):
    """Packages could not be installed; what was there before still is."""


@dataclass(frozen=True)
class Complaint:
    """What pip says, and how that is told and fixed; `{what}` is the pattern's group of that name."""

    pattern: str
    message: str
    fix: str


#: The first row that fits pip's stderr is the reason: a full disk shows up as broken downloads, too.
COMPLAINTS = (
    Complaint(
        r"No space left on device|Errno 28|not enough space on the disk",
        "the disk is full",
        "free space (python -m pip cache purge helps), then {again}",
    ),
    Complaint(
        r"Permission denied|Errno 13|WinError 5",
        "packages must not be written there",
        f"{in_own_venv()}, or python quickstart.py",
    ),
    Complaint(
        r"DO NOT MATCH THE HASHES|BadZipFile|is not a zip file|Wheel '[^']+' .*is invalid",
        "a downloaded file is damaged",
        "python -m pip cache purge, then {again}",
    ),
    Complaint(
        r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|[Nn]ame resolution|Failed to establish"
        r"|Connection refused|[Cc]onnection broken|[Cc]onnection reset|unreachable|ProxyError|SSLError|Max retries",
        "no connection to a package index",
        "switch the internet on (Kaggle: Settings, Internet), or {again} --wheels FOLDER with the wheels in it",
    ),
    Complaint(
        r"No matching distribution found for (?P<what>[^\s;]+)",
        "{what} is not to be had for this Python {python}",
        "another Python (3.11 or 3.12 have every wheel), or {again} --wheels FOLDER with that wheel in it",
    ),
    Complaint(
        r"ResolutionImpossible|conflicting dependencies",
        "packages that are wanted exclude one another (pip names them above)",
        in_own_venv(),
    ),
)
UNKNOWN = Complaint("", "pip says why above", "check the internet connection, then {again}")


@dataclass(frozen=True)
class Source:
    """Where pip looks.

    Args:
        folders: folders with wheels.
        index: whether the package index is asked, too.
        last: whether what fails here is an error; else the next source is tried.
    """

    folders: tuple[Path, ...] = ()
    index: bool = True
    last: bool = True

    @property
    def options(self) -> list[str]:
        """pip's options for it."""
        links = [part for folder in self.folders for part in ("--find-links", str(folder))]
        return links if self.index else ["--no-index", *links]

    @property
    def wheel_bytes(self) -> int | None:
        """Bytes of all wheels where these alone can be installed; None with an index."""
        if self.index:
            return None
        return sum(wheel.stat().st_size for folder in self.folders for wheel in folder.glob("*.whl"))


def find_sources(wheels: Path | None) -> tuple[Source, ...]:
    """Where to look, in turn: in `wheels` alone if it is given; else in the wheels among the attached
    inputs, then at the index with these at hand.

    Raises:
        StepError: `wheels` is no folder with wheels.
    """
    if wheels is not None:
        if not any(wheels.glob("*.whl")):
            found = "holds no .whl file" if wheels.is_dir() else "is no folder"
            raise StepError(
                f"--wheels {wheels} {found}, a folder with wheels was expected",
                f"python -m pip download -r requirements.txt -d {shlex.quote(str(wheels))} on a machine with internet",
            )
        return (Source((wheels,), index=False),)
    attached = attached_folder()
    places = walk(attached) if attached is not None else ()
    folders = tuple(sorted(place for place, _, files in places if any(name.endswith(".whl") for name in files)))
    with_index = Source(folders)
    return (Source(folders, index=False, last=False), with_index) if folders else (with_index,)


def pip_command(requirements: Sequence[str], *options: str) -> list[str]:
    """The pip call that installs `requirements` into this interpreter."""
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    return [*command, *options, *requirements]


def require_pip() -> None:
    """Raise StepError where this interpreter has no pip."""
    have_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], check=False, capture_output=True)
    if have_pip.returncode:
        raise StepError(f"{sys.executable} has no pip", f"{shlex.quote(sys.executable)} -m ensurepip --upgrade")


def pip_install(requirements: Sequence[str], source: Source, *options: str) -> bool:
    """Install from one source; False where it does not suffice and another is to be tried.

    Raises:
        InstallError: pip failed at the last source.
    """
    code, said = _run(pip_command(requirements, *source.options, *options), quiet=not source.last)
    if code and source.last:
        raise judge(said, requirements, code)
    return code == 0


def _run(command: list[str], quiet: bool) -> tuple[int, str]:
    """Run pip, its stdout on this terminal, its stderr passed on (unless `quiet`) and returned."""
    environment = {"PIP_RETRIES": RETRIES, **os.environ}
    said = []
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace") as pip:
        assert pip.stderr is not None
        try:
            for line in pip.stderr:
                said.append(line)
                if not quiet:
                    sys.stderr.write(line)
                    sys.stderr.flush()
        except KeyboardInterrupt:
            pip.wait()  # it has the Ctrl-C too, and tidies up; a rerun must not meet it
            raise
    return pip.returncode, "".join(said)


def judge(said: str, requirements: Sequence[str], code: int) -> InstallError:
    """The error for what pip said on stderr."""
    matches = ((row, re.search(row.pattern, said)) for row in COMPLAINTS)
    row, match = next(((row, match) for row, match in matches if match), (UNKNOWN, None))
    named = match.groupdict() if match else {}
    python = ".".join(map(str, sys.version_info[:2]))
    return InstallError(
        f"pip ended with code {code} while it installed {shlex.join(requirements)}: "
        + row.message.format(python=python, **named),
        row.fix.format(again=again()),
    )
