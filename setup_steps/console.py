"""How the steps speak: plain lines, progress, one-line errors and exit codes."""

from __future__ import annotations

import errno
import os
import platform
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import NoReturn, TextIO, TypeVar

PROJECT = Path(__file__).resolve().parent.parent
"""The folder that holds the step scripts; every default path starts here."""
VENV = PROJECT / ".venv"
"""The virtual environment that quickstart.py makes."""
REPORT = PROJECT / "environment_report.json"
"""What step 1 found and did; quickstart.py chooses the model by it."""
OWN_PACKAGES = frozenset({"LightningDiT", "setup_steps"})

AnyPath = TypeVar("AnyPath", bound=PurePath)

OK, FAILED, INTERRUPTED = 0, 1, 130
OLDEST_PYTHON = (3, 10)
#: What keeps this interpreter's packages apart: the name and how it is told, the most telling first.
PLACES = (
    ("Kaggle", lambda: "KAGGLE_KERNEL_RUN_TYPE" in os.environ),
    ("Colab", lambda: "COLAB_RELEASE_TAG" in os.environ or "COLAB_GPU" in os.environ),
    ("conda", lambda: (Path(sys.prefix) / "conda-meta").is_dir()),
    ("virtual environment", lambda: sys.prefix != sys.base_prefix),
)
#: What fixes an operating system's error, by its number.
OS_FIXS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "copy the project to a folder that you may write to"),
    errno.ENOSPC: "free space on that disk and run the same command again",
}


class StepError(Exception):
    """What a person can cause and fix, said in one line.

    Args:
        message: names the value that is wrong and what was expected instead.
        fix: the command or edit that puts it right.
    """

    def __init__(self, message: str, fix: str | None = None) -> None:
        self.message = message
        self.fix = fix
        super().__init__(f"{message}; fix: {fix}" if fix else message)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a step's `main` and leave the process with its exit code, never with a traceback for
    what a person can fix: StepError, the library's error and an absent package become one line on
    stderr (exit 1), Ctrl-C becomes exit 130.
    """
    # A closed stream (`>&-`) is None.
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A notebook shows a pipe's lines only when they are flushed, and a path may hold
        # characters that the terminal's encoding lacks. Under %run the stream is the notebook's own.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"  # one line, as all messages
    try:
        require_python()
        code = main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; what is whole was kept, run the same command to go on.")
        code = INTERRUPTED
    except OSError as error:
        complain(f"{describe_os_error(error)}")
        code = FAILED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in OWN_PACKAGES or package in sys.stdlib_module_names:
            raise
        complain(f"package '{package}' is not installed for this Python ({sys.executable}); fix: {fix_packages()}")
        code = FAILED
    except Exception as error:
        if not isinstance(error, (StepError, library_error())):
            raise
        complain(str(error))
        code = FAILED
    sys.stdout.flush()
    sys.exit(code)


def library_error() -> type[Exception]:
    """The library's LightningDiTError, or StepError where the library has not been imported: it
    must not load for the sake of an error.
    """
    return getattr(sys.modules.get("LightningDiT.errors"), "LightningDiTError", StepError)


def complain(text: str) -> None:
    """Print one error line on stderr, after what stdout holds so far."""
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)


def describe_os_error(error: OSError) -> str:
    """Say an operating-system error in one line with the path and what to do about it."""
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    look = f"ls -ld {shlex.quote(str(error.filename))} shows what is there; put it right and " if error.filename else ""
    fix = OS_FIXS.get(error.errno or 0, f"{look}run the same command again")
    named = Path(error.filename) if error.filename else None
    if error.errno == errno.EACCES and named and named.is_file() and not os.access(named, os.R_OK):
        fix = f"chmod u+r {shlex.quote(str(error.filename))}, then run the same command again"
    return f"{place}{reason}; fix: {fix}"


def rename_command(path: Path, ending: str) -> str:
    """The command by which a person moves out of the way what carries a name that is needed."""
    return shlex.join(["mv", str(path), f"{path}{ending}"])


def again(default: str, *added: str, without: Sequence[str] = (), python: str | None = None) -> str:
    """The command that is running, as a person would type it in the project's folder.

    Args:
        default: the script to name where this process is none of the project's scripts.
        added: options put at its end.
        without: options that are left out, with their values.
        python: the interpreter; by default that of this process.
    """
    script, given = Path(sys.argv[0]).name, sys.argv[1:]
    if not ((PROJECT / script).is_file() and script.endswith(".py")):
        script, given = default, []
    kept, leaving = [], False
    for part in given:
        if part.startswith("--"):
            leaving = part.partition("=")[0] in without
        if not leaving:
            kept.append(part)
    return f"{python or interpreter()} {shlex.join([script, *kept, *added])}"


def step_command(script: str, *options: str) -> str:
    """A step's command as a person would type it in the project's folder."""
    return f"{interpreter()} {shlex.join([script, *options])}"


def absolute(path: Path) -> Path:
    """The full path of what a person named, `~` and links resolved.

    Raises:
        StepError: there is no such user's home, or a link leads to itself.
    """
    try:
        return path.expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise StepError(
            f"{path} leads nowhere ({error})", f"ls -ld {shlex.quote(str(path))}, or name it in full"
        ) from error


def venv_python(folder: AnyPath, system: str = os.name) -> AnyPath:
    """The interpreter of a virtual environment; `system` is "nt" for Windows."""
    return folder / ("Scripts/python.exe" if system == "nt" else "bin/python")


def runs_in_venv() -> bool:
    """True where this process runs in the project's own virtual environment."""
    # The interpreter's file does not tell: the one in the environment is a link to the other.
    return Path(sys.prefix).resolve() == VENV.resolve()


