"""What the log says of a run: means of the loss terms, speed, time left, and the share of time that data took."""

from __future__ import annotations

import time
from collections.abc import Mapping

RATE_KEYS = ("step", "images_per_second", "seconds_left", "data_share")


class Meter:
    """Averages the loss terms between two log lines and knows speed and time left.

    Speed and time left follow from the time since the last line, so that a pause or a return does not bend them.
    """

    def __init__(self, total_steps: int, batch_size: int) -> None:
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget what was added."""
        self.started = time.monotonic()
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.steps = 0

    def add(self, terms: Mapping[str, float]) -> None:
        """Add the scalar terms of one step; none for a step that was skipped."""
        self.steps += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def row(self, step: int) -> dict[str, float]:
        """Return the averages since the last call with images per second and seconds left."""
        seconds = time.monotonic() - self.started
        row = {name: value / self.counts[name] for name, value in self.sums.items()}
        if "data_seconds" in row:
            row["data_share"] = self.sums["data_seconds"] / seconds
            del row["data_seconds"]
        row["images_per_second"] = self.steps * self.batch_size / seconds
        row["seconds_left"] = (self.total_steps - step) * seconds / max(1, self.steps)
        self.restart()
        return row


def describe(row: Mapping[str, float]) -> str:
    """Return one readable line for a row of the log."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in RATE_KEYS)
    line = f"step {int(row['step'])}: {terms}"
    if "images_per_second" in row:
        line += f" ({row['images_per_second']:.0f} images/s, {row['seconds_left'] / 60:.1f} min left)"
    return line
