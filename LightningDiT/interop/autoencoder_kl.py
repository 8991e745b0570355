"""A tokenizer to and from diffusers' `AutoencoderKL`: names, config.json, statistics as latents_mean and latents_std.

diffusers is not needed. A folder in its layout also loads as it is, where vae.ckpt_path names it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from LightningDiT.checkpoint import WRITTEN_BY, inspect, load_weights, save_weights, written_by
from LightningDiT.config import as_yaml
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_target, holding, refuse_inputs, write_text
from LightningDiT.formats import diffusers_vae
from LightningDiT.tokenizer.autoencoder import AutoencoderSettings
from LightningDiT.tokenizer.config import TokenizerConfig, tokenizer_values
from LightningDiT.tokenizer.latents import METADATA_KEYS, LatentStats
from LightningDiT.tokenizer.vavae import TRAINING_PREFIXES, autoencoder_settings, check_tokenizer_file

OLDEST = "0.32.2"  # release of diffusers that reads what is written here
TOOL = "convert_tokenizer"
#: Mark of config.json as it is written here, in earlier releases too; diffusers sorts its keys.
UNSORTED = f'"_class_name": "{diffusers_vae.CLASS_NAME}",\n  "_diffusers_version": "{OLDEST}",\n  "in_channels": '
WEIGHTS, YAML, STATS = "tokenizer.safetensors", "tokenizer.yaml", "latents_stats.pt"  # of our layout


def stats_beside(weights: str | Path) -> LatentStats | None:
    """Return the statistics that belong to a tokenizer's weights: in config.json, in their metadata, or beside them.

    Raises:
        LightningDiTError: there are some, and they are damaged.
    """
    if diffusers_vae.folder_of(weights):
        return LatentStats.of_diffusers(weights)
    metadata, file = inspect(weights).metadata, Path(weights).with_name(STATS)
    if all(key in metadata for key in METADATA_KEYS):
        return LatentStats.from_metadata(metadata, weights)
    return LatentStats.load(file) if file.is_file() else None


def diffusers_config(settings: AutoencoderSettings, stats: LatentStats | None, told: dict[str, Any]) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        told: what the tensors say, see `diffusers_vae.theirs`.

    Raises:
        LightningDiTError: diffusers has no such network.
    """
    if settings.ch_mult[0] != 1:
        raise LightningDiTError(
            f"ddconfig.ch_mult is {list(settings.ch_mult)}; AutoencoderKL of diffusers needs 1 as its first factor",
            "keep the tokenizer in its own layout",
        )
    levels = range(len(settings.ch_mult))
    attends = [settings.resolution >> level in settings.attn_resolutions for level in levels]
    config = {
        "_class_name": diffusers_vae.CLASS_NAME,
        "_diffusers_version": OLDEST,
        **diffusers_vae.DEFAULTS,
        "in_channels": settings.in_channels,
        "out_channels": settings.out_ch,
        "down_block_types": [diffusers_vae.DOWN_BLOCKS[attention] for attention in attends],
        "up_block_types": [diffusers_vae.UP_BLOCKS[attention] for attention in reversed(attends)],
        "block_out_channels": [settings.level_channels(level) for level in levels],
        "layers_per_block": settings.num_res_blocks,
        "sample_size": settings.resolution,
        "scaling_factor": stats.multiplier if stats else 1.0,
        **told,
    }
    if stats and not stats.is_identity:
        more = told["latent_channels"] - stats.mean.numel()
        config["latents_mean"] = stats.mean.flatten().tolist() + [0.0] * more
        config["latents_std"] = stats.std.flatten().tolist() + [1.0] * more
    return config


def check_target_folder(folder: Path, back: bool, inputs: Iterable[str | Path | None]) -> None:
    """Raise LightningDiTError if `to_diffusers` or `from_diffusers` would replace a file that no conversion wrote.

    Args:
        back: `from_diffusers` writes.
        inputs: files that are read, see `refuse_inputs`.
    """
    weights = folder / (WEIGHTS if back else diffusers_vae.WEIGHTS[0])
    listed, of_tool = folder / diffusers_vae.CONFIG_NAME, written_by(TOOL)

    def ours(path: Path) -> bool:
        """Weights carry the tool's name; the other files have that of the weights, or the order of our keys."""
        return of_tool(weights) or (not back and holding(UNSORTED)(listed))

    for path in (weights, folder / STATS, folder / YAML) if back else (weights, listed):
        refuse_inputs(path, inputs)
        check_target(path, ours)


def to_diffusers(config: TokenizerConfig, weights: str | Path, stats: LatentStats | None, folder: Path | None) -> str:
    """Write a tokenizer as a folder that diffusers' `AutoencoderKL.from_pretrained` loads, and say what it holds.

    Args:
        weights: our file, of which the parts of a training are left out.
        folder: None: nothing is written.

    Raises:
        LightningDiTError: the file does not fit the settings, or diffusers has no such network.
    """
    check_tokenizer_file(config, weights)
    settings = autoencoder_settings(config)
    if stats and stats.mean.numel() != settings.embed_dim:
        raise LightningDiTError(
            f"the statistics have {stats.mean.numel()} channels and the latents {settings.embed_dim}",
            "name the latents_stats.pt of this tokenizer by --stats",
        )
    tensors = {name: value for name, value in load_weights(weights).items() if not name.startswith(TRAINING_PREFIXES)}
    named, told = diffusers_vae.theirs(tensors)
    values = diffusers_config(settings, stats, told)
    if folder is not None:
        diffusers_vae.folder_of(folder)  # refuses that of another class
        save_weights(named, folder / diffusers_vae.WEIGHTS[0], {"format": "pt", WRITTEN_BY: TOOL})
        write_text(folder / diffusers_vae.CONFIG_NAME, json.dumps(values, indent=2) + "\n")
    filled = f", {told['latent_channels'] - settings.embed_dim} of them filled up by zeros"
    channels = (
        f"{told['latent_channels']} latent channels{filled if settings.embed_dim < told['latent_channels'] else ''}"
    )
    return f"{diffusers_vae.CLASS_NAME} of diffusers: {len(named)} tensors, {channels}, {_about(stats)}"


def from_diffusers(config: TokenizerConfig, weights: str | Path, stats: LatentStats | None, folder: Path | None) -> str:
    """Write a tokenizer in diffusers' layout as ours: tokenizer.yaml, weights with the statistics, latents_stats.pt.

    Args:
        weights: in diffusers' layout.
        folder: None: nothing is written.

    Raises:
        LightningDiTError: the file does not fit the settings.
    """
    check_tokenizer_file(config, weights)
    tensors = load_weights(weights)
    if folder is not None:
        save_weights(tensors, folder / WEIGHTS, {**(stats.as_metadata() if stats else {}), WRITTEN_BY: TOOL})
        if stats:
            stats.save(folder / STATS)
        write_text(folder / YAML, as_yaml({"ckpt_path": WEIGHTS, **tokenizer_values(config)}))
    return f"tokenizer: {len(tensors)} tensors, {config.embed_dim} latent channels, {_about(stats)}"


def _about(stats: LatentStats | None) -> str:
    return "statistics of each channel" if stats else "no statistics, so extract latents to have some"


def converted(config: TokenizerConfig, weights: str | Path, stats: LatentStats | None, folder: Path | None) -> str:
    """Write a tokenizer in the layout that it does not have, see `to_diffusers` and `from_diffusers`."""
    write = from_diffusers if diffusers_vae.folder_of(weights) else to_diffusers
    return write(dataclasses.replace(config, ckpt_path=str(weights)), weights, stats, folder)
