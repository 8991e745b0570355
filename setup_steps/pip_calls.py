"""pip as a separate process: where it looks for wheels, and its errors in one line."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from LightningDiT.errors import LightningDiTError
from setup_steps import project
from setup_steps.project import STEP1, VENV, hide_credentials, venv_python
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


UNKNOWN_FIX = "check the internet connection, then {again}"
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
        r"Could not find an activated virtualenv",
        "pip's setting require-virtualenv (PIP_REQUIRE_VIRTUALENV) forbids this outside a virtual environment",
        f"{in_own_venv()}, or python quickstart.py",
    ),
    (r"UnicodeDecodeError", "pip cannot read the metadata of an installed package", in_own_venv()),
    (
        r"DO NOT MATCH THE HASHES|BadZipFile|is not a zip file|Wheel '[^']+' .*is invalid",
        "a downloaded file is damaged",
        "python -m pip cache purge, then {again}",
    ),
    (
        r"HTTP error (?P<code>\d+) while getting (?P<url>https?://\S+)",
        "{index} answers, but {host}, where its files are, refuses one with HTTP {code}",
        "{other} with the address of an index whose files can be had, or {wheels}",
    ),
    (  # the second form is that of pip 26
        r"Error: HTTPS?ConnectionPool\(host='(?P<host>[^']+)', port=(?P<port>\d+)\)"
        r"|(?:while fetching|Unable to fetch|secure connection for) (?P<url>https?://\S+)",
        "{index} answers, but {host}, where its files are, cannot be reached",
        "{other} with the address of an index whose files can be had, or {wheels}",
    ),
    (r"Download failed after|IncompleteRead|ProtocolError", "a download broke off", UNKNOWN_FIX),
    (
        r"\(from versions: (?!none)[^)]*?(?P<newest>[^\s,)]+)\)\s+ERROR: No matching distribution found for "
        r"(?P<what>[^\s;]+)",
        "{what} is not available for this Python {python} in {index}, the newest there is {newest}",
        "{other} with the address of an index that has it, or another Python (3.11 or 3.12 have every wheel)",
    ),
    (
        r"repository located at (?P<host>\S+) is not a trusted or secure host",
        "pip takes nothing from {host} over http://, because others could change it on the way",
        "{other} with an address that begins with https://, or PIP_TRUSTED_HOST={host} if you trust the way there",
    ),
    (
        r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolution|[Nn]ame resolution|Failed to establish"
        r"|Connection refused|[Cc]onnection broken|[Cc]onnection reset|unreachable|ProxyError|SSLError|Max retries",
        "no connection to {index}",
        "switch the internet on (Kaggle: Settings, Internet), or {wheels} with the wheels in it, "
        "or {other} with the address of another index",
    ),
    (
        r"No matching distribution found for (?P<what>[^\s;]+)",
        "{index} lists no {what} for this Python {python}, refuses to answer, or is no package index",
        "{other} with the address of an index that has it, or another Python (3.11 or 3.12 have every wheel)",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the wanted packages exclude one another (pip names them above)",
        in_own_venv(),
    ),
)
UNKNOWN = ("pip says why above", UNKNOWN_FIX)
#: Message and fix for a version that is not there if pip asks no index.
NO_WHEEL = (
    "{what} is not available for this Python {python}",
    "another Python (3.11 or 3.12 have every wheel), or {wheels} with that wheel in it",
)
#: The same if the setting no-index forbids it.
NO_INDEX = (
    "{what} is not here, and pip's setting no-index (PIP_NO_INDEX) forbids to ask an index",
    "PIP_NO_INDEX=0 {again}, or {wheels} with that wheel in it",
)
VARIABLE = "PIP_INDEX_URL"


def index_url(text: str) -> str:
    """Return an option's value as the address of a package index."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of the port, or of an IPv6 address
        known = False
    else:
        if parts.scheme == "file" and parts.netloc in ("", "localhost"):
            known = Path(urllib.request.url2pathname(parts.path)).is_dir()
    if not known or re.search(r"[\s\x00-\x1f]", text):
        raise argparse.ArgumentTypeError(
            f"{hide_credentials(text)!r} given, https://HOST/..., http://HOST/... or file:///FOLDER expected"
        )
    return text


@dataclass(frozen=True)
class Index:
    """The package index that pip asks.

    Args:
        url: its address without credentials; empty for pip's default.
        why: what names it.
        by_variable: whether PIP_INDEX_URL does.
    """

    url: str
    why: str
    by_variable: bool = False

    @property
    def title(self) -> str:
        """The index within a sentence."""
        return f"the package index {self.url}" if self.url else "pip's default package index"


