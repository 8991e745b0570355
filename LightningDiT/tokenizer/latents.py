"""The statistics that normalise latents for the transformer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.checkpoint import kind_of, load_training_state
from LightningDiT.errors import LightningDiTError, fixed_by
from LightningDiT.files import atomic_path
from LightningDiT.formats import diffusers_vae

METADATA_KEYS = ("latents_mean", "latents_std")
MOST_CHANNELS = 2**16  # far beyond any tokenizer
LISTED_ENTRIES = 5


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of each latent channel.

    Attributes:
        mean: (1, C, 1, 1) float32.
        std: (1, C, 1, 1) float32, positive.
        multiplier: factor on normalised latents (`data.latent_multiplier`).
    """

    mean: Tensor
    std: Tensor
    multiplier: float = 1.0

    def normalise(self, latents: Tensor) -> Tensor:
        """Return `(latents - mean) / std * multiplier`, (N, C, h, w)."""
        return (latents - self.mean.to(latents)) / self.std.to(latents) * self.multiplier

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return `latents * std / multiplier + mean`, (N, C, h, w)."""
        return latents * self.std.to(latents) / self.multiplier + self.mean.to(latents)

    @classmethod
    def identity(cls, channels: int) -> LatentStats:
        """Return mean 0 and deviation 1, for `data.latent_norm: false`."""
        return cls(torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1))

    @property
    def is_identity(self) -> bool:
        """Whether they change nothing but by the multiplier."""
        return bool((self.mean == 0).all() and (self.std == 1).all())

    @classmethod
    def load(cls, path: str | Path, channels: int | None = None, multiplier: float = 1.0) -> LatentStats:
        """Return the statistics in `path`, a dictionary of `mean` and `std`: (C,), (C, 1, 1) or (1, C, 1, 1).

        Args:
            channels: expected number of channels; None: any.

        Raises:
            LightningDiTError: the file is missing or damaged.
        """
        mean, std = _read(path)
        _refuse(_problems(mean, std, channels), f"latent statistics {path}", path)
        return cls(mean, std, multiplier)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: str | Path) -> LatentStats:
        """Return the statistics in the metadata of a safetensors file, written by `as_metadata`."""
        try:
            values = [_by_channel(torch.tensor(json.loads(metadata[key]))) for key in METADATA_KEYS]
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError, RuntimeError) as error:
            raise LightningDiTError(f"{path} carries no latent statistics in its metadata", fix_of(path)) from error
        _refuse(_problems(*values), f"latent statistics in {path}", path)
        return cls(*values)

    @classmethod
    def of_diffusers(cls, path: str | Path | None) -> LatentStats | None:
        """Return the statistics in the config.json of an AutoencoderKL in diffusers' layout; None without any.

        Args:
            path: its folder, or its weights.
        """
        folder = diffusers_vae.folder_of(path) if path else None
        told = diffusers_vae.read_statistics(folder) if folder else None
        if told is None:
            return None
        metadata = {key: json.dumps(values) for key, values in zip(METADATA_KEYS, told, strict=True)}
        return cls.from_metadata(metadata, str(folder))

    def as_metadata(self) -> dict[str, str]:
        """Return the numbers as text for the metadata of the tokenizer's weights file."""
        tensors = (self.mean, self.std)
        return {key: json.dumps(value.flatten().tolist()) for key, value in zip(METADATA_KEYS, tensors, strict=True)}

    def save(self, path: str | Path, count: int | None = None) -> None:
        """Write `mean` and `std` as the published code reads them, atomically, if they are valid.

        Args:
            count: number of latents behind the statistics, which the file records.
        """
        _refuse(_problems(self.mean, self.std), f"latent statistics are not written to {path}", path)
        counted = {} if count is None else {"count": count}
        content = {"mean": self.mean.clone(), "std": self.std.clone(), **counted}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:  # a path's name would be in the bytes
            torch.save(content, stream)


