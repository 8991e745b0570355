"""Typed settings of a tokenizer: its YAML and its training. Nothing here needs torch."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LightningDiT.config import (
    LENGTH,
    Config,
    absolute_path,
    as_mapping,
    coerce,
    is_length,
    is_not_negative,
    is_positive,
    is_seed,
    is_share,
    read_yaml,
    real_path,
    refuse_unknown,
    typed,
)
from LightningDiT.errors import LightningDiTError
from LightningDiT.formats import diffusers_vae

TOKENIZER_CONFIGS = Path(__file__).parent / "configs"
TOKENIZER_FIX = f"name a tokenizer YAML, such as those in {TOKENIZER_CONFIGS}"


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How a tokenizer is trained. A weight of 0 leaves the term, and the network that it needs, out of the loss."""

    max_steps: int = 20_000  # optimiser steps of the whole run
    epochs: int | None = None  # replaces max_steps
    batch_size: int = 32  # in all processes together
    seed: int = 0  # of the order of the images, the mirroring and the posterior's noise
    flip: bool = False  # mirror half of the images; wrong if left and right differ in meaning
    weight_init: str | None = None  # file to start from: a published checkpoint or another run's training.safetensors
    lr: float = 1e-3  # learning rate after the warm-up, of the autoencoder and the discriminator
    beta1: float = 0.9  # decay of Adam's first moment
    beta2: float = 0.99  # decay of Adam's second moment
    warmup_steps: int | float = 0.01  # linear rise of the learning rate; below 1: a share of all steps
    decay_steps: int | float | None = None  # cosine fall to zero, a length like that; default: all after the warm-up
    max_grad_norm: float | None = 1.0  # the gradient's norm is clipped to this
    trainable: str = "all"  # all | decoder: the latents stay as they are
    precision: str = "auto"  # of matrix products: auto (bf16 if it is native, else fp32) | fp32 | bf16
    ema_decay: float = 0.999  # of the averaged weights, which are what is kept
    l1_weight: float = 1.0  # on the mean absolute error per value, images in [-1, 1]
    l2_weight: float = 1.0  # on the mean squared error per value
    kl_weight: float = 1e-6  # on the KL in nats per image
    sum_values: bool = False  # sum the reconstruction terms over an image's values, as published; False: mean
    logvar_init: float = 0.0  # logarithm of the divisor of the reconstruction terms
    learn_logvar: bool = False  # train that logarithm too
    texture_weight: float = 0.0  # on the distance between log energies of local texture, which keeps speckle
    lpips_weight: float = 0.0  # on LPIPS, the distance in features of VGG-16
    lpips_weights: str | None = None  # file with VGG-16; default: torch.hub's cache, else a download
    disc_weight: float = 0.0  # on the adversarial term, times the adaptive weight
    disc_start: int = 1  # first step with the discriminator, counted from 1
    disc_layers: int = 3  # convolutions that halve the resolution
    vf_weight: float = 0.0  # on the alignment with the vision model
    adaptive_vf: bool = True  # multiply it by the ratio of gradient norms at the encoder's last layer
    cos_weight: float = 1.0  # on the cosine term of the alignment
    distmat_weight: float = 1.0  # on the distance-matrix term of the alignment
    cos_margin: float = 0.0  # cosines nearer to 1 than this cost nothing
    distmat_margin: float = 0.0  # differences between the distance matrices below this cost nothing
    vision_model: str | None = None  # dinov2 | mae | a name of timm's; default: model.params.use_vf
    vision_weights: str | None = None  # file with timm's names; default: from the hub
    vision_size: int | None = None  # its input in pixels a side; default: what gives its grid the size of the latents'
    vision_input: str = "own"  # own: normalised as in its training | published: images in [-1, 1]
    log_every: int = 100  # steps between two lines of the log
    ckpt_every: int = 500  # steps between two checkpoints


