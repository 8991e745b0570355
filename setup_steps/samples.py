"""Step 4 in both forms: settings printed and checked, images sampled, each image under its class's name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.console import OK
from LightningDiT.files import check_space, require_writable
from setup_steps.project import PROJECT, absolute

if TYPE_CHECKING:
    from LightningDiT.config import Config
    from LightningDiT.distributed import Processes
    from LightningDiT.sampling.demo import Demo

    #: Settings and classes of a run.
    Plan = tuple[Config, list[int | str]]

TIME_BUDGET = 30.0  # minutes


def configured(path: Path, args: argparse.Namespace | None = None) -> Config:
    """Return the settings in a YAML file, with the sampling options of the command line in their place."""
    from LightningDiT.config import load_config
    from LightningDiT.sampling.options import apply_options

    config = load_config(path)
    return apply_options(config, args) if args else config


def run_shared(
    command: Sequence[str],
    args: argparse.Namespace,
    plan: Callable[[], Plan],
    run: Callable[[Plan, Processes], None],
) -> int:
    """Call `run` with the result of `plan` in a process for each GPU that works, or here, and return the exit code.

    Args:
        command: script of the step and its arguments.
        args: `gpus` and `dry_run` of the command line.
    """
    from LightningDiT.distributed import launched_processes
    from LightningDiT.sampling.all_gpus import run_on_all_gpus

    def count() -> tuple[Config, int]:
        config, classes = plan()
        return config, len(classes)

    script, *options = command
    code = run_on_all_gpus([str(PROJECT / script), *options], args, count)
    if code is None:
        with launched_processes() as processes:
            run(processes.agree(plan), processes)
    return OK if code is None else code


def sample(plan: Plan, seed: int, grid: Path, minutes: float, dry_run: bool, processes: Processes) -> Demo | None:
    """Print the settings, then sample one image per class and write their grid; None after a dry run.

    Raises:
        LightningDiTError: see `sample_demo`; a dry run finds what the run would.
    """
    from LightningDiT.sampling.options import describe_settings

    config, classes = plan
    folder = absolute(grid.parent)
    processes.from_main(lambda: check_space(folder, len(classes), config.data.image_size))
    processes.say(describe_settings(config, len(classes), folder / grid.name))
    from LightningDiT.sampling.demo import sample_demo
    from LightningDiT.sampling.dry_run import check_run

    if dry_run:
        processes.from_main(lambda: check_run(config, classes))
        return None
    processes.from_main(lambda: require_writable(folder))
    return sample_demo(config, classes, seed, folder, grid.name, minutes, processes)
