"""The rows of a training log: means of the loss terms, speed, time left, and the share of time that data took."""

from __future__ import annotations

import time
from collections.abc import Mapping

SPEED_KEYS = ("step", "images_per_second", "seconds_left", "data_share")


class AverageMeter:
    """Averages the loss terms between two rows, and measures speed and time left.

    Both follow from the time since the last row, so that a pause or a return to a checkpoint does not distort them.
    """

    def __init__(self, total_steps: int, batch_size: int) -> None:
        self.total_steps, self.batch_size = total_steps, batch_size
        self.reset()

    def reset(self) -> None:
        """Forget what was added."""
        self.started = time.monotonic()
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.steps = 0

    def add(self, terms: Mapping[str, float]) -> None:
        """Add the scalar terms of one step; a skipped step has none."""
        self.steps += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def row(self, step: int) -> dict[str, float]:
        """Return the means since the last row, with images per second and seconds left, and begin the next row."""
        seconds = time.monotonic() - self.started
        row = {name: value / self.counts[name] for name, value in self.sums.items()}
        if "data_seconds" in row:
            row["data_share"] = self.sums["data_seconds"] / seconds
            del row["data_seconds"]
        row["images_per_second"] = self.steps * self.batch_size / seconds
        row["seconds_left"] = (self.total_steps - step) * seconds / max(1, self.steps)
        self.reset()
        return row


def row_text(row: Mapping[str, float]) -> str:
    """Return one readable line for a row of the log."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in SPEED_KEYS)
    line = f"step {int(row['step'])}: {terms}"
    if "images_per_second" in row:
        line += f" ({row['images_per_second']:.0f} images/s, {row['seconds_left'] / 60:.1f} min left)"
    return line