@dataclass(frozen=True)
class TokenizerConfig:
    """One tokenizer YAML of the published schema."""

    ckpt_path: str | None = None  # weights
    embed_dim: int = 32  # channels of the latent
    ddconfig: dict[str, Any] = field(default_factory=dict)  # fields of `AutoencoderSettings`, which checks them
    use_vf: str | None = None  # vision model by its published name
    reverse_proj: bool = True  # project latents to the features' width; False: features to the latents' width
    lossconfig: dict[str, Any] = field(default_factory=dict)  # see `tokenizer_training`
    train: TokenizerTrainConfig = field(default_factory=TokenizerTrainConfig)
    train_keys: tuple[str, ...] = ()  # keys of `train` that the file sets
    source: str = ""  # the file that was read


SCALAR_PARAMS = ("embed_dim", "use_vf", "reverse_proj")  # fields that `model.params` sets directly
PUBLISHED_LOSS = "LPIPSWithDiscriminator"
#: Keys of the published `lossconfig.params`, their fields in `TokenizerTrainConfig`, and their published defaults.
LOSS_KEYS: tuple[tuple[str, str, Any], ...] = (
    ("disc_start", "disc_start", 1),
    ("logvar_init", "logvar_init", 0.0),
    ("kl_weight", "kl_weight", 1.0),
    ("pixelloss_weight", "l1_weight", 1.0),
    ("perceptual_weight", "lpips_weight", 1.0),
    ("disc_num_layers", "disc_layers", 3),
    ("disc_weight", "disc_weight", 1.0),
    ("vf_weight", "vf_weight", 100.0),
    ("adaptive_vf", "adaptive_vf", False),
    ("cos_margin", "cos_margin", 0.0),
    ("distmat_margin", "distmat_margin", 0.0),
    ("cos_weight", "cos_weight", 1.0),
    ("distmat_weight", "distmat_weight", 1.0),
)
#: Keys of the published `lossconfig.params` for which one value is supported.
FIXED_LOSS_KEYS: dict[str, Any] = {
    "disc_in_channels": 3,
    "disc_factor": 1.0,
    "use_actnorm": False,
    "disc_conditional": False,
    "disc_loss": "hinge",
    "pp_style": False,
}
WEIGHTS = ("l1_weight", "l2_weight", "kl_weight", "texture_weight", "lpips_weight", "disc_weight", "vf_weight")
TRAINABLE = ("all", "decoder")
#: What the fields of `TokenizerTrainConfig` must be, beyond their types: name, test, words for the message.
TOKENIZER_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *((name, is_positive, "a positive number") for name in ("max_steps", "batch_size", "log_every", "ckpt_every")),
    *((name, lambda value: 0 <= value < math.inf, "0 (off) or a positive weight") for name in WEIGHTS),
    *((name, lambda value: 0 <= value < math.inf, "0 or more") for name in ("cos_weight", "distmat_weight")),
    ("disc_start", is_not_negative, "0 or more"),
    ("warmup_steps", is_length, LENGTH),
    *((name, lambda value: 0 <= value < 1, "a decay from 0 to below 1") for name in ("beta1", "beta2")),
    ("seed", is_seed, "a whole number from 0 to below 2^32"),
    ("lr", lambda value: 0 < value < 1, "a rate between 0 and 1"),
    ("ema_decay", is_share, "a share between 0 and 1"),
    ("max_grad_norm", lambda value: value is None or value > 0, "a positive norm, or none"),
    ("decay_steps", lambda value: value is None or is_length(value), LENGTH),
    ("logvar_init", lambda value: -30 <= value <= 30, "a logarithm from -30 to 30"),
    *((name, lambda value: 0 <= value <= 2, "a margin from 0 to 2") for name in ("cos_margin", "distmat_margin")),
    ("epochs", lambda value: value is None or value > 0, "a positive number"),
    ("trainable", lambda value: value in TRAINABLE, "all or decoder"),
    ("precision", lambda value: value in ("auto", "fp32", "bf16"), "auto, fp32 or bf16"),
    ("disc_layers", lambda value: 1 <= value <= 5, "1 to 5 layers"),
    ("vision_size", lambda value: value is None or value > 0, "a positive number of pixels"),
    ("vision_input", lambda value: value in ("own", "published"), "own or published"),
)


