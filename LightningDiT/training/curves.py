"""The log of a training run, read back and drawn: a panel per quantity, a line per run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, read_text

HIDDEN = ("step", "seconds_left")
BESIDE = {"copies": ("copies_real", "of real windows")}  # what is drawn in the same panel, and its legend
PANEL_INCHES = (6.0, 2.6)
CURVES = "curves.png"  # of a run, in its folder
MARK = "LightningDiT curves"  # text in the PNG, by which it is known for ours
PNG_SECONDS = 120.0  # between two drawings during a run

Row = dict[str, float]


def read_log(path: str | Path) -> list[Row]:
    """Return the rows of a log (see `RunDir.log`) by rising step.

    A resumed run may have logged a step twice; the later row counts. A torn last line is ignored.

    Raises:
        LightningDiTError: the file is missing, empty, or a line is no object with a step.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LightningDiTError(f"log {path} cannot be read ({error})", "name the log.jsonl of a run") from error
    rows: dict[float, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[float(row["step"])] = row
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and rows:
                break
            raise LightningDiTError(
                f"{path}, line {number}: a JSON object with a step is expected, not {line[:40]!r}",
                "name the log.jsonl of a run",
            ) from error
    if not rows:
        raise LightningDiTError(f"log {path} is empty", "train for some steps first")
    return [rows[step] for step in sorted(rows)]


def quantities(runs: Mapping[str, list[Row]]) -> list[str]:
    """Return the names of logged quantities that have a panel, in the order of their first appearance."""
    names = [name for rows in runs.values() for row in rows for name in row]
    beside = {second for first, (second, _) in BESIDE.items() if first in names}
    return [name for name in dict.fromkeys(names) if name not in {*HIDDEN, *beside}]


def save_curves(runs: Mapping[str, list[Row]], path: str | Path) -> None:
    """Draw the runs' logs into a PNG.

    Raises:
        LightningDiTError: matplotlib is missing, or the file cannot be written.
    """
    figure = draw(runs)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": MARK})


def draw(runs: Mapping[str, list[Row]]) -> Any:
    """Return a matplotlib figure with a panel per quantity and a line per run."""
    try:
        from matplotlib.figure import Figure  # works without a display, and without global state
    except ImportError as error:
        raise LightningDiTError("matplotlib is missing", "pip install -r requirements-dev.txt") from error
    names = quantities(runs)
    figure = Figure((PANEL_INCHES[0], PANEL_INCHES[1] * len(names)), layout="constrained")
    panels = figure.subplots(len(names), squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=True):
        for number, (run, rows) in enumerate(runs.items()):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, color=f"C{number}")
            if name in BESIDE:
                _draw_beside(panel, rows, *BESIDE[name], color=f"C{number}")
        panel.set_ylabel(name.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    if len(runs) > 1:
        panels[0].legend()
    return figure


def _draw_beside(panel: Any, rows: list[Row], name: str, legend: str, color: str) -> None:
    """Draw a second quantity as a dashed line of the same colour."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        panel.plot(*zip(*points, strict=True), label=legend, color=color, linestyle="--")
        panel.legend()


class LiveCurves:
    """Curves of a run while it trains: `curves.png` and TensorBoard's event files, each if its package is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._drawn_at: float | None = None
        self._noted: set[str] = set()

    def __enter__(self) -> LiveCurves:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn_at is not None:
            self._draw()
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Mapping[str, float]) -> None:
        """Add a row of the log."""
        if self._drawn_at is None:
            self._open_writer()
            self._drawn_at = time.monotonic()
        if self._writer is not None:
            for name in row.keys() - {"step"}:
                self._writer.add_scalar(name, row[name], int(row["step"]))
        if time.monotonic() - self._drawn_at > PNG_SECONDS:
            self._draw()

    def _open_writer(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._note("tensorboard is not installed, so there are no event files: pip install tensorboard")
        else:
            self._writer = SummaryWriter(str(self.folder))

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        path = self.folder / CURVES
        try:
            save_curves({self.folder.name: read_log(self.folder / "log.jsonl")}, path)
        except LightningDiTError as error:
            self._note(f"{path} is not drawn: {error}")

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            print(f"note: {text}", flush=True)
