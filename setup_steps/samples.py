"""Step 4 in both forms: one process or one for each GPU, settings printed and checked, images sampled."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.console import OK
from LightningDiT.errors import LightningDiTError, warn_user
from LightningDiT.files import check_space, require_writable
from setup_steps import weights
from setup_steps.project import PROJECT, STEP2, STEP3, STEP4, absolute, step_command

if TYPE_CHECKING:
    from LightningDiT.config import Config
    from LightningDiT.distributed import Processes
    from LightningDiT.sampling.demo import Demo

    #: Settings of a run, its classes, and their conditions if the command line has any.
    Plan = tuple[Config, list[int | str], list[int | str] | None]

TIME_BUDGET = 30.0  # minutes


def configured(path: Path, args: argparse.Namespace, sampling: bool = True) -> Config:
    """Return the settings in a YAML file, with the options of the command line in their place.

    Args:
        sampling: the command line has the sampling options.
    """
    from LightningDiT.config import load_config
    from LightningDiT.sampling.options import apply_options

    config = located(load_config(path), args.models_dir)
    return apply_options(config, args) if sampling else config


def located(config: Config, named: Path | None) -> Config:
    """Return the settings with the paths of the published weights as they are on this machine: a file that is not where
    the settings say is taken from the folder of the published weights, or every file if --models-dir names that folder.

    Raises:
        LightningDiTError: neither place has a file.
    """
    names = {name for file in weights.SETS["all"] for name in weights.usable_names(file)}
    published = [path for path in (config.ckpt_path, config.vae.ckpt_path) if path and Path(path).name in names]
    if not published:
        if named:
            warn_user(f"--models-dir has no effect: {config.source} names none of the published weights")
        return config
    folder, stats = weights.models_folder(named, STEP4, said=False), Path(config.data.data_path or ".")
    places = {path: _place(Path(path), folder, config, named) for path in published}
    if config.data.data_path and not stats.is_file():
        stats = Path(_place(stats / weights.STATS.name, folder, config, named)).parent
    return replace(
        config,
        ckpt_path=places.get(config.ckpt_path or "", config.ckpt_path),
        vae=replace(config.vae, ckpt_path=places.get(config.vae.ckpt_path or "", config.vae.ckpt_path)),
        data=replace(config.data, data_path=str(stats) if config.data.data_path else None),
    )


def _place(path: Path, folder: Path, config: Config, named: Path | None) -> str:
    """Return the path of a published file as the settings have it, or in the folder; see `located`."""
    own = folder / path.name
    if path.is_file() and not named:
        return str(path)
    if own.is_file():
        if own != path:
            warn_user(f"{own} is taken for {path}, which {config.source} names")
        return str(own)
    model = "64ep" if "64ep" in Path(config.ckpt_path or "").name else "800ep"
    where = f"not in {folder}" if named else f"neither there nor in {folder}"
    raise LightningDiTError(
        f"{path}, which {config.source} names, is {where}",
        f"{step_command(STEP2, '--model', model, *weights.named_models(named))}; or, if you moved the files, "
        f"{step_command(STEP3, '--model', model, '--models-dir', 'FOLDER')}",
    )


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
        config, classes, _ = plan()
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

    config, classes, conditions = plan
    folder = absolute(grid.parent)
    processes.from_main(lambda: check_space(folder, len(classes), config.data.image_size))
    processes.say(describe_settings(config, len(classes), folder / grid.name))
    from LightningDiT.sampling.demo import sample_demo
    from LightningDiT.sampling.dry_run import check_run

    if dry_run:
        processes.from_main(lambda: check_run(config, classes, conditions))
        return None
    processes.from_main(lambda: require_writable(folder))
    return sample_demo(config, classes, seed, folder, grid.name, minutes, processes, conditions=conditions)
