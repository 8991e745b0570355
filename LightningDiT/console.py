"""What an entry point shows: one line per error, and progress that also reads well in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from LightningDiT.errors import LightningDiTError

PLAIN_INTERVAL = 10.0  # seconds between progress lines where standard error is no terminal


def run_main(main: Callable[[], int]) -> int:
    """Return the exit code of `main`: its own, 1 for a LightningDiTError (printed), 130 for Ctrl-C."""
    try:
        return main()
    except LightningDiTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130


class Progress:
    """A bar on a terminal, and in a log a plain line every ten seconds, with the time left."""

    def __init__(self, total: int, unit: str) -> None:
        from tqdm import tqdm

        self.total, self.unit, self.done = total, unit, 0
        self._started = self._shown = time.monotonic()
        self._bar = tqdm(total=total, unit=unit) if sys.stderr.isatty() else None

    def update(self, count: int = 1) -> None:
        """Count `count` finished units."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._shown >= PLAIN_INTERVAL:
            self._shown = now
            left = (now - self._started) / self.done * (self.total - self.done)
            print(f"  {self.done} of {self.total} {self.unit}s, about {duration(left)} left", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Return seconds in words: `48 s`, `12 min 30 s`, `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
