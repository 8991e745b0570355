"""Good numbers for a damaged latents_stats.pt: from the hub, the bundled tokenizer's file, latent
shards or images. Nothing is ever invented here but the identity that was asked for.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setup_steps import downloads, weights
from setup_steps.console import PROJECT, Progress, StepError, format_seconds
from setup_steps.fetch import free_name

if TYPE_CHECKING:
    import torch

    from LightningDiT.tokenizer.latents import LatentStats

CONFIG = PROJECT / "kaggle_inference_config.yaml"
PUBLISHED_TOKENIZER, PUBLISHED_CHANNELS = "vavae_f16d32", 32
ENCODE_BATCH = 100


@dataclass(frozen=True)
class Target:
    """The statistics in question.

    Args:
        path: the file.
        kind: "bundled", "published" (of the published tokenizer) or "other", of a tokenizer that
            only its owner knows.
        channels: how many it must have; None where nothing says so.
        reason: why it is this file.
    """

    path: Path
    kind: str
    channels: int | None
    reason: str


@dataclass(frozen=True)
class Repair:
    """Good statistics, a line that says where they come from, and the bytes of a published file."""

    stats: LatentStats
    origin: str
    content: bytes | None = None

    def save(self, path: Path) -> None:
        """Write them; a published file stays as it is to the byte, so that its hash stays right."""
        if self.content is None:
            self.stats.save(path)
        else:
            path.write_bytes(self.content)


def locate(given: Path | None, config: Path = CONFIG) -> Target:
    """Find the file in question: the one given, else the one that the written configuration uses,
    else that of the published weights in models/, else the bundled model's. A folder stands for the
    latents_stats.pt inside it; where `data.data_path` names the file and not its folder, that file
    is meant.
    """
    published = False
    if given is not None:
        path, reason = given, "named by --stats"
    else:
        used, published = _used_by(config)
        path, reason = (used, f"{config.name} uses it") if used else _without_configuration(config)
    path = path.expanduser().resolve()
    if path.is_dir() and path.suffix != ".pt":
        path = path / weights.STATS.name
    if path.parent == weights.BUNDLED.resolve():
        tokenizer = weights.BUNDLED / "tokenizer.safetensors"
        known = from_tokenizer(tokenizer).stats.mean.shape[1] if tokenizer.is_file() else None
        return Target(path, "bundled", known, reason)
    beside = [name for name in weights.published_in(path.parent) if name != path.name]
    if published or beside or path.parent == weights.MODELS.resolve():
        return Target(path, "published", PUBLISHED_CHANNELS, reason)
    return Target(path, "other", None, reason)


def _used_by(config: Path) -> tuple[Path | None, bool]:
    """What a configuration says of the statistics: where they are (None where it says nothing or is
    not there), and whether they are those of the published tokenizer.
    """
    from LightningDiT.config import load_config

    if not config.is_file():
        return None, False
    settings = load_config(config)
    used = settings.data.data_path
    return (Path(used), settings.vae.model_name == PUBLISHED_TOKENIZER) if used else (None, False)


def _without_configuration(config: Path) -> tuple[Path, str]:
    """The file of the model that is here, and why it is that one."""
    lack = f"{config.name} names no data.data_path" if config.is_file() else f"there is no {config.name}"
    published = weights.published_in(weights.MODELS)
    if published:
        return weights.MODELS / weights.STATS.name, f"{lack}, and {weights.MODELS} holds {', '.join(published)}"
    return (
        weights.BUNDLED / weights.STATS.name,
        f"{lack} and no published file in {weights.MODELS}: the bundled model's",
    )


def from_tokenizer(path: Path) -> Repair:
    """The copy of the statistics that a tokenizer's safetensors file carries in its metadata."""
    from LightningDiT.checkpoint import inspect
    from LightningDiT.tokenizer.latents import LatentStats

    stats = LatentStats.from_metadata(inspect(path).metadata, path)
    return Repair(stats, f"the copy in {path}, computed when it was trained")


def from_hub(patience: downloads.Patience = downloads.PATIENCE) -> Repair:
    """The published file, verified by its hash."""
    from LightningDiT.tokenizer.latents import LatentStats

    file = weights.STATS
    remote = downloads.describe(file.repo, file.name, patience)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / file.name
        downloads.download(remote, target, downloads.hub_token(), patience)
        origin = f"{file.repo} on the hub, commit {remote.revision[:8]}"
        return Repair(LatentStats.load(target), origin, target.read_bytes())


