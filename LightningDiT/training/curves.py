"""The log of a training run, and its curves: a JSON object a line (see `training.RunFolder.log`), a panel a quantity.

A resumed run may have logged some steps twice; the later line counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from LightningDiT.errors import LightningDiTError

HIDDEN = ("step", "seconds_left")
PANEL_INCHES = (6.0, 2.6)

Row = dict[str, float]


def read_log(path: str | Path) -> list[Row]:
    """Return the rows of a log by rising step, the last one of each step.

    A last line that was cut off while it was written is left out.

    Raises:
        LightningDiTError: the file is missing or a line is no object with a step.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
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
    """Return the names of everything that the runs logged, in the order of their first appearance."""
    names = [name for rows in runs.values() for row in rows for name in row]
    return [name for name in dict.fromkeys(names) if name not in HIDDEN]


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
        panel.set_ylabel(name.replace("_", " "))
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    if len(runs) > 1:
        panels[0].legend()
    return figure