def find_index(asked: str = "") -> Index | None:
    """Return the index that pip asks and why, as pip decides it: `asked` (the option --index-url), the variable, pip's
    configuration, pip's default. None if `no-index` forbids every one.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace").stdout
    named = re.findall(r"^(global|install|:env:)\.([a-z-]+)=(['\"].*)$", told, re.MULTILINE)
    named.sort(key=lambda row: ("global", "install", ":env:").index(row[0]))  # the last of a name is in force
    settings = {name: (ast.literal_eval(value), section) for section, name, value in named if len(value) > 2}
    if settings.get("no-index", ("", ""))[0].lower() in ("1", "true", "yes", "on", "y", "t"):
        return None
    url, section = settings.get("index-url", ("", ""))
    if asked:
        url, why = asked, "by --index-url" + f", which goes before {VARIABLE}" * (section == ":env:")
    elif section == ":env:":
        why = f"by the variable {VARIABLE}"
    elif url:
        why = f"by {section}.index-url of pip's configuration"
    else:
        why = f"neither --index-url nor {VARIABLE} nor pip's configuration names one"
    extra = settings.get("extra-index-url", ("", ""))[0].split()
    if extra:
        why += f"; pip's extra-index-url adds {' '.join(map(hide_credentials, extra))}"
    return Index(hide_credentials(url), why, section == ":env:" and not asked)


def announce(source: Source) -> None:
    """Print which index pip asks and why; nothing if it asks none because of --wheels."""
    if source.index:
        print(describe_index(source.url))


def describe_index(asked: str = "") -> str:
    """Return in one line which index pip asks and why."""
    index = find_index(asked)
    if index is None:
        effect = "; --index-url has no effect" if asked else ""
        return f"Index: none, pip's setting no-index (PIP_NO_INDEX) forbids it{effect}"
    return f"Index: {index.url or 'that of pip by default'} ({index.why})"


@dataclass(frozen=True)
class Source:
    """Where pip looks for packages.

    Args:
        folders: folders with wheels.
        index: ask the package index too.
        last: a failure here is an error; otherwise the next source is tried.
        url: address of the index; empty for the one that the variable, pip's configuration or its default names.
    """

    folders: tuple[Path, ...] = ()
    index: bool = True
    last: bool = True
    url: str = ""

    @property
    def options(self) -> list[str]:
        """pip's options for this source."""
        links = [part for folder in self.folders for part in ("--find-links", str(folder))]
        if not self.index:
            return ["--no-index", *links]
        return ["--index-url", self.url, *links] if self.url else links

    @property
    def wheel_bytes(self) -> int | None:
        """Bytes of all wheels if these alone can be installed; None with an index."""
        if self.index:
            return None
        return sum(wheel.stat().st_size for folder in self.folders for wheel in folder.glob("*.whl"))


def find_sources(wheels: Path | None, url: str = "") -> tuple[Source, ...]:
    """Return the sources to try in turn: `wheels` alone if it is given (LightningDiTError: it holds none), else wheels
    among the attached inputs, then these and the index, that at `url` if one is given.
    """
    if wheels is not None:
        if not any(wheels.glob("*.whl")):
            found = "holds no .whl file" if wheels.is_dir() else "is no folder"
            raise LightningDiTError(
                f"--wheels {wheels} {found}, a folder with wheels was expected",
                f"{project.step_command(STEP1, '--write-wheel-command')} says how to fetch them",
            )
        return (Source((wheels,), index=False),)
    attached = attached_folder()
    walked = walk(attached) if attached is not None else ()
    folders = tuple(sorted(folder for folder, _, files in walked if any(name.endswith(".whl") for name in files)))
    with_index = Source(folders, url=url)
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
        index = find_index(source.url) if source.index else None
        raise explain(said, requirements, code, index, source.index and index is None)
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


def explain(
    said: str, requirements: Sequence[str], code: int, index: Index | None = None, forbidden: bool = False
) -> InstallError:
    """Return the error for what pip said on stderr.

    Args:
        index: the index that pip asked; None if it asked none.
        forbidden: whether a setting forbids it to ask one.
    """
    (message, fix), named = UNKNOWN, {}
    for pattern, *row in COMPLAINTS:
        if match := re.search(pattern, said):
            (message, fix), named = row, match.groupdict()
            break
    if index is None and "what" in named:
        message, fix = NO_INDEX if forbidden else NO_WHEEL
    host = named.pop("host", None) or urlsplit(named.get("url") or "").netloc.rpartition("@")[2]
    port = named.pop("port", None)
    facts = {
        "python": ".".join(map(str, sys.version_info[:2])),
        "index": index.title if index else "a package index",
        "host": f"{host}:{port}" if port not in (None, "80", "443") else host,
        "again": again(),
        "wheels": again("--wheels", "FOLDER", without=["--wheels", "--index-url"]),
        "other": again("--index-url", "https://MIRROR/simple", without=["--wheels", "--index-url"]),
        **named,
    }
    if index and index.by_variable:
        facts["other"] = f"unset {VARIABLE}, or {facts['other']}"
    head = f"pip ended with code {code} while it installed {shlex.join(requirements)}"
    return InstallError(f"{head}: {message.format(**facts)}", fix.format(**facts))
