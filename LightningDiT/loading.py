"""What a configuration names, opened: transformer, guide, tokenizer's shape, statistics, transport and solver."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from LightningDiT.checkpoint import check_shapes, inspect, load_file, without_values
from LightningDiT.compiling import compile_forward
from LightningDiT.config import Config, SampleConfig, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import (
    LightningDiT,
    LightningDiTSettings,
    differences,
    preset_name,
    preset_settings,
    settings_from_shapes,
)
from LightningDiT.sampling.calibrated import weights_fingerprint
from LightningDiT.sampling.solver_choice import Procedure, check_solver, guidance_of
from LightningDiT.tokenizer.config import TokenizerConfig, load_tokenizer_config, tokenizer_config_path
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import autoencoder_settings, check_tokenizer_file
from LightningDiT.transport import Transport, create_transport

STATS_NAME = "latents_stats.pt"


def model_settings(config: Config) -> LightningDiTSettings:
    """Return the transformer's settings that a configuration describes."""
    model = config.model
    with as_user_error(f"{config.source}: model"):
        return preset_settings(
            model.model_type,
            input_size=config.data.image_size // config.vae.downsample_ratio,
            in_channels=model.in_chans,
            num_classes=config.data.num_classes,
            learn_sigma=model.learn_sigma,
            use_qknorm=model.use_qknorm,
            use_swiglu=model.use_swiglu,
            use_rope=model.use_rope,
            use_rmsnorm=model.use_rmsnorm,
            wo_shift=model.wo_shift,
            use_checkpoint=model.use_checkpoint or config.train.use_checkpoint,
        )


def build_transport(config: Config) -> Transport:
    """Return the transport that a configuration describes."""
    settings = config.transport
    with as_user_error(f"{config.source}: transport"):
        return create_transport(
            path_type=settings.path_type,
            prediction=settings.prediction,
            loss_weight=settings.loss_weight,
            train_eps=settings.train_eps,
            sample_eps=settings.sample_eps,
            use_cosine_loss=settings.use_cosine_loss,
            use_lognorm=settings.use_lognorm,
        )


def verify_config(path: str | Path) -> list[str]:
    """Open everything that the configuration at `path` names; see `verify`."""
    return verify(load_config(path))


def verify(config: Config) -> list[str]:
    """Open everything that a configuration names, without reading the weights.

    Returns:
        A line for each thing that was checked.

    Raises:
        LightningDiTError: something is missing, damaged, or does not fit the rest.
    """
    check_solver(config.sample, config.transport.path_type)
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    lines = [f"configuration {config.source}: {config.model.model_type}, {config.data.num_classes} classes"]
    lines += config.notes
    lines.append(check_transformer_file(config, required(config, "ckpt_path")))
    if guide := config.sample.guide_ckpt:
        lines.append(check_guide_file(config, guide))
    weights = config.vae.ckpt_path or tokenizer.ckpt_path
    if not weights:
        raise LightningDiTError(f"{config.source} names no vae.ckpt_path", "python step3_setup_configs.py")
    lines.append(check_tokenizer_file(tokenizer, weights))
    check_latent_shape(config, tokenizer)
    load_stats(config)
    lines += check_procedure(config)
    lines.append(f"latent statistics in {config.data.data_path}: {config.model.in_chans} channels")
    return lines


def procedure_of(config: Config, sample: SampleConfig) -> Procedure:
    """Return what sampling by these settings does, with the weights that the configuration names.

    Raises:
        LightningDiTError: no such solver, none that fits, or a grid of too few points.
    """
    with as_user_error(f"{config.source}: sample"):
        fingerprint = partial(weights_fingerprint, required(config, "ckpt_path"))
        return Procedure.of(sample, build_transport(config), fingerprint)


def check_procedure(config: Config) -> list[str]:
    """Settle the solver as sampling will and return a line that says which it is."""
    channels = config.model.in_chans
    guided = guidance_of(config.sample).guided_channels
    if guided is not None and guided > channels:
        raise LightningDiTError(
            f"{config.source}: sample.guided_channels is {guided}, and model.in_chans {channels}",
            f'set guided_channels to {channels} at most, or to "all"',
        )
    return [f"solver {procedure_of(config, config.sample).describe()}"]


