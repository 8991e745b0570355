"""The configuration of a training on the windows of a split, with the data's own sizes, numbers and paths."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from LightningDiT.files import read_text, write_text

NAME = "training.yaml"
TEMPLATE = Path(__file__).parents[1] / "configs" / "levels_xs2.yaml"
ROOT = Path(__file__).parents[2]  # the folder that holds the package, and the bundled model where it is a project's
TOKENIZER = "tokenizer"  # folder of the tokenizer's training, beside the file
LATENTS, VALID = "latents", "latents_valid"  # folders of latents, beside the file
DOWNSAMPLING, PATCH = 4, 2  # of the template's tokenizer and network
HEADER = (
    "# Written by step5_prepare_spectrograms.py for the windows of split.json beside it. Edit it freely: it is not\n"
    "# written again while it is there. Paths are relative to this folder.\n"
)


@dataclass(frozen=True)
class TrainingData:
    """What a training file says of the data.

    Attributes:
        side: of the square windows in pixels.
        people, conditions: numbers of them; one condition is none.
        is_validated: whether fold 0 has validation windows.
    """

    side: int
    people: int
    conditions: int
    is_validated: bool
    levels: Path


def is_fitting(height: int, width: int) -> bool:
    """Whether the template's networks take windows of this size."""
    return height == width and height % (DOWNSAMPLING * PATCH) == 0


def write_training_file(folder: Path, data: TrainingData) -> tuple[Path, bool]:
    """Write the file beside split.json unless there is one; return it, and whether it now fits the data."""
    path, text = folder / NAME, _text(folder, data)
    if path.exists():
        return path, read_text(path, errors="replace") == text
    write_text(path, text)
    return path, True


def _text(folder: Path, data: TrainingData) -> str:
    rows = {
        "data_path": LATENTS,
        "valid_path": VALID if data.is_validated else None,
        "image_size": data.side,
        "num_classes": data.people,
        "num_conditions": data.conditions if data.conditions > 1 else None,
        "split_file": "split.json",
        "fold": 0,
        "levels_path": _relative(data.levels, folder),
    }
    lines = [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in rows.items() if value is not None]
    rest = read_text(TEMPLATE).partition("\nvae:\n")[2]
    rest = rest.replace("../../spectrograms/", "").replace("output_dir: ../../output", "output_dir: runs")
    if not data.is_validated:
        rest = re.sub(r"  (valid_every|judge_every|patience): .*\n", "", rest)
    return HEADER + "data:\n" + "\n".join(lines) + "\nvae:\n" + re.sub(r"\.\./\.\./\S+", _absolute, rest)


def _relative(path: Path, folder: Path) -> str:
    """Return a path as a file in `folder` names it; on Windows another drive has none but the whole path."""
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:
        return str(path)


def _absolute(found: re.Match[str]) -> str:
    return json.dumps(str(ROOT / found[0].removeprefix("../../")), ensure_ascii=False)
