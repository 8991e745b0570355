"""What a configuration names: transformer, guide, statistics, transport and guidance, checked and opened."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.checkpoint import (
    LISTED_NAMES,
    CheckpointInfo,
    check_kinds,
    check_shapes,
    inspect,
    load_file,
    load_into,
    load_weights,
    without_values,
)
from LightningDiT.config import Config, SampleConfig, setting_differences
from LightningDiT.errors import LightningDiTError, warn_user
from LightningDiT.models import lightningdit
from LightningDiT.models.adapters import ALPHA, BASE, KIND, RANK, base_digest, merged, merged_shapes
from LightningDiT.models.lightningdit import (
    WITHOUT_TENSORS,
    LightningDiT,
    LightningDiTSettings,
    preset_name,
    preset_settings,
)
from LightningDiT.models.unet import (
    PACKAGE,
    UNET_WITHOUT_TENSORS,
    UNet,
    UNetSettings,
    is_unet,
    unet_name,
    unet_names,
    unet_settings,
    unet_settings_from_shapes,
)
from LightningDiT.tokenizer.config import TokenizerConfig
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.transport import GuidanceSettings, Transport, create_transport

STATS_NAME = "latents_stats.pt"
LATENT_SIDE = "latent_side"  # key in the metadata of a U-Net's weights, whose tensors do not show it
ADAPTER_FIX = "set ckpt_path to the file that train.weight_init named, or set the adapter_path that belongs to it"

Network = LightningDiT | UNet
NetworkSettings = LightningDiTSettings | UNetSettings


def model_settings(config: Config) -> NetworkSettings:
    """Return the settings of the transformer or the U-Net that a configuration describes."""
    model, both = config.model, _common_settings(config)
    with as_user_error(f"{config.source}: model"):
        if model.model_type in unet_names():
            return unet_settings(model.model_type, **both)
        return preset_settings(
            _transformer_name(model.model_type),
            learn_sigma=model.learn_sigma,
            use_qknorm=model.use_qknorm,
            use_swiglu=model.use_swiglu,
            use_rope=model.use_rope,
            use_rmsnorm=model.use_rmsnorm,
            wo_shift=model.wo_shift,
            use_checkpoint=model.use_checkpoint or config.train.use_checkpoint,
            **both,
        )


def _transformer_name(name: str) -> str:
    try:
        preset_settings(name)
    except ValueError as error:
        raise ValueError(f"{error}, or {', '.join(unet_names())}") from error
    return name


def _common_settings(config: Config) -> dict[str, Any]:
    """Return the settings that transformer and U-Net share, by field."""
    return {
        "input_size": config.data.image_size // config.vae.downsample_ratio,
        "in_channels": config.model.in_chans,
        "num_classes": config.data.num_classes,
        "num_conditions": config.data.num_conditions,
        "augmentation": config.model.augmentation,
        "dropout": config.model.dropout,
    }


def make_model(settings: NetworkSettings, **changes: Any) -> Network:
    """Return the network of these settings with random weights.

    Args:
        changes: settings that replace those of `settings`.

    Raises:
        LightningDiTError: it is a U-Net, and its package is not installed.
    """
    if isinstance(settings, LightningDiTSettings):
        return LightningDiT(settings, **changes)
    try:
        return UNet(settings, **changes)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != PACKAGE:
            raise
        raise LightningDiTError(f"a U-Net needs {PACKAGE}, which is not installed", f"pip install {PACKAGE}") from error


def settings_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> NetworkSettings:
    """Return the settings of the network that tensors of these names and shapes belong to.

    Raises:
        ValueError: the names are those of no network.
    """
    return unet_settings_from_shapes(shapes) if is_unet(shapes) else lightningdit.settings_from_shapes(shapes)


def build_transport(config: Config) -> Transport:
    """Return the transport that a configuration describes."""
    with as_user_error(f"{config.source}: transport"):
        return create_transport(**dataclasses.asdict(config.transport), warn=warn_user)


def guidance_of(sample: SampleConfig) -> GuidanceSettings:
    """Return how strongly, when and where guidance acts."""
    return GuidanceSettings(
        sample.cfg_scale, sample.cfg_interval_start, sample.cfg_interval_end, sample.guided_channels
    )


def model_differences(wanted: NetworkSettings, found: NetworkSettings) -> list[str]:
    """Return a text for each setting in which a configuration and a weights file have other tensors.

    Both must be of one kind, transformers or U-Nets.
    """
    sides = ("in the file", "in the configuration")
    ignored = WITHOUT_TENSORS if isinstance(wanted, LightningDiTSettings) else UNET_WITHOUT_TENSORS
    return setting_differences(_by_name(found), _by_name(wanted), ignored, sides)


def network_metadata(settings: NetworkSettings) -> dict[str, str]:
    """Return what the metadata of weights say of a network beyond its tensors."""
    return {LATENT_SIDE: str(settings.input_size)} if isinstance(settings, UNetSettings) else {}


def _by_name(settings: NetworkSettings) -> dict[str, Any]:
    """Return settings as values that a message can show."""
    values = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def network_name(settings: NetworkSettings) -> str:
    """Return the preset of these sizes, or the sizes in words."""
    if isinstance(settings, UNetSettings):
        return unet_name(settings) or f"a U-Net of {' and '.join(map(str, settings.widths))} channels"
    return preset_name(settings) or f"{settings.depth} layers of {settings.hidden_size}"


def check_transformer_file(config: Config, path: str | Path) -> str:
    """Compare the network's weights file, of a transformer or a U-Net, with the configuration; return a line about it.

    Raises:
        LightningDiTError: it is of another kind or size.
    """
    info, wanted = inspect(path), model_settings(config)
    if config.adapter_path:
        info = _with_adapter(config, info)
    try:
        found = settings_from_shapes(info.shapes)
    except (ValueError, KeyError, IndexError) as error:
        raise LightningDiTError(f"{path}: {error}", "name the transformer's weights in ckpt_path") from error
    _refuse_further_tensors(path, info, found)
    _refuse_another_network(config, path, wanted, found)
    if (side := info.metadata.get(LATENT_SIDE, str(wanted.input_size))) != str(wanted.input_size):
        raise LightningDiTError(
            f"{path} was trained on latents of side {side}; {config.source} describes {wanted.input_size}",
            "set the data.image_size and vae.downsample_ratio that belong to the file",
        )
    with without_values():
        model = make_model(wanted)
    check_shapes(model, info.shapes, path)
    check_kinds(model, info.kinds, path)
    held = f"entry {info.weights_key}" if info.weights_key else "bare weights"
    others = f"; also holds {', '.join(info.extras)}" if info.extras else ""
    kind = "transformer" if isinstance(wanted, LightningDiTSettings) else "U-Net"
    return "; ".join([f"{kind} {path}: {info.parameters:,} values, {held}{others}", *info.notes])


def _refuse_further_tensors(path: str | Path, info: CheckpointInfo, found: NetworkSettings) -> None:
    """Raise LightningDiTError for tensors beyond those of the network that a file holds: nobody knows what they do."""
    with without_values():
        known = make_model(found).state_dict().keys()
    if further := [name for name in info.shapes if name not in known]:
        listed = ", ".join(further[:LISTED_NAMES]) + (" ..." if len(further) > LISTED_NAMES else "")
        raise LightningDiTError(
            f"{path} holds {network_name(found)} and tensors that it does not have ({len(further)}): {listed};"
            " it may compute something else",
            "use the program that this file was published with, or weights without these tensors",
        )


def _refuse_another_network(config: Config, path: str | Path, wanted: NetworkSettings, found: NetworkSettings) -> None:
    """Raise LightningDiTError if the network in a file is not the one that the configuration describes."""
    fix = "choose the model_type and sizes that belong to the file, or python step3_setup_configs.py"
    if type(wanted) is not type(found):
        raise LightningDiTError(
            f"{path} holds {network_name(found)} and does not fit {config.source}, whose model_type is"
            f" {config.model.model_type}",
            fix,
        )
    wrong = model_differences(wanted, found)
    if wrong and found.num_classes == wanted.num_classes - 1:
        raise LightningDiTError(
            f"{path}: its class table has {wanted.num_classes} rows for the {wanted.num_classes} classes of"
            f" {config.source}; it has no row for unlabelled images (no null class), guidance cannot be used",
            "name weights that were trained with label dropout: their table has a row more",
        )
    if wrong:
        raise LightningDiTError(
            f"{path} holds {network_name(found)} and does not fit {config.source}: {'; '.join(wrong)}", fix
        )


def _with_adapter(config: Config, info: CheckpointInfo) -> CheckpointInfo:
    """Return what a weights file holds once the adapter of a configuration is in it."""
    adapter = inspect(str(config.adapter_path))
    _adapter_scale(adapter)
    with without_values():
        wanted = make_model(model_settings(config)).state_dict()
    shapes = {name: shape for name, shape in merged_shapes(info.shapes, adapter.shapes).items() if name in wanted}
    kinds = {name: kind for name, kind in (info.kinds | adapter.kinds).items() if name in wanted}
    return dataclasses.replace(
        info,
        shapes=shapes,
        kinds=kinds,
        metadata=info.metadata | adapter.metadata,
        notes=(*info.notes, *adapter.notes, f"adapter {adapter.path}"),
    )


def _adapter_scale(adapter: CheckpointInfo) -> float:
    """Return the factor on the products B A of an adapter.

    Raises:
        LightningDiTError: the file is no adapter.
    """
    told = adapter.metadata
    try:
        if not all(name in told for name in (KIND, BASE)):
            raise ValueError(f"its metadata have no {KIND}")
        return float(json.loads(told.get(ALPHA, "1"))) / float(json.loads(told.get(RANK, "1")))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise LightningDiTError(
            f"adapter_path {adapter.path} is no adapter ({error})",
            "name the adapter.safetensors of a training with train.trainable",
        ) from error


def adapted_weights(config: Config) -> dict[str, Tensor]:
    """Return the weights of `config.ckpt_path` with those of `config.adapter_path` in them.

    Raises:
        LightningDiTError: either file does not fit, or the adapter was trained on other weights.
    """
    path, adapter = required(config, "ckpt_path"), inspect(str(config.adapter_path))
    scale, changes = _adapter_scale(adapter), load_weights(adapter.path)
    with without_values():
        names = make_model(model_settings(config)).state_dict().keys()
    base = {name: value for name, value in load_weights(path).items() if name in names}
    if missing := [name for name in names if name not in base and name not in changes]:
        raise LightningDiTError(f"neither {path} nor {adapter.path} has the tensor {missing[0]}", ADAPTER_FIX)
    if json.dumps(base_digest(base, changes, names)) != adapter.metadata[BASE]:
        raise LightningDiTError(f"the adapter {adapter.path} was trained on other weights than {path}", ADAPTER_FIX)
    with as_user_error(str(adapter.path)):
        return merged(base, changes, scale)


def check_guide_file(config: Config, path: str | Path) -> str:
    """Compare the guide's weights file with the configuration and return a line that says so."""
    config = dataclasses.replace(config, adapter_path=None)
    try:
        return f"guide {check_transformer_file(config, path).partition(' ')[2]}"
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


