"""What an entry point shows: one line per error, and progress that also reads well in a log."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable

from LightningDiT.errors import LightningDiTError

PLAIN_INTERVAL = 10.0  # seconds between progress lines where standard error is no terminal
BAR = "{percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def run_main(main: Callable[[], int]) -> int:
    """Return the exit code of `main`: its own, 1 for a LightningDiTError (printed), 130 for Ctrl-C.

    Warnings become one line each, without the place in the code, which is no business of a command's reader.
    """
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"
    try:
        return main()
    except LightningDiTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130


class Progress:
    """A bar on a terminal, and in a log a plain line every ten seconds, with the rate and the time left.

    Args:
        quiet: show nothing, for all but one of several processes.
    """

    def __init__(self, total: int, unit: str, *, quiet: bool = False) -> None:
        from tqdm import tqdm

        self.total, self.unit, self.done = total, unit, 0.0
        self._quiet = quiet
        self._started = self._shown = time.monotonic()
        self._bar = tqdm(total=total, unit=unit, bar_format=BAR) if sys.stderr.isatty() and not quiet else None

    def update(self, count: float = 1) -> None:
        """Count `count` finished units."""
        self.reach(self.done + count)

    def reach(self, done: float, note: str = "") -> None:
        """Show that `done` units are finished, a part of one included, and `note` behind them."""
        self.done = done
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if not self._quiet and now - self._shown >= PLAIN_INTERVAL and done > 0:
            self._shown = now
            seconds = (now - self._started) / done
            rate = f"{1 / seconds:.1f} {self.unit}s/s" if seconds < 1 else f"{seconds:.1f} s/{self.unit}"
            parts = [f"  {done:.0f} of {self.total} {self.unit}s", rate, note]
            parts.append(f"about {duration(seconds * (self.total - done))} left")
            print(", ".join(part for part in parts if part), flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


class StopRequest:
    """Ctrl-C as a request: within the block the first one is noted, and the second one ends at once.

    Attributes:
        asked: whether it came.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.asked = False
        self._quiet, self._took_over = quiet, False

    def __enter__(self) -> StopRequest:
        # a program that handles or ignores Ctrl-C itself keeps to that, and threads get no signals
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
            signal.signal(signal.SIGINT, self._note)
            self._took_over = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._took_over:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if not self._quiet:  # not by print, which may be what the signal interrupted
            os.write(2, b"\nstopping after the batch under way; Ctrl-C again ends at once\n")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def duration(seconds: float) -> str:
    """Return seconds in words: `48 s`, `12 min 30 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
