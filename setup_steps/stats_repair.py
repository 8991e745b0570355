"""Good numbers for a damaged latents_stats.pt: from the hub, the bundled tokenizer's file, attached data sets, latent
shards or images. Only the identity is invented, and only on request.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.console import Progress, duration
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, free_name, read_bytes, require_replaceable, require_writable
from setup_steps import downloads, weights
from setup_steps.project import CONFIG, REPAIR, STEP2, STEP3, absolute, step_command

if TYPE_CHECKING:
    import torch

    from LightningDiT.config import Config
    from LightningDiT.data.image_sets import ImageSet
    from LightningDiT.tokenizer.latents import LatentStats
    from LightningDiT.tokenizer.vavae import VA_VAE

PUBLISHED_TOKENIZER, PUBLISHED_CHANNELS = "vavae_f16d32", 32
ENCODED_PIXELS = 1 << 18  # of a batch: 4 images of 256x256, or 256 of 32x32
MAX_IMAGES = 10_000
FEW = 1_000  # latents below which the numbers are rough: 1 / sqrt(2 x 1000) is an error of 2 %
LISTED = 3
PLAUSIBLE_STD, PLAUSIBLE_MEAN = (0.01, 100.0), 100.0
HURRIED = downloads.Patience(timeout=5.0, attempts=2, backoff=0.5)  # for the hub as one source of several


@dataclass(frozen=True)
class Target:
    """The statistics in question.

    Args:
        path: the file.
        kind: "bundled", "published" (of the published tokenizer) or "other" (of the user's own tokenizer).
        channels: the number that it must have; None if unknown.
        reason: why it is this file.
        config_fault: what is wrong with its name in the configuration.
    """

    path: Path
    kind: str
    channels: int | None
    reason: str
    config_fault: str | None = None


@dataclass(frozen=True)
class Request:
    """Where to look, by the command line.

    Args:
        latents: folder of shards; by default that of the statistics, or the configuration's.
        images: folder of images to encode.
        max_images: more images than this are thinned out evenly.
        tokenizer, checkpoint: YAML and weights of the encoder; by default those that belong to the file.
        models: folder of the published weights.
        attached: folder of attached data sets.
        config: the configuration with the statistics, shards and tokenizer.
        patience: how long to wait for the hub.
    """

    latents: Path | None = None
    images: Path | None = None
    max_images: int = MAX_IMAGES
    tokenizer: Path | None = None
    checkpoint: Path | None = None
    models: Path = field(default_factory=lambda: weights.MODELS)
    attached: Path | None = None
    config: Path = CONFIG
    patience: downloads.Patience = downloads.PATIENCE


@dataclass(frozen=True)
class Repair:
    """Good statistics: origin in words, bytes of a published file, number of latents if computed here, doubt about the
    origin.
    """

    stats: LatentStats
    origin: str
    content: bytes | None = None
    latents: int | None = None
    doubt: str = ""

    def save(self, path: Path) -> None:
        """Write them; a published file keeps its bytes, so that its hash stays right."""
        if self.content is None:
            self.stats.save(path)
        else:
            path.write_bytes(self.content)


def locate(given: Path | None, config: Path = CONFIG, models: Path | None = None) -> Target:
    """Return the file in question: the given one, else that of the written configuration, else that of the published
    weights in `models` (None: models/), else the bundled model's.

    A folder stands for the latents_stats.pt inside it. If `data.data_path` names the file instead of its folder, that
    file is meant, and the target says so.
    """
    settings, fault, models = None, None, models or weights.MODELS
    if given is not None:
        path, reason = _named(given), "named by --stats"
    else:
        settings = _settings(config)
        if settings and settings.data.data_path:
            path, reason = Path(settings.data.data_path), f"{config.name} uses it"
            if _has_moved(path, settings, models):
                path, reason = models, f"{config.name} names {path}, which is not there"
        else:
            settings, (path, reason) = None, _without_configuration(config, models)
    if path.suffix == ".pt" or path.is_file():
        path = path.parent.resolve() / path.name  # a link in models/ is replaced, not its target
        if settings:
            fault = f"data.data_path in {config.name} names the file {path}; its folder {path.parent} is expected"
    elif path.is_dir() or settings:
        path = path.resolve() / weights.STATS.name
    if path.parent == weights.BUNDLED.resolve():
        tokenizer = weights.BUNDLED / "tokenizer.safetensors"
        known = from_tokenizer(tokenizer).stats.mean.shape[1] if tokenizer.is_file() else None
        return Target(path, "bundled", known, reason, fault)
    beside = [name for name in weights.published_in(path.parent) if name != path.name]
    published = settings is not None and settings.vae.model_name == PUBLISHED_TOKENIZER
    if published or beside or path.parent == models.resolve():
        return Target(path, "published", PUBLISHED_CHANNELS, reason, fault)
    return Target(path, "other", settings.model.in_chans if settings else None, reason, fault)


def _named(path: Path) -> Path:
    """Return the file that --stats names, links kept; refuse another part of a model."""
    named = absolute(path.parent) / path.name if path.name else absolute(path)
    others = {name for file in weights.SETS["all"] for name in weights.usable_names(file)} - {weights.STATS.name}
    if named.name in others or named.suffix == ".safetensors":
        raise LightningDiTError(
            f"--stats {named} is another part of a model, latent statistics were expected",
            f"name a {weights.STATS.name}, or the folder that it belongs to",
        )
    return named


def _settings(config: Path) -> Config | None:
    """Return the written configuration; None if there is none."""
    from LightningDiT.config import load_config

    return load_config(config) if config.is_file() else None


def _has_moved(path: Path, settings: Config, models: Path) -> bool:
    """Return whether `models` holds published weights, and the settings name some whose statistics are not there."""
    names = [name for file in weights.SETS["all"] for name in weights.usable_names(file)]
    return not path.exists() and Path(settings.ckpt_path or "").name in names and bool(weights.published_in(models))


def _without_configuration(config: Path, models: Path) -> tuple[Path, str]:
    """Return the file of the model that is here, and why it is that one."""
    lack = f"{config.name} names no data.data_path" if config.is_file() else f"there is no {config.name}"
    published = weights.published_in(models)
    if published:
        return models / weights.STATS.name, f"{lack}, and {models} holds {', '.join(published)}"
    reason = f"{lack} and no published file in {models}: the bundled model's"
    return weights.BUNDLED / weights.STATS.name, reason


def from_tokenizer(path: Path) -> Repair:
    """Return the copy of the statistics in the metadata of a tokenizer's safetensors file."""
    from LightningDiT.checkpoint import inspect
    from LightningDiT.tokenizer.latents import LatentStats

    stats = LatentStats.from_metadata(inspect(path).metadata, path)
    return Repair(stats, f"the copy in {path}, computed when it was trained")


def from_bundled(target: Target, request: Request) -> Repair:
    """Return the copy in the bundled tokenizer's file."""
    return from_tokenizer(weights.BUNDLED / "tokenizer.safetensors")


def from_hub(target: Target, request: Request) -> Repair:
    """Return the published file, verified by its hash."""
    from LightningDiT.tokenizer.latents import LatentStats

    file = weights.STATS
    remote = downloads.describe(file.repo, file.name, request.patience)
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / file.name
        downloads.download(remote, fresh, downloads.hub_token(), request.patience)
        origin = f"{file.repo} on the hub, commit {remote.revision[:8]}"
        return Repair(LatentStats.load(fresh), origin, fresh.read_bytes())


def from_attached(target: Target, request: Request) -> Repair:
    """Return the first good file of that name in the attached data sets, those beside published weights first.

    Any other comes with a doubt: every tokenizer of the same number of channels has a good file of that name.
    """
    from LightningDiT.tokenizer.latents import LatentStats, diagnose

    name, folder = weights.STATS.name, request.attached
    if folder is None:
        raise LightningDiTError("no data sets are attached here", "add --attached FOLDER")
    if not folder.is_dir():
        raise LightningDiTError(f"{folder}, the folder of attached data sets, is not there", "add --attached FOLDER")
    found = [path for path in weights.search(folder, [name])[name] if path.resolve() != target.path]
    found.sort(key=lambda path: weights.published_in(path.parent) == [name])
    faults = []
    for path in found:
        wrong = diagnose(path, target.channels)
        if not wrong:
            alone = weights.published_in(path.parent) == [name]
            doubt = f"nothing beside {path} shows which tokenizer it belongs to" if alone else ""
            return Repair(LatentStats.load(path), f"the attached {path}", read_bytes(path), doubt=doubt)
        faults += wrong
    raise LightningDiTError(
        f"no good {name} below {folder}" + (f" ({'; '.join(faults)})" if faults else ""),
        "attach a data set that holds it",
    )


def from_latents(target: Target, request: Request) -> Repair:
    """Compute the statistics of all shards in a folder, without the mirrored copies as in the published ones."""
    from LightningDiT.data.shards import iterate_shards

    folder = request.latents or _folder_of_shards(target, request)
    count = len(list(folder.glob("*.safetensors")))

    def batches(progress: Progress) -> Iterator[torch.Tensor]:
        for shard in iterate_shards(folder):
            yield shard["latents"]
            progress.update()

    with Progress(count, "shard", label="reading") as progress:
        return _computed(batches(progress), f"latents in {folder}")


def _folder_of_shards(target: Target, request: Request) -> Path:
    """Return the folder of the statistics, or that of a configuration of the same tokenizer, if it holds shards."""
    folders = [target.path.parent]
    settings = _settings(request.config)
    if settings and settings.data.data_path and settings.vae.model_name == PUBLISHED_TOKENIZER:
        folders += [Path(settings.data.data_path)] * (target.kind == "published")
    for folder in folders:
        if any(folder.glob("latents*_shard*.safetensors")):
            return folder
    searched = " or ".join(dict.fromkeys(map(str, folders)))
    raise LightningDiTError(f"no latent shards in {searched}", "add --latents FOLDER")


def from_images(target: Target, request: Request) -> Repair:
    """Return statistics of the latents of images in a folder, or of Fashion-MNIST's training photographs.

    Like the latents that a transformer learns from, they are samples of the posterior. More images than the request
    wants are thinned out evenly.
    """
    from LightningDiT.data.fashion_mnist import holds_fashion_mnist
    from LightningDiT.data.image_sets import evenly_spaced, open_fashion_mnist, open_files

    folder = request.images
    if folder is None:
        raise LightningDiTError("no folder of images is named", "add --images FOLDER")
    tokenizer = _tokenizer_for(target, request)
    fashion = holds_fashion_mnist(folder) and tokenizer.img_size == 32
    images = open_fashion_mnist(folder, "train") if fashion else open_files(folder).cropped(tokenizer.img_size)
    numbers = evenly_spaced(images.count, request.max_images)
    thinned = f"{len(numbers)} of " if len(numbers) < images.count else ""
    amount = f"{thinned}{images.count} images{', evenly spaced,' if thinned else ''}"
    print(f"  encoding {amount} by {tokenizer.config.source} on {tokenizer.device.type}")
    unreadable: list[str] = []
    try:
        with Progress(len(numbers), "image", label="encoding") as progress:
            return _computed(_encoded(images, numbers, tokenizer, unreadable, progress), f"images in {folder}")
    finally:
        if unreadable:
            names = ", ".join(os.path.relpath(name, folder) for name in unreadable[:LISTED])
            more = ", ..." if len(unreadable) > LISTED else ""
            print(f"  passed over {len(unreadable)} files that could not be read: {names}{more}")


def _encoded(
    images: ImageSet, numbers: Sequence[int], tokenizer: VA_VAE, unreadable: list[str], progress: Progress
) -> Iterator[torch.Tensor]:
    """Yield latents (N, C, h, w), batch by batch from one generator, and add the names of unreadable images."""
    import torch

    from LightningDiT.data.image_sets import Unreadable
    from LightningDiT.images import to_float

    generator = torch.Generator().manual_seed(0)
    for batch in images.batches(numbers, max(1, ENCODED_PIXELS // tokenizer.img_size**2), Unreadable.BLACK):
        unreadable += [name for name, _ in batch.unreadable]
        if bool(batch.read.any()):
            yield tokenizer.encode_images(to_float(batch.pixels[batch.read]), generator=generator)
        progress.update(len(batch.read))


def _tokenizer_for(target: Target, request: Request) -> VA_VAE:
    """Return the tokenizer that is asked for, else the one whose latents the file describes: the bundled one, that of
    the configuration, or the published one. Raise LightningDiTError if nothing tells which, or its weights are absent.
    """
    from LightningDiT.tokenizer.config import TOKENIZER_CONFIGS, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import VA_VAE

    if request.tokenizer:
        return VA_VAE(request.tokenizer, ckpt_path=request.checkpoint)
    if target.kind == "bundled":
        return VA_VAE(weights.BUNDLED / "tokenizer.yaml", ckpt_path=request.checkpoint)
    settings = _settings(request.config)
    named = Path(settings.vae.ckpt_path) if settings and settings.vae.ckpt_path else None
    if target.kind == "published":
        fits = settings is not None and settings.vae.model_name == PUBLISHED_TOKENIZER
        known = named if fits and named and named.is_file() else None
        path = (
            request.checkpoint
            or known
            or weights.find_file(weights.VAVAE, request.models, weights.Tree(request.attached))
        )
        if path is None:
            raise LightningDiTError(
                f"{weights.VAVAE.name}, which encodes the images, is not in {request.models}",
                step_command(STEP2, "--only", weights.VAVAE.role),
            )
        return VA_VAE(TOKENIZER_CONFIGS / f"{PUBLISHED_TOKENIZER}.yaml", ckpt_path=path)
    if settings and settings.data.data_path and Path(settings.data.data_path) in (target.path, target.path.parent):
        return VA_VAE(tokenizer_config_path(settings), ckpt_path=request.checkpoint or named)
    raise LightningDiTError(f"nothing tells which tokenizer {target.path} belongs to", "add --tokenizer YAML")


def _computed(batches: Iterable[torch.Tensor], what: str) -> Repair:
    """Compute mean and deviation of all latents in one pass.

    Args:
        what: what was encoded or read, for the report.
    """
    from LightningDiT.tokenizer.latents import Moments

    began, moments = time.monotonic(), Moments()
    for batch in batches:
        moments.add(batch)
    stats = moments.stats()
    seconds = duration(time.monotonic() - began)
    return Repair(stats, f"computed from {moments.latents} {what} ({seconds}, float64)", latents=moments.latents)


SOURCES: dict[str, Callable[[Target, Request], Repair]] = {
    "bundled": from_bundled,
    "hub": from_hub,
    "attached": from_attached,
    "latents": from_latents,
    "images": from_images,
}
ORDER = {
    "bundled": ("bundled", "latents", "images"),
    "published": ("hub", "attached", "latents", "images"),
    "other": ("latents", "images"),
}
"""Sources of good statistics of each kind, the best first."""


def repair(target: Target, request: Request, sources: Sequence[str]) -> tuple[Repair, str | None]:
    """Write the statistics of the first source that has good ones; say why each source before it is passed over. Return
    them and the new name of the bad file (None if there was none); raise LightningDiTError if no source has any.
    """
    for name in sources:
        try:
            found = SOURCES[name](target, request)
            return found, put_in_place(target, found.save)
        except LightningDiTError as error:
            if len(sources) == 1:
                raise
            print(f"  {name}: passed over, {error.message}")
    raise LightningDiTError(f"no source has good statistics for {target.path}", _another_source(target))


def _another_source(target: Target) -> str:
    """Return the command with another source of good statistics."""
    command = step_command(REPAIR, "--stats", str(target.path), "--images", "FOLDER")
    return f"{command} (or --latents FOLDER; --source hub if it is the published tokenizer's)"


def require_writable_target(target: Target, models: Path) -> None:
    """Raise LightningDiTError if the folder of the statistics takes no new file, as an attached data set; the fix for
    published ones is the folder `models`.
    """
    try:
        require_writable(target.path.parent)
        require_replaceable(target.path, aside=True)
    except LightningDiTError as error:
        own = models / weights.STATS.name
        if target.kind != "published" or target.path == own:
            raise
        step3 = step_command(STEP3, "--model", "800ep", "--stats", str(own))
        raise LightningDiTError(error.message, f"{step_command(REPAIR, '--stats', str(own))}, then {step3}") from error


def put_in_place(target: Target, save: Callable[[Path], None], check: bool = True) -> str | None:
    """Write new statistics; rename the old file to NAME.bad-1, -2, ...

    Args:
        save: writes the file it is given.
        check: the new file replaces the old one only if it is good.

    Returns:
        The new name of the old file; None if there was none.
    """
    from LightningDiT.tokenizer.latents import diagnose

    path = target.path
    aside = free_name(path, "bad") if os.path.lexists(path) else None
    with atomic_path(path, aside) as fresh:
        save(fresh)
        faults = diagnose(fresh, target.channels) if check else []
        if faults:
            raise LightningDiTError(
                f"the new statistics are not good either: {'; '.join(faults)}", _another_source(target)
            )
    return aside.name if aside else None


def doubts(stats: LatentStats, latents: int | None = None) -> list[str]:
    """Return what is valid and yet hard to believe.

    Args:
        latents: number of latents that the statistics were computed from; None if they were not computed here.
    """
    said = []
    if stats.std.min() < PLAUSIBLE_STD[0] or stats.std.max() > PLAUSIBLE_STD[1]:
        low, high = PLAUSIBLE_STD
        said.append(f"standard deviations from {low:g} to {high:g} were expected: is it the right tokenizer?")
    if stats.mean.abs().max() > PLAUSIBLE_MEAN:
        said.append(f"means within {PLAUSIBLE_MEAN:g} of 0 were expected: is it the right tokenizer?")
    if latents is not None and latents < FEW:
        said.append(f"computed from {latents} latents only; {FEW} or more give numbers to rely on")
    return said
