"""Step 4 in both forms: settings printed and checked, images sampled, each image under its class's name."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.files import atomic_path, check_space, require_writable
from setup_steps.project import absolute

if TYPE_CHECKING:
    from LightningDiT.config import Config
    from LightningDiT.sampling.demo import Demo

TIME_BUDGET = 30.0  # minutes


def configured(path: Path, args: argparse.Namespace | None = None) -> Config:
    """Return the settings in a YAML file, with the sampling options of the command line in their place."""
    from LightningDiT.config import load_config
    from LightningDiT.sampling.options import apply_options

    config = load_config(path)
    return apply_options(config, args) if args else config


def sample(
    config: Config, classes: Sequence[int | str], seed: int, output: Path, grid: str, minutes: float, dry_run: bool
) -> Demo | None:
    """Print the settings, then sample one image per class and their grid into a folder; None after a dry run.

    Raises:
        LightningDiTError: see `sample_demo`; a dry run finds what the run would.
    """
    from LightningDiT.sampling.options import describe_settings

    folder = absolute(output)
    check_space(folder, len(classes), config.data.image_size)
    print(describe_settings(config, len(classes), folder / grid))
    from LightningDiT.sampling.demo import sample_demo
    from LightningDiT.sampling.dry_run import check_run

    if dry_run:
        check_run(config, classes)
        return None
    require_writable(folder)
    return sample_demo(config, classes, seed, folder, grid, minutes)


def copy_by_name(demo: Demo) -> None:
    """Copy each image that is there beside the grid, under its number and the name of its class."""
    for path, caption in zip(demo.run.paths, demo.captions, strict=True):
        if path is not None:
            name = "".join(letter if letter.isalnum() else "_" for letter in caption)
            with atomic_path(demo.grid.parent / f"{int(path.stem):02d}_{name}.png") as fresh:
                shutil.copyfile(path, fresh)