class Moments:
    """Count, sum and sum of squares per channel in float64, accumulated in one pass.

    Attributes:
        latents: number of added latents.
        values: number of added values per channel.
    """

    def __init__(self) -> None:
        self.latents = self.values = 0
        self._total = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, latents: Tensor) -> None:
        """Add latents (N, C, h, w), on any device.

        Raises:
            LightningDiTError: latents have another number of axes or channels than before.
        """
        channels = self._total.numel() if self.latents else None
        if latents.dim() != 4 or latents.shape[1] != (channels or latents.shape[1]):
            raise LightningDiTError(
                f"latents have the shape {list(latents.shape)}; [N, {channels or 'C'}, h, w] is expected",
                "give latents of one tokenizer",
            )
        values = latents.detach().cpu().double()
        self.latents += len(values)
        self.values += values[:, 0].numel()
        self._total = self._total + values.sum((0, 2, 3))  # (C,)
        self._squares = self._squares + values.square().sum((0, 2, 3))  # (C,)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values, from which `merge` restores them exactly."""
        sums = {"total": self._total, "squares": self._squares}
        return {"latents": self.latents, "values": self.values, **{name: x.tolist() for name, x in sums.items()}}

    def merge(self, moments: Mapping[str, Any]) -> None:
        """Add moments in the form of `as_dict`."""
        self.latents += moments["latents"]
        self.values += moments["values"]
        self._total = self._total + torch.tensor(moments["total"], dtype=torch.float64)
        self._squares = self._squares + torch.tensor(moments["squares"], dtype=torch.float64)

    def stats(self) -> LatentStats:
        """Return mean and standard deviation of all added latents.

        Raises:
            LightningDiTError: there are fewer than two values per channel.
        """
        if self.values < 2:
            raise LightningDiTError(f"statistics of {self.latents} latents; at least 2 are needed", "give more data")
        mean = self._total / self.values
        variance = (self._squares / self.values - mean.square()) * (self.values / (self.values - 1))
        return LatentStats(*(x.float().view(1, -1, 1, 1) for x in (mean, variance.clamp_min(0).sqrt())))


def fix_of(path: str | Path) -> str:
    """Return the command that repairs the statistics file at `path`."""
    return f"python fix_latents_stats.py --stats {shlex.quote(str(path))}"


def diagnose(path: str | Path, channels: int | None = None) -> list[str]:
    """Return what is wrong with the statistics file at `path`; an empty list if nothing is."""
    try:
        return _problems(*_read(path), channels)
    except LightningDiTError as error:
        return [error.message]


def _read(path: str | Path) -> tuple[Tensor, Tensor]:
    with fixed_by(fix_of(path)):
        content = load_training_state(path)
    found = [content.get(key) for key in ("mean", "std")]
    if not all(isinstance(value, Tensor) for value in found):
        listed = ", ".join(f"{key} ({type(value).__name__})" for key, value in list(content.items())[:LISTED_ENTRIES])
        raise LightningDiTError(
            f"latent statistics {path} has the entries {listed or 'none'}; tensors `mean` and `std` are expected",
            fix_of(path),
        )
    return _by_channel(found[0]), _by_channel(found[1])


def _by_channel(values: Tensor) -> Tensor:
    """Return (1, C, 1, 1) float32 for real numbers (C,), (C, 1, 1) or (1, C, 1, 1), all else as it is."""
    shape = tuple(values.shape)
    flat = len(shape) == 1 or (len(shape) == 3 and shape[1:] == (1, 1))
    if kind_of(values) != "real" or values.numel() > MOST_CHANNELS:
        return values
    return (values.reshape(1, -1, 1, 1) if flat and values.numel() else values).detach().float()


def _refuse(problems: list[str], title: str, path: str | Path) -> None:
    if problems:
        raise LightningDiTError(f"{title}: {'; '.join(problems)}", fix_of(path))


def _problems(mean: Tensor, std: Tensor, channels: int | None = None) -> list[str]:
    """Return what is wrong with the numbers."""
    for name, value in (("mean", mean), ("std", std)):
        if (kind := kind_of(value)) != "real":
            return [f"{name} is {kind}; real numbers are expected"]
        shape = tuple(value.shape)
        wanted = channels if channels is not None else (shape[1] if len(shape) == 4 and value.numel() else "C")
        if shape != (1, wanted, 1, 1) or value.numel() > MOST_CHANNELS:
            return [f"{name} has the shape {list(shape)}; [1, {wanted}, 1, 1] is expected"]
    if mean.shape != std.shape:
        return [f"mean has {mean.shape[1]} channels and std {std.shape[1]}"]
    problems = [
        f"{name} is not finite in {int((~torch.isfinite(value)).sum())} of {value.numel()} channels"
        for name, value in (("mean", mean), ("std", std))
        if not torch.isfinite(value).all()
    ]
    if problems:
        return problems
    if (std <= 0).any():
        return [f"std is not positive in {int((std <= 0).sum())} of {std.numel()} channels"]
    if LatentStats(mean, std).is_identity:
        return ["mean is 0 and std is 1 in every channel: placeholder numbers, which ruin every image"]
    return []
