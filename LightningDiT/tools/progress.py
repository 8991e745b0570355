"""Progress of long work as plain lines, which read the same in a terminal, a notebook and a log."""

from __future__ import annotations

import time

EVERY_SECONDS = 15.0


class Progress:
    """Prints how much is done and how long the rest takes, at most every 15 seconds.

    Args:
        title: what is being done.
        total: when it is done, in the units of `to`.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.started = self.printed = time.monotonic()
        print(f"{title}: {total}", flush=True)

    def to(self, done: int) -> None:
        """Say that `done` of the total are done."""
        now = time.monotonic()
        if now - self.printed < EVERY_SECONDS or done >= self.total:
            return
        self.printed = now
        left = (now - self.started) / done * (self.total - done)
        print(f"{self.title}: {done} of {self.total} ({left / 60:.1f} min left)", flush=True)