def places() -> tuple[str, ...]:
    """What keeps this interpreter's packages apart, by name; empty for a plain Python."""
    return tuple(name for name, here in PLACES if here())


def interpreter() -> str:
    """How a person in the project's folder names the interpreter of this process."""
    if runs_in_venv():
        return str(venv_python(Path(VENV.name)))
    return "python" if shutil.which("python") or os.name == "nt" else "python3"


def fix_packages() -> str:
    """The command that fixes an absent package: the same one in the project's virtual environment
    where there is one and this process does not run in it, else step 1.
    """
    step1 = "step1_install_environment.py"
    if venv_python(VENV).exists() and not runs_in_venv():
        return again(step1, python=str(venv_python(Path(VENV.name))))
    return step_command(step1)


def require_python() -> None:
    """Raise StepError on a Python that is too old for the project (this package loads from 3.7)."""
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise StepError(
            f"this is Python {platform.python_version()}, 3.10 or newer is needed",
            "install Python 3.10 or newer and run the same script with it",
        )


def require_writable(folder: Path) -> None:
    """Raise StepError where `folder` (or the nearest parent that is there) takes no new file."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StepError(f"{place} is a file, a folder was expected", rename_command(place, ".old"))
    # os.access alone says yes to root on a read-only file system and to some network disks.
    probe = place / f".write-test-{os.getpid()}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise StepError(
            f"cannot write in {place} ({error.strerror})",
            "copy the project to a folder that you may write to and run it there",
        ) from error


def format_bytes(count: float) -> str:
    """1536 -> '1.5 kB' in decimal units, as disks and hubs count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """75.2 -> '1 min 15 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """Bytes (or other things) that go by, with speed and time left: one moving line on a terminal,
    and a new line every `period` seconds where stdout is a pipe (a notebook cell, a log file).

    Args:
        label: what goes by, usually a file name.
        total: bytes in all.
        start: bytes that were there before, which do not count for the speed.
        say: how an amount is written.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        stream: TextIO | None = None,
        period: float = 5.0,
        say: Callable[[float], str] = format_bytes,
    ) -> None:
        self.label, self.total, self.start, self.say = label, total, start, say
        self.stream = stream or sys.stdout
        self.moving = self.stream.isatty()
        self.period = 0.2 if self.moving else period
        self.began = self.shown = time.monotonic()
        self.width = 0

    def update(self, done: int) -> None:
        """Show `done` of `total` bytes if the last line is old enough."""
        now = time.monotonic()
        if now - self.shown >= self.period:
            self.shown = now
            self._show(self._line(done, now))

    def close(self) -> None:
        """End the moving line, so that what follows starts on a line of its own."""
        if self.moving and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()

    def _line(self, done: int, now: float) -> str:
        speed = (done - self.start) / max(now - self.began, 1e-9)
        share = f"{100 * done / self.total:.0f} %" if self.total else "100 %"
        left = f", {format_seconds((self.total - done) / speed)} left" if speed > 0 else ""
        amount = f"{self.say(done)} of {self.say(self.total)}"
        return f"  {self.label}: {share}, {amount}, {self.say(speed)}/s{left}"

    def _show(self, line: str) -> None:
        if self.moving:
            self.stream.write("\r" + line.ljust(self.width))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
