"""What a command takes and shows: numbers of options, one line per error, exit codes, progress for logs too."""

from __future__ import annotations

import argparse
import contextlib
import functools
import locale
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from LightningDiT.errors import OS_FIXES, LightningDiTError, first_line, in_chinese, is_out_of_memory

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130  # exit codes
PROGRAM = "__main__"  # `__name__` of the module that was started
OWN_PACKAGES = frozenset({"LightningDiT", "setup_steps", "studies"})
#: Control characters but for line feed, carriage return (of moving lines) and tab, as str.translate takes them.
CONTROLS = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\r\t"}
LANGUAGE = "LIGHTNINGDIT_LANG"  # the variable that wants fixes in Chinese too (zh) or not (en), whatever the locale
STOPPED = "stopped; finished work is kept, and the same command goes on from there"
SEE_HELP = "run the command with --help, which lists all options and their values"
INSTALL = "python step1_install_environment.py"
#: Set for a kernel of Jupyter and all that its cells start. Their `!` commands have a terminal, but a notebook that is
#: saved keeps each state of a moving line.
KERNEL = "JPY_PARENT_PID"
INSTALL_ALL = "python -m pip install 'lightningdit-runnable[all]'"  # beside an installed package
STEP = re.compile(r"\b(step\d|fix)_\w+\.py")
PLAIN_INTERVAL, MOVING_INTERVAL = 10.0, 0.2  # seconds between two lines of a log, and of a terminal's moving line
_CALLED_AS: ContextVar[str | None] = ContextVar("called_as", default=None)


def is_installed() -> bool:
    """Return whether this is the package of a wheel, without a project and its steps around it."""
    return (Path(__file__).parent / "bundled").is_dir()


def installation() -> str:
    """Return the command that installs what the library needs."""
    return INSTALL_ALL if is_installed() else INSTALL


def run_main(main: Callable[[], int], install: Callable[[], str] = installation) -> int:
    """Return the exit code of `main`: its own, 1 for an error that a person can fix, 130 for Ctrl-C.

    Such an error (LightningDiTError, OSError, an absent package, text that has no encoding, memory that ran out, data
    nested without end) becomes one line on stderr, and its fix a second one in Chinese for those who read it; a reader
    of stdout that left (`| head`) ends the command without a line. Any other error keeps its traceback. Warnings become
    one line each, without the position in the code.

    Args:
        install: gives the command that installs an absent package.
    """
    _prepare_streams()
    warnings.formatwarning = lambda message, *position, **more: f"warning: {message}\n"
    _say_unknown_language()
    try:
        code = main()
        sys.stdout.flush()  # here, since a full disk or a reader that left is an exception at the interpreter's end
        return code
    except BrokenPipeError:
        _give_up_stdout()
    except KeyboardInterrupt:
        _say_on_stderr(STOPPED)
        _say_in_chinese(STOPPED, "")
        return INTERRUPTED
    except SystemExit as end:
        if end.code == USAGE:  # argparse has said what is wrong
            _say_in_chinese(SEE_HELP)
        raise
    except Exception as error:
        known = _known(error, install)
        if known is None:
            raise
        _say_on_stderr(f"error: {known}")
        _say_in_chinese(known.fix)
        step = STEP.search(known.fix or "") if is_installed() else None
        if step:
            _say_on_stderr(f"note: {step[0]} belongs to a clone of the project; this is an installed package")
    return FAILED


