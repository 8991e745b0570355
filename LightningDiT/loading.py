"""What a configuration names: transformer, guide, statistics, transport and guidance, checked and opened."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import torch

from LightningDiT.checkpoint import check_kinds, check_shapes, inspect, load_file, without_values
from LightningDiT.config import Config, SampleConfig, setting_differences
from LightningDiT.errors import LightningDiTError, warn_user
from LightningDiT.models.lightningdit import (
    WITHOUT_TENSORS,
    LightningDiT,
    LightningDiTSettings,
    preset_name,
    preset_settings,
    settings_from_shapes,
)
from LightningDiT.tokenizer.config import TokenizerConfig
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.transport import GuidanceSettings, Transport, create_transport

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
    with as_user_error(f"{config.source}: transport"):
        return create_transport(**dataclasses.asdict(config.transport), warn=warn_user)


def guidance_of(sample: SampleConfig) -> GuidanceSettings:
    """Return how strongly, when and where guidance acts."""
    return GuidanceSettings(
        sample.cfg_scale, sample.cfg_interval_start, sample.cfg_interval_end, sample.guided_channels
    )


def model_differences(wanted: LightningDiTSettings, found: LightningDiTSettings) -> list[str]:
    """Return a text for each setting in which a configuration and a weights file have other tensors."""
    sides = ("in the file", "in the configuration")
    return setting_differences(dataclasses.asdict(found), dataclasses.asdict(wanted), WITHOUT_TENSORS, sides)


def check_transformer_file(config: Config, path: str | Path) -> str:
    """Compare the transformer's weights file with the configuration and return a line that says so."""
    info = inspect(path)
    wanted = model_settings(config)
    try:
        found = settings_from_shapes(info.shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise LightningDiTError(f"{path}: {error}", "name the transformer's weights in ckpt_path") from error
    wrong = model_differences(wanted, found)
    if wrong and found.num_classes == wanted.num_classes - 1:
        raise LightningDiTError(
            f"{path}: its class table has {wanted.num_classes} rows for the {wanted.num_classes} classes of"
            f" {config.source}; it has no row for unlabelled images (no null class), guidance cannot be used",
            "name weights that were trained with label dropout: their table has a row more",
        )
    if wrong:
        actual = preset_name(found) or f"{found.depth} layers of {found.hidden_size}"
        raise LightningDiTError(
            f"{path} holds {actual} and does not fit {config.source}: {'; '.join(wrong)}",
            "choose the model_type and sizes that belong to the file, or python step3_setup_configs.py",
        )
    with without_values():
        model = LightningDiT(wanted)
    check_shapes(model, info.shapes, path)
    check_kinds(model, info.kinds, path)
    held = f"entry {info.weights_key}" if info.weights_key else "bare weights"
    others = f"; also holds {', '.join(info.extras)}" if info.extras else ""
    return "; ".join([f"transformer {path}: {info.parameters:,} values, {held}{others}", *info.notes])


def check_guide_file(config: Config, path: str | Path) -> str:
    """Compare the guide's weights file with the configuration and return a line that says so."""
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

    The file is compared with the configuration first, so that a wrong one costs nothing, and the model is made on the
    meta device.
    """
    path = required(config, "ckpt_path")
    check_transformer_file(config, path)
    with without_values():
        model = LightningDiT(model_settings(config))
    load_file(model, path, dtype or torch.float32)
    return model.eval().requires_grad_(False)


def load_guide(config: Config, dtype: torch.dtype | None = None) -> LightningDiT | None:
    """Return the network of `sample.guide_ckpt` as `load_transformer` does, or None without one."""
    if not (path := config.sample.guide_ckpt):
        return None
    check_guide_file(config, path)
    return load_transformer(dataclasses.replace(config, ckpt_path=path), dtype)


def load_stats(config: Config) -> LatentStats:
    """Return the statistics of the latents that the configuration names; without normalisation mean 0 and std 1."""
    channels = config.model.in_chans
    if not config.data.latent_norm:
        return dataclasses.replace(LatentStats.identity(channels), multiplier=config.data.latent_multiplier)
    folder = Path(required(config, "data.data_path"))
    if folder.is_file():
        raise LightningDiTError(
            f"data.data_path {folder} is a file; the folder that holds {STATS_NAME} is expected",
            f"set data_path: {folder.parent} in {config.source}",
        )
    return LatentStats.load(folder / STATS_NAME, channels, config.data.latent_multiplier)


def required(config: Config, key: str) -> str:
    """Return the path at a dotted key, which the configuration must have."""
    if not (value := attrgetter(key)(config)):
        raise LightningDiTError(f"{config.source} names no {key}", "python step3_setup_configs.py")
    return value


@contextlib.contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turn the plain errors of the parts into the one that entry points print, with `where` in front."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raise LightningDiTError(f"{where}: {error}", "edit that value, or choose another option") from error