def load_transformer(config: Config, dtype: torch.dtype | None = None) -> Network:
    """Return the transformer or the U-Net in eval mode with the weights of `config.ckpt_path`, and of its adapter.

    The file is compared with the configuration first, so that a wrong one costs nothing, and the model is made on the
    meta device.
    """
    path = required(config, "ckpt_path")
    check_transformer_file(config, path)
    with without_values():
        model = make_model(model_settings(config))
    if config.adapter_path:
        adapted, kind = adapted_weights(config), dtype or torch.float32
        weights = {name: value.to(kind) if value.is_floating_point() else value for name, value in adapted.items()}
        load_into(model, weights, config.adapter_path)
    else:
        load_file(model, path, dtype or torch.float32)
    return model.eval().requires_grad_(False)


def load_guide(config: Config, dtype: torch.dtype | None = None) -> Network | None:
    """Return the network of `sample.guide_ckpt` as `load_transformer` does, or None without one."""
    if not (path := config.sample.guide_ckpt):
        return None
    check_guide_file(config, path)
    return load_transformer(dataclasses.replace(config, ckpt_path=path, adapter_path=None), dtype)


def load_stats(config: Config) -> LatentStats:
    """Return the statistics of the latents that the configuration names; without normalisation mean 0 and std 1.

    Without data.data_path they are those that a tokenizer in diffusers' layout tells.
    """
    channels = config.model.in_chans
    if not config.data.latent_norm:
        return dataclasses.replace(LatentStats.identity(channels), multiplier=config.data.latent_multiplier)
    if not config.data.data_path and (told := LatentStats.of_diffusers(config.vae.ckpt_path)):
        return dataclasses.replace(told, multiplier=config.data.latent_multiplier)
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