@contextlib.contextmanager
def importing(module: str) -> Iterator[None]:
    """Let Ctrl-C and an absent package be one line, as in `run_main`, while a program imports for seconds (torch).

    Args:
        module: `__name__` of the program. If another module imports it, nothing changes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if module != PROGRAM:
            raise
        sys.exit(run_main(functools.partial(_raise, error)))


def _raise(error: BaseException) -> int:
    raise error


def _known(error: Exception, install: Callable[[], str]) -> LightningDiTError | None:
    """Return an error that a person can fix with its fix, None for any other."""
    if isinstance(error, LightningDiTError):
        return error
    if is_out_of_memory(error):
        reason = f"memory ran out ({first_line(error)})"
        return LightningDiTError(reason, "close other programs, or choose a smaller batch or model")
    if isinstance(error, OSError):
        return describe_os_error(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package and package not in OWN_PACKAGES and package not in sys.stdlib_module_names:
            reason = f"package '{package}' is not installed for this Python ({sys.executable})"
            return LightningDiTError(reason, install())
    if isinstance(error, UnicodeError):
        reason = f"a text has characters that its encoding lacks ({first_line(error)})"
        return LightningDiTError(reason, "rename that file or class")
    if isinstance(error, RecursionError):
        return LightningDiTError("a file is nested without end", "name another file")
    return None


def program(module: str) -> str:
    """Return what a person typed to start a module: `lightningdit sample`, or `python -m LightningDiT.inference`.

    Args:
        module: its name below LightningDiT.
    """
    return _CALLED_AS.get() or f"python -m LightningDiT.{module}"


@contextlib.contextmanager
def called_as(words: str) -> Iterator[None]:
    """Let the usage lines of the block name these words."""
    token = _CALLED_AS.set(words)
    try:
        yield
    finally:
        _CALLED_AS.reset(token)


def printable(text: str) -> str:
    """Return a text without control characters, which a terminal would obey: each becomes a question mark."""
    return text.translate(CONTROLS)


def _prepare_streams() -> None:
    """Make both streams take any text: closed ones nothing, characters without an encoding escaped, no controls."""
    # a closed stream (`>&-`) is None
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A notebook shows a pipe's lines only when they are flushed, and a path may hold characters that the
        # terminal's encoding lacks. Under %run the stream is the notebook's own.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
            # names from servers, archives and manifests are printed in many places, so the stream itself filters
            write = type(stream).write
            stream.write = lambda text, write=write, stream=stream: write(stream, printable(text))


def _give_up_stdout() -> None:
    """Let stdout's rest go nowhere; nobody reads it, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _say_on_stderr(text: str) -> None:
    """Print one line on stderr after all that stdout holds so far."""
    try:
        sys.stdout.flush()
    except OSError:
        _give_up_stdout()
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _named_language() -> str:
    """Return the language in LIGHTNINGDIT_LANG, zh or en or another; quotes are a notebook's `%env NAME="zh"`."""
    return os.environ.get(LANGUAGE, "").strip(" \"'").lower()


def _say_unknown_language() -> None:
    """Say that a language without a catalogue has no effect."""
    named = _named_language()
    if named and not named.startswith(("zh", "en")):
        _say_on_stderr(f"warning: {LANGUAGE} is {named!r} and has no effect; zh and en are the languages")


def reads_chinese() -> bool:
    """Return whether fixes are wanted in Chinese: by LIGHTNINGDIT_LANG, else by the locale as gettext finds it."""
    named = _named_language()
    if named.startswith(("zh", "en")):
        return named.startswith("zh")
    variables = [os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)]
    if not variables:
        with contextlib.suppress(ValueError):  # a locale that Python does not know
            variables = [locale.getlocale()[0] or ""]  # of Windows, where no variable says it
    if variables and variables[0] not in ("C", "POSIX"):
        variables.insert(0, os.environ.get("LANGUAGE") or variables[0])
    return bool(variables) and variables[0].lower().startswith(("zh", "chinese"))


def _say_in_chinese(fix: str | None, label: str = "解决办法：") -> None:
    """Print a fix in Chinese on stderr, if Chinese is wanted, the catalogue has it, and the stream can show it."""
    if not (fix and reads_chinese()):
        return
    with contextlib.suppress(OSError, ValueError, MemoryError):  # no catalogue, or a stream without Chinese
        chinese = in_chinese(fix)
        if chinese:
            "".join({*label, *chinese} - {*fix}).encode(sys.stderr.encoding or "utf-8")
            _say_on_stderr(label + chinese)


def describe_os_error(error: OSError) -> LightningDiTError:
    """Return an operating system's error with its file and what to do about it."""
    named, again = str(error.filename or ""), "run the same command again"
    quoted = shlex.quote(named)
    fix = OS_FIXES.get(error.errno or 0)
    if isinstance(error, PermissionError) and Path(named).is_file() and not os.access(named, os.R_OK):
        fix = f"chmod u+r {quoted}, then {again}"
    fix = fix or (f"ls -ld {quoted} shows what is there; put it right and {again}" if named else again)
    reason = error.strerror or str(error) or type(error).__name__
    return LightningDiTError(f"{named}{': ' * bool(named)}{reason}", fix)