def tokenizer_training(config: TokenizerConfig) -> TokenizerTrainConfig:
    """Return the settings of a tokenizer's training: `train`, completed by `lossconfig` and `use_vf`.

    Raises:
        LightningDiTError: a value is impossible, unsupported, or set twice.
    """
    values: dict[str, Any] = {"vision_model": config.train.vision_model or config.use_vf}
    if config.lossconfig:
        values |= _published_loss(config)
    train = dataclasses.replace(config.train, **values)
    for name, good, expected in TOKENIZER_RULES:
        value = getattr(train, name)
        if not good(value):
            raise LightningDiTError(
                f"{config.source}: train.{name} is {value!r}; {expected} is expected", "edit that value"
            )
    if train.vf_weight and not train.vision_model:
        raise LightningDiTError(
            f"{config.source}: train.vf_weight is {train.vf_weight:g} and no vision model is named",
            "set train.vision_model: dinov2 or train.vf_weight: 0",
        )
    if train.vf_weight and train.trainable == "decoder":
        raise LightningDiTError(
            f"{config.source}: train.vf_weight is {train.vf_weight:g}, but train.trainable: decoder leaves the latents,"
            " which it aligns, as they are",
            "set train.vf_weight: 0",
        )
    return train


#: Keys of a tokenizer's training that act only while another one is not 0.
NEEDS = {
    "disc_weight": ("disc_start", "disc_layers"),
    "lpips_weight": ("lpips_weights",),
    "vf_weight": (
        *("adaptive_vf", "cos_weight", "distmat_weight", "cos_margin", "distmat_margin"),
        *("vision_model", "vision_weights", "vision_size", "vision_input"),
    ),
    "cos_weight": ("cos_margin",),
    "distmat_weight": ("distmat_margin",),
}


def idle_tokenizer_settings(config: TokenizerConfig) -> list[str]:
    """Return a line for each key of `train` that the file sets and that has no effect."""
    train = tokenizer_training(config)
    lines = [
        f"train.{key}: no effect with train.{needed} 0"
        for needed, keys in NEEDS.items()
        for key in keys
        if key in config.train_keys and not getattr(train, needed)
    ]
    if train.epochs and "max_steps" in config.train_keys:
        lines.append("train.max_steps: no effect with train.epochs")
    if train.trainable == "decoder" and "kl_weight" in config.train_keys and train.kl_weight:
        lines.append("train.kl_weight: no effect with train.trainable decoder, which leaves the latents as they are")
    if train.disc_weight and not train.epochs and train.disc_start > train.max_steps:
        lines.append(f"train.disc_weight: no effect, since disc_start {train.disc_start} is beyond max_steps")
    return lines


def _published_loss(config: TokenizerConfig) -> dict[str, Any]:
    """Return the fields of `TokenizerTrainConfig` that the published `lossconfig` sets."""
    where = f"{config.source}: model.params.lossconfig"
    refuse_unknown(config.lossconfig, ("target", "params"), where)
    target = str(config.lossconfig.get("target", PUBLISHED_LOSS))
    if not target.endswith(PUBLISHED_LOSS):
        raise LightningDiTError(
            f"{where}.target is {target!r}; {PUBLISHED_LOSS} is expected",
            "remove lossconfig, and set the weights in the train section",
        )
    params = as_mapping(config.lossconfig.get("params") or {}, f"{where}.params")
    refuse_unknown(params, [*(key for key, _, _ in LOSS_KEYS), *FIXED_LOSS_KEYS], f"{where}.params")
    for key, only in FIXED_LOSS_KEYS.items():
        if params.get(key, only) != only:
            raise LightningDiTError(f"{where}.params.{key} is {params[key]!r}; {only!r} is expected", "edit that value")
    hints = typing.get_type_hints(TokenizerTrainConfig)
    values = {
        ours: coerce(params.get(key, default), hints[ours], f"{where}.params.{key}") for key, ours, default in LOSS_KEYS
    }
    if not (config.train.vision_model or config.use_vf):
        values["vf_weight"] = 0.0  # the published code has no alignment without use_vf
    values |= {"l2_weight": 0.0, "sum_values": True}
    if twice := sorted(values.keys() & set(config.train_keys)):
        raise LightningDiTError(
            f"{config.source}: train.{twice[0]} is set, but model.params.lossconfig decides it", "remove one of them"
        )
    return values


