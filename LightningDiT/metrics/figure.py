"""The evaluation as one picture: scores, accuracy by class, and neighbours in the training set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from LightningDiT.files import atomic_path
from LightningDiT.metrics.scores import TITLES, Score

WIDTH = 11.0  # inches
SCORE_HEIGHT, CLASS_HEIGHT = 2.6, 3.2  # inches
DOTS = 110  # per inch
MARK = "LightningDiT evaluation"  # text in the PNG, by which it is known for ours
MOST_CLASSES = 60  # bars that have room for a name


def save_figure(
    path: Path,
    title: str,
    scores: Mapping[str, Score],
    classes: Sequence[Mapping[str, Any]],
    picture: Image.Image | None,
) -> bool:
    """Draw scores with their intervals, accuracies by class and neighbours; return False if matplotlib is missing.

    Args:
        classes: rows of `class_table`.
        picture: of `neighbour_picture`; None: without neighbours.
    """
    try:
        from matplotlib.figure import Figure  # needs no display and has no global state
    except ImportError:
        return False
    known = [row for row in classes if "accuracy" in row][:MOST_CLASSES]
    heights = [SCORE_HEIGHT] + [CLASS_HEIGHT] * bool(known)
    if picture is not None:
        heights.append(WIDTH * picture.height / picture.width)
    figure = Figure((WIDTH, sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    _draw_scores(parts[0], scores)
    if known:
        _draw_classes(parts[1].subplots(), known)
    if picture is not None:
        panel = parts[-1].subplots()
        panel.imshow(np.asarray(picture))
        panel.axis("off")
        panel.set_title("generated images nearest to the training set, above their neighbours", fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS, metadata={"Software": MARK})
    return True


def _draw_scores(figure: Any, scores: Mapping[str, Score]) -> None:
    """Draw a panel for each score, each with its own scale."""
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for panel, (name, score), number in zip(panels, scores.items(), range(len(scores)), strict=True):
        panel.bar([0], [score.value], width=0.6, color=f"C{number}")
        if score.low is not None and score.high is not None:
            ends = [[max(0.0, score.value - score.low)], [max(0.0, score.high - score.value)]]
            panel.errorbar([0], [score.value], yerr=ends, color="black", capsize=6)
        panel.set_title(TITLES[name].replace(" (", "\n("), fontsize=9)
        panel.set_xlabel(f"{score.value:.4g}")
        panel.set_xticks([])
        panel.set_xlim(-0.7, 0.7)
        panel.set_ylim(0, 1.05 if name in ("precision", "recall") else None)


def _draw_classes(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the accuracy of generated and real images side by side."""
    positions = np.arange(len(rows))
    for shift, key, label, colour in ((-0.2, "accuracy", "generated", "C0"), (0.2, "accuracy_real", "real", "C7")):
        values = [row.get(key, np.nan) for row in rows]
        panel.bar(positions + shift, values, width=0.4, label=label, color=colour)
    lows = [max(0.0, row["accuracy"] - row["accuracy_low"]) for row in rows]
    highs = [max(0.0, row["accuracy_high"] - row["accuracy"]) for row in rows]
    values = [row["accuracy"] for row in rows]
    panel.errorbar(positions - 0.2, values, [lows, highs], fmt="none", color="black", capsize=3)
    panel.set_xticks(positions, [f"{row['name']}\n{row['count']}" for row in rows], fontsize=8)
    panel.set_ylabel("accuracy")
    panel.set_ylim(0, 1.05)
    panel.legend(loc="lower right", fontsize=8)
