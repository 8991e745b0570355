"""Are the levels of step 5 those that step 6 began with? Step 5 may have written other ones under the same names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_json
from LightningDiT.radar.level_images import LevelFiles, open_levels
from LightningDiT.verdict.gait import span_of

AGAIN = "run step6_adapt_models.py again with another --output"


def levels_digest(opened: LevelFiles) -> str:
    """Return a hash of the levels of all windows by their names, and of the dB that they span.

    Everything that is trained, generated and tested comes from these; draws of windows depend on the dB.
    """
    windows = sorted((row.name, opened.files[at][1]) for at, row in enumerate(opened.split.rows))
    return hashlib.sha256(json.dumps([span_of(opened.db_range), windows]).encode()).hexdigest()


def others(opened: LevelFiles, is_same_folder: bool, adapted: Path) -> LightningDiTError:
    """Return the error that levels are not those of a folder of step 6.

    Args:
        is_same_folder: whether they lie where those of step 6 lay.
    """
    changed = "were written again with other settings since" if is_same_folder else "are not those with which"
    return LightningDiTError(f"the levels in {opened.folder} {changed} {adapted} began", AGAIN)


def latents_are_of(opened: LevelFiles, latents: Path, split_file: Path, fold: int, draws: int, seed: int) -> bool:
    """Return whether training latents were made of the levels that are there now.

    Args:
        split_file: of the cell; draws, seed: of the extraction.

    Raises:
        LightningDiTError: the manifest of the latents is missing or cannot be read.
    """
    file = latents / LATENTS_MANIFEST
    try:
        made_of = read_json(file)["settings"]["image_list"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LightningDiTError(
            f"{file} does not say which levels its latents are of ({first_line(error)})", AGAIN
        ) from error
    return made_of == open_levels(opened.folder, split_file, "training", fold, draws, seed).key