def load_tokenizer_config(path: str | Path) -> TokenizerConfig:
    """Return the settings in the tokenizer YAML at `path`, its relative paths made absolute.

    Args:
        path: a YAML file; or a folder, or the config.json in it, of diffusers' AutoencoderKL.

    Raises:
        LightningDiTError: the file is missing or no YAML, a key is unknown, or a value has the wrong type.
    """
    if folder := diffusers_vae.folder_of(path):
        return _of_diffusers(folder)
    source, where = Path(path), f"{path}: model.params"
    values = read_yaml(path, TOKENIZER_FIX)
    refuse_unknown(values, ("ckpt_path", "model", "train"), str(path))
    params = as_mapping(as_mapping(values.get("model"), f"{path}: model").get("params"), where)
    refuse_unknown(params, (*SCALAR_PARAMS, "ddconfig", "lossconfig", "monitor", "ckpt_path"), where)
    section = as_mapping(values.get("train") or {}, f"{path}: train")
    train = typed(TokenizerTrainConfig, section, f"{path}: train")
    files = {name: getattr(train, name) for name in ("weight_init", "lpips_weights", "vision_weights")}
    ckpt_path = coerce(values.get("ckpt_path"), str | None, f"{path}: ckpt_path")
    config = typed(TokenizerConfig, {name: params[name] for name in SCALAR_PARAMS if name in params}, where)
    return dataclasses.replace(
        config,
        ckpt_path=absolute_path(ckpt_path, source) if ckpt_path else None,
        ddconfig=as_mapping(params.get("ddconfig"), f"{where}.ddconfig"),
        lossconfig=as_mapping(params.get("lossconfig") or {}, f"{where}.lossconfig"),
        train=dataclasses.replace(train, **{name: absolute_path(file, source) for name, file in files.items() if file}),
        train_keys=tuple(section),
        source=str(real_path(source)),
    )


def _of_diffusers(folder: Path) -> TokenizerConfig:
    """Return the settings of an AutoencoderKL in diffusers' layout."""
    sizes = diffusers_vae.read_sizes(folder)
    weights = str(diffusers_vae.weights_file(folder).resolve())
    source = str((folder / diffusers_vae.CONFIG_NAME).resolve())
    return TokenizerConfig(weights, sizes.pop("embed_dim"), ddconfig=sizes, source=source)


def tokenizer_values(config: TokenizerConfig) -> dict[str, Any]:
    """Return the content of a tokenizer YAML with these settings: that of its own file, if it is one."""
    if not diffusers_vae.folder_of(config.source):
        return read_yaml(config.source)
    return {"model": {"params": {"embed_dim": config.embed_dim, "ddconfig": config.ddconfig}}}


def tokenizer_config_path(config: Config) -> Path:
    """Return the tokenizer YAML that `config.vae.model_name` names, or config.json beside weights in diffusers' layout.

    Raises:
        LightningDiTError: it is neither a shipped name nor an existing file.
    """
    if config.vae.ckpt_path and (folder := diffusers_vae.folder_of(config.vae.ckpt_path)):
        return folder / diffusers_vae.CONFIG_NAME
    name = config.vae.model_name
    shipped = TOKENIZER_CONFIGS / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in TOKENIZER_CONFIGS.glob("*.yaml") if "_stage" not in path.stem)
    raise LightningDiTError(
        f"vae.model_name {name!r} is neither one of {', '.join(known)} nor an existing .yaml file",
        f"edit vae.model_name in {config.source or 'the configuration'}",
    )