def check_transformer_file(config: Config, path: str | Path) -> str:
    """Compare the transformer's weights file with the configuration and return a line that says so."""
    info = inspect(path)
    wanted = model_settings(config)
    try:
        found = settings_from_shapes(info.shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise LightningDiTError(f"{path}: {error}", "name the transformer's weights in ckpt_path") from error
    if wrong := differences(wanted, found):
        actual = preset_name(found) or f"{found.depth} layers of {found.hidden_size}"
        raise LightningDiTError(
            f"{path} holds {actual} and does not fit {config.source}: {'; '.join(wrong)}",
            "choose the model_type and sizes that belong to the file, or python step3_setup_configs.py",
        )
    with without_values():
        check_shapes(LightningDiT(wanted), info.shapes, path)
    held = f"entry {info.weights_key}" if info.weights_key else "bare weights"
    besides = f", besides it {', '.join(info.extras)}" if info.extras else ""
    return f"transformer {path}: {info.parameters:,} values, {held}{besides}"


def check_guide_file(config: Config, path: str | Path) -> str:
    """Compare the guide's weights file with the configuration, as the model's is, and return a line that says so."""
    try:
        return f"guide {check_transformer_file(config, path).removeprefix('transformer ')}"
    except LightningDiTError as error:
        raise LightningDiTError(
            f"the guide {error.message}", "name weights of the model's own shape in sample.guide_ckpt or --guide-ckpt"
        ) from error


def check_latent_shape(config: Config, tokenizer: TokenizerConfig) -> None:
    """Refuse a tokenizer whose latents have other channels or another size than the model's."""
    sizes = autoencoder_settings(tokenizer)
    for key, wanted, found in (
        ("model.in_chans", config.model.in_chans, sizes.embed_dim),
        ("vae.downsample_ratio", config.vae.downsample_ratio, sizes.downsample_factor),
    ):
        if wanted != found:
            raise LightningDiTError(
                f"{config.source}: {key} is {wanted}, and {found} in the tokenizer {tokenizer.source}",
                "choose the tokenizer that belongs to the model",
            )


def load_transformer(config: Config, dtype: torch.dtype | None = None) -> LightningDiT:
    """Return the transformer in eval mode with the weights of `config.ckpt_path`.

    The model is made on the meta device after the file was compared with the configuration, so that a wrong
    file costs nothing.
    """
    path = required(config, "ckpt_path")
    check_transformer_file(config, path)
    with without_values():
        model = LightningDiT(model_settings(config))
    load_file(model, path, dtype or torch.float32)
    if config.sample.compile:
        compile_forward(model)
    return model.eval().requires_grad_(False)


def load_guide(config: Config, dtype: torch.dtype | None = None) -> LightningDiT | None:
    """Return the network of `sample.guide_ckpt` as `load_transformer` does, or None where there is none."""
    if not (path := config.sample.guide_ckpt):
        return None
    check_guide_file(config, path)
    return load_transformer(dataclasses.replace(config, ckpt_path=path), dtype)


def load_stats(config: Config) -> LatentStats:
    """Return the statistics of the latents that the configuration names."""
    channels = config.model.in_chans
    if not config.data.latent_norm:
        return LatentStats.identity(channels)
    folder = Path(required(config, "data", "data_path"))
    if folder.is_file():
        raise LightningDiTError(
            f"data.data_path {folder} is a file; the folder that holds {STATS_NAME} is expected",
            f"set data_path: {folder.parent} in {config.source}",
        )
    return LatentStats.load(folder / STATS_NAME, channels, config.data.latent_multiplier)


def required(config: Config, *keys: str) -> str:
    value: Any = config
    for key in keys:
        value = getattr(value, key)
    if not value:
        raise LightningDiTError(f"{config.source} names no {'.'.join(keys)}", "python step3_setup_configs.py")
    return value


@contextlib.contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turn the plain errors of the lower layers into the one that entry points print."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise LightningDiTError(f"{where}: {error}", "edit that value, or choose another option") from error
