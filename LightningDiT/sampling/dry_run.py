"""What can be checked before a run, without reading the weights' values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from LightningDiT.config import Config, load_config
from LightningDiT.data.labels import Labels
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import (
    check_guide_file,
    check_latent_shape,
    check_transformer_file,
    guidance_of,
    load_stats,
    required,
)
from LightningDiT.sampling.conditions import Conditions, condition_text, numbers_of_conditions
from LightningDiT.sampling.null_row import check_guidance, null_failure_of
from LightningDiT.sampling.solver_choice import check_solver, solver_of
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
from LightningDiT.tokenizer.latent_space import check_tokenizer_of_latents
from LightningDiT.tokenizer.vavae import check_tokenizer_file


def check_run(config: Config, classes: Sequence[int | str], conditions: Conditions = None) -> int:
    """Print the lines of `verify` and return the exit code of success.

    Args:
        conditions: of each image, by name or number, None for none; None: the command line names none.

    Raises:
        LightningDiTError: a class or condition is unknown, or a file is missing, damaged or does not fit.
    """
    labels, second = Labels.of(config), Labels.conditions_of(config)
    print(f"classes        {labels.listing(labels.numbers(classes))}")
    numbers = numbers_of_conditions(second, conditions, len(classes))
    if second and numbers:
        print(f"conditions     {condition_text(second, numbers, conditions is not None)}")
    print("\n".join(verify(config)))
    return 0


def verify_config(path: str | Path) -> list[str]:
    """Check everything that the configuration at `path` names; see `verify`."""
    return verify(load_config(path))


def verify(config: Config) -> list[str]:
    """Check everything that a configuration names, and return a line for each thing.

    Raises:
        LightningDiTError: something is missing, damaged, or does not fit the rest.
    """
    check_solver(config.sample, config.transport.path_type)
    Labels.of(config)
    Labels.conditions_of(config)
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    lines = [f"configuration {config.source}: {config.model.model_type}, {config.data.num_classes} classes"]
    lines += config.notes
    lines.append(check_transformer_file(config, required(config, "ckpt_path")))
    check_guidance(config.sample, null_failure_of(config))
    if guide := config.sample.guide_ckpt:
        lines.append(check_guide_file(config, guide))
    weights = config.vae.ckpt_path or tokenizer.ckpt_path
    if not weights:
        raise LightningDiTError(f"{config.source} names no vae.ckpt_path", "python step3_setup_configs.py")
    lines.append(check_tokenizer_file(tokenizer, weights))
    check_latent_shape(config, tokenizer)
    check_tokenizer_of_latents(config)
    load_stats(config)
    channels, guided = config.model.in_chans, guidance_of(config.sample).guided_channels
    if guided != "all" and guided > channels:
        raise LightningDiTError(
            f"{config.source}: sample.guided_channels is {guided}, and model.in_chans {channels}",
            f'set guided_channels to {channels} at most, or to "all"',
        )
    lines.append(f"solver {solver_of(config, config.sample).describe()}")
    where = config.data.data_path or config.vae.ckpt_path
    lines.append(f"latent statistics in {where}: {channels} channels")
    return lines
