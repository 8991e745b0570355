"""pip as a separate process: where it looks for wheels, and its errors in one line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from LightningDiT.errors import LightningDiTError
from setup_steps import project
from setup_steps.project import STEP1, VENV, venv_python
from setup_steps.weights import attached_folder, walk

RETRIES = "2"  # pip's own five make an offline machine wait for minutes

#: The running command, or step 1, with other options.
again = partial(project.again, STEP1)


def in_own_venv(system: str = os.name) -> str:
    """Return the command that makes the project's virtual environment and runs step 1 in it; `system` is "nt" for
    Windows.
    """
    made = shlex.join([sys.executable, "-m", "venv", VENV.name])
    return f"{made} && {venv_python(Path(VENV.name), system)} {STEP1}"


class InstallError(LightningDiTError):
    """Packages could not be installed; what was there before remains."""


#: A pattern of pip's stderr, message and fix; `{what}` is the pattern's group of that name. The first row that fits is
#: the reason: a full disk shows up as broken downloads too.
COMPLAINTS = (
    (
        r"No space left on device|Errno 28|not enough space on the disk",
        "the disk is full",
        "free space (python -m pip cache purge helps), then {again}",
    ),
    (
        r"Permission denied|Errno 13|WinError 5",
        "packages cannot be written there",
        f"{in_own_venv()}, or python quickstart.py",
    ),
    (
        r"DO NOT MATCH THE HASHES|BadZipFile|is not a zip file|Wheel '[^']+' .*is invalid",
        "a downloaded file is damaged",
        "python -m pip cache purge, then {again}",
    ),
    (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|[Nn]ame resolution|Failed to establish"
        r"|Connection refused|[Cc]onnection broken|[Cc]onnection reset|unreachable|ProxyError|SSLError|Max retries",
        "no connection to a package index",
        "switch the internet on (Kaggle: Settings, Internet), or {again} --wheels FOLDER with the wheels in it",
    ),
    (
        r"No matching distribution found for (?P<what>[^\s;]+)",
        "{what} is not available for this Python {python}",
        "another Python (3.11 or 3.12 have every wheel), or {again} --wheels FOLDER with that wheel in it",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the wanted packages exclude one another (pip names them above)",
        in_own_venv(),
    ),
)
UNKNOWN = ("pip says why above", "check the internet connection, then {again}")


@dataclass(frozen=True)
class Source:
    """Where pip looks for packages.

    Args:
        folders: folders with wheels.
        index: ask the package index too.
        last: a failure here is an error; otherwise the next source is tried.
    """

    folders: tuple[Path, ...] = ()
    index: bool = True
    last: bool = True

    @property
    def options(self) -> list[str]:
        """pip's options for this source."""
        links = [part for folder in self.folders for part in ("--find-links", str(folder))]
        return links if self.index else ["--no-index", *links]

    @property
    def wheel_bytes(self) -> int | None:
        """Bytes of all wheels if these alone can be installed; None with an index."""
        if self.index:
            return None
        return sum(wheel.stat().st_size for folder in self.folders for wheel in folder.glob("*.whl"))


def find_sources(wheels: Path | None) -> tuple[Source, ...]:
    """Return the sources to try in turn: `wheels` alone if it is given (LightningDiTError: it holds none), else wheels
    among the attached inputs, then these and the index.
    """
    if wheels is not None:
        if not any(wheels.glob("*.whl")):
            found = "holds no .whl file" if wheels.is_dir() else "is no folder"
            raise LightningDiTError(
                f"--wheels {wheels} {found}, a folder with wheels was expected",
                f"python -m pip download -r requirements.txt -d {shlex.quote(str(wheels))} on a machine with internet",
            )
        return (Source((wheels,), index=False),)
    attached = attached_folder()
    walked = walk(attached) if attached is not None else ()
    folders = tuple(sorted(folder for folder, _, files in walked if any(name.endswith(".whl") for name in files)))
    with_index = Source(folders)
    return (Source(folders, index=False, last=False), with_index) if folders else (with_index,)


def pip_command(requirements: Sequence[str], *options: str) -> list[str]:
    """Return the pip call that installs `requirements` for this interpreter."""
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    return [*command, *options, *requirements]


def require_pip() -> None:
    """Raise LightningDiTError if this interpreter has no pip."""
    have_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], check=False, capture_output=True)
    if have_pip.returncode:
        raise LightningDiTError(f"{sys.executable} has no pip", f"{shlex.quote(sys.executable)} -m ensurepip --upgrade")


def pip_install(requirements: Sequence[str], source: Source, *options: str) -> bool:
    """Install from one source; return False if pip failed and another is left, raise InstallError at the last."""
    code, said = _run(pip_command(requirements, *source.options, *options), quiet=not source.last)
    if code and source.last:
        raise explain(said, requirements, code)
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
            pip.wait()  # it got the Ctrl-C too and tidies up; a rerun must not meet it
            raise
    return pip.returncode, "".join(said)


def explain(said: str, requirements: Sequence[str], code: int) -> InstallError:
    """Return the error for what pip said on stderr."""
    (message, fix), named = UNKNOWN, {}
    for pattern, *row in COMPLAINTS:
        if match := re.search(pattern, said):
            (message, fix), named = row, match.groupdict()
            break
    reason = message.format(python=".".join(map(str, sys.version_info[:2])), **named)
    head = f"pip ended with code {code} while it installed {shlex.join(requirements)}"
    return InstallError(f"{head}: {reason}", fix.format(again=again()))