def duration(seconds: float) -> str:
    """Return seconds in words: `48 s`, `12 min 30 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_bytes(count: float) -> str:
    """Return bytes in decimal units, as disks and hubs count them: `1.5 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Work that goes by, with rate and time left: a moving line on a terminal, tqdm's bar in a notebook, else (in a
    pipe or a log) a line every ten seconds.

    Args:
        total: amount in all.
        unit: what is counted; "byte" is written in kB, MB and so on.
        label: stands before the amount, usually a file name.
        start: amount that was done before, which does not count for the rate.
        quiet: show nothing, for all but one of several processes.

    Attributes:
        done: amount so far.
    """

    def __init__(self, total: int, unit: str, *, label: str = "", start: float = 0, quiet: bool = False) -> None:
        self.total, self.unit, self.done = total, unit, start
        self._prefix, self._start, self._quiet = f"{label}: " if label else "", start, quiet
        self._moving = sys.stderr.isatty() and KERNEL not in os.environ
        self._interval = MOVING_INTERVAL if self._moving else PLAIN_INTERVAL
        self._began = self._shown = time.monotonic()
        self._width = 0
        self._bar = None if quiet or self._moving else notebook_bar(total, unit, label, start)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: float = 1) -> None:
        """Count `count` finished units."""
        self.reach(self.done + count)

    def reach(self, done: float, note: str = "") -> None:
        """Show that `done` units are finished, a part of one included, and `note` behind them."""
        self.done = done
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(round(done) - self._bar.n)
            return
        if self._quiet or now - self._shown < self._interval or done <= self._start:
            return
        self._shown = now
        line = self._line(max(now - self._began, 1e-9) / (done - self._start), note)
        if self._moving:
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = len(line)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Wipe the moving line or the bar, so that what follows starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0

    def _line(self, seconds: float, note: str) -> str:
        """Return the line for a pace of `seconds` per unit."""
        if self.unit == "byte":
            amount = f"{format_bytes(self.done)} of {format_bytes(self.total)}"
            rate = f"{format_bytes(1 / seconds)}/s"
        else:
            amount = f"{self.done:.0f} of {self.total} {self.unit}s"
            rate = f"{1 / seconds:.1f} {self.unit}s/s" if seconds < 1 else f"{seconds:.1f} s/{self.unit}"
        share = f"{100 * self.done / self.total:.0f} %"
        left = f"about {duration(seconds * (self.total - self.done))} left"
        return f"  {self._prefix}" + ", ".join(part for part in (amount, share, rate, note, left) if part)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def notebook_bar(total: int, unit: str, label: str, start: float) -> Any:
    """Return a bar of tqdm that moves in a notebook, by widgets if they are installed; None elsewhere or without tqdm.

    Args: see `Progress`.
    """
    if not in_notebook():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm warns that ipywidgets is absent, and then writes text
            from tqdm.auto import tqdm
    except ImportError:
        return None
    kind = {"unit": "B", "unit_scale": True} if unit == "byte" else {"unit": f" {unit}s"}
    pace = {"mininterval": MOVING_INTERVAL, "miniters": 0, "delay": MOVING_INTERVAL}
    return tqdm(total=total, desc=label or None, initial=start, leave=False, **kind, **pace)


class StopRequest:
    """Ctrl-C as a request: within the block the first one is noted, and a later one ends at once.

    Args:
        signals: the signals that count as a request.
        grace: seconds after the first one in which another is the same request.
        message: printed at the first one.
        quiet: print nothing.

    Attributes:
        asked: whether it came.
    """

    def __init__(
        self,
        *,
        signals: Sequence[int] = (signal.SIGINT,),
        grace: float = 0.0,
        message: str = "stopping after the current batch; Ctrl-C again ends at once",
        quiet: bool = False,
    ) -> None:
        self.asked = False
        self._signals, self._grace, self._message, self._quiet = signals, grace, message, quiet
        self._asked_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # a program that handles or ignores a signal itself keeps to that, and only the main thread gets signals
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, *_: object) -> None:
        if self.asked:
            if time.monotonic() - self._asked_at >= self._grace:
                raise KeyboardInterrupt
            return
        self.asked, self._asked_at = True, time.monotonic()
        if not self._quiet:  # not by print, which may be what the signal interrupted
            os.write(2, f"\n{self._message}\n".encode())


def positive(text: str) -> int:
    """Return an option's value as a whole number of at least 1."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """Return an option's value as a whole number of at least 0."""
    return _at_least(text, 0)


def seed_number(text: str) -> int:
    """Return an option's value as a seed: a whole number from 0 to below 2^32."""
    number = natural(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} given, a seed from 0 to below 2^32 expected")
    return number


def _at_least(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} given, a whole number of at least {least} expected")
    return number