class Moments:
    """Count, sum and sum of squares of every channel in float64, in one pass."""

    def __init__(self) -> None:
        self.latents = self.values = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, batch: torch.Tensor) -> None:
        """Count a batch of latents (N, C, h, w)."""
        values = batch.double()
        self.total = self.total + values.sum(dim=(0, 2, 3))  # (C,)
        self.squares = self.squares + values.square().sum(dim=(0, 2, 3))  # (C,)
        self.latents += batch.shape[0]
        self.values += batch.shape[0] * batch.shape[2] * batch.shape[3]

    def stats(self, place: Path) -> LatentStats:
        """Mean and standard deviation of all that was added."""
        from LightningDiT.tokenizer.latents import LatentStats

        if self.latents < 2:
            raise StepError(f"{place} holds {self.latents} latents, at least 2 are needed")
        return LatentStats.from_moments(self.values, self.total, self.squares)


def from_latents(folder: Path) -> Repair:
    """Computed over the latents of all shards in a folder (the mirrored copies are left out, as in
    the published statistics).
    """
    from LightningDiT.data.shards import iterate_shards

    return _computed((shard["latents"] for shard in iterate_shards(folder)), folder, "latents")


def from_images(folder: Path) -> Repair:
    """Computed by encoding the training photographs in a Fashion-MNIST folder by the bundled
    tokenizer; like the latents that a transformer learns from, they are samples.
    """
    import torch

    from LightningDiT.data.images import fashion_mnist, pad_to_32
    from LightningDiT.tokenizer.vavae import VA_VAE

    images, _ = fashion_mnist(folder, train=True)
    tokenizer = VA_VAE(weights.BUNDLED / "tokenizer.yaml")
    generator = torch.Generator().manual_seed(0)
    progress = Progress("encoding", len(images), say=lambda count: f"{count:.0f} images")

    def batches() -> Iterable[torch.Tensor]:
        for start in range(0, len(images), ENCODE_BATCH):
            part = pad_to_32(images[start : start + ENCODE_BATCH])  # (N, 3, 32, 32)
            yield tokenizer.encode_images(part, generator=generator)
            progress.update(start + len(part))
        progress.close()

    return _computed(batches(), folder, "images")


def _computed(batches: Iterable[torch.Tensor], place: Path, what: str) -> Repair:
    began, moments = time.monotonic(), Moments()
    for batch in batches:
        moments.add(batch)
    seconds = format_seconds(time.monotonic() - began)
    origin = f"computed from {moments.latents} {what} in {place} ({seconds}, float64)"
    return Repair(moments.stats(place), origin)


def put_in_place(target: Target, save: Callable[[Path], None], check: bool = True) -> str | None:
    """Write new statistics; what was there is renamed to NAME.bad-1, -2, ...

    Args:
        save: writes the file it is given.
        check: the new file must be found good before it takes the place.

    Returns:
        The name that the old one has now; None where there was none.
    """
    from LightningDiT.tokenizer.latents import diagnose

    path = target.path
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    aside = None
    try:
        save(fresh)
        faults = diagnose(fresh, target.channels) if check else []
        if faults:
            raise StepError(f"the new statistics are not good either: {'; '.join(faults)}")
        if path.exists():
            aside = free_name(path, "bad")
            path.replace(aside)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return aside.name if aside else None


def plausibility(stats: LatentStats) -> str:
    """The range of the numbers, for a person to look at."""
    mean, std = stats.mean, stats.std
    return (
        f"{mean.shape[1]} channels, means {mean.min():.3f} to {mean.max():.3f}, "
        f"standard deviations {std.min():.3f} to {std.max():.3f}"
    )


def save_identity(path: Path, channels: int) -> None:
    """Write mean 0 and std 1, which the library refuses unless latents are not normalised."""
    from LightningDiT.checkpoint import save_training_state
    from LightningDiT.tokenizer.latents import LatentStats

    stats = LatentStats.identity(channels)
    save_training_state({"mean": stats.mean, "std": stats.std}, path)
