"""Good numbers for a damaged latents_stats.pt: from the hub, the bundled tokenizer's file, attached
data sets, latent shards or images. Nothing is ever invented here but the identity that was asked for.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from setup_steps import downloads, weights
from setup_steps.console import PROJECT, Progress, StepError, absolute, format_seconds, require_writable
from setup_steps.files import free_name, replacing

if TYPE_CHECKING:
    import torch

    from LightningDiT.config import Config
    from LightningDiT.tokenizer.latents import LatentStats
    from LightningDiT.tokenizer.vavae import VA_VAE

CONFIG = PROJECT / "kaggle_inference_config.yaml"
PUBLISHED_TOKENIZER, PUBLISHED_CHANNELS = "vavae_f16d32", 32
ENCODED_PIXELS = 1 << 18  # at a time: 4 images of 256x256, or 256 of 32x32
MAX_IMAGES = 10_000
FEW = 1_000  # latents below which the numbers are rough: 1 / sqrt(2 x 1000) is an error of 2 %
LISTED = 3
PLAUSIBLE_STD, PLAUSIBLE_MEAN = (0.01, 100.0), 100.0
# One source of several must not keep a machine without internet waiting.
HURRIED = downloads.Patience(timeout=5.0, attempts=2, backoff=0.5)


@dataclass(frozen=True)
class Target:
    """The statistics in question.

    Args:
        path: the file.
        kind: "bundled", "published" (of the published tokenizer) or "other", of a tokenizer that
            only its owner knows.
        channels: how many it must have; None where nothing says so.
        reason: why it is this file.
        config_fault: what is wrong with the way in which the configuration names it.
    """

    path: Path
    kind: str
    channels: int | None
    reason: str
    config_fault: str | None = None


@dataclass(frozen=True)
class Request:
    """Where to look, as the command line says it.

    Args:
        latents: folder of shards; None: the one beside the statistics, or the configuration's.
        images: folder of images to encode.
        max_images: more images than these are thinned out evenly.
        tokenizer, checkpoint: YAML and weights that encode; None: those that belong to the file.
        attached: folder of attached data sets.
        config: the configuration whose statistics, shards and tokenizer are meant.
        patience: how long the hub is waited for.
    """

    latents: Path | None = None
    images: Path | None = None
    max_images: int = MAX_IMAGES
    tokenizer: Path | None = None
    checkpoint: Path | None = None
    attached: Path | None = None
    config: Path = CONFIG
    patience: downloads.Patience = downloads.PATIENCE


@dataclass(frozen=True)
class Repair:
    """Good statistics, a line that says where they come from, the bytes of a published file, of how
    many latents they were computed here, and what is doubtful about where they come from.
    """

    stats: LatentStats
    origin: str
    content: bytes | None = None
    latents: int | None = None
    doubt: str = ""

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
    is meant, and the fault is said.
    """
    settings, fault = None, None
    if given is not None:
        path, reason = _named(given), "named by --stats"
    else:
        settings = _settings(config)
        if settings and settings.data.data_path:
            path, reason = Path(settings.data.data_path), f"{config.name} uses it"
        else:
            settings, (path, reason) = None, _without_configuration(config)
    if path.suffix == ".pt" or path.is_file():
        path = path.parent.resolve() / path.name  # a link in models/ is replaced, not what it points to
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
    if published or beside or path.parent == weights.MODELS.resolve():
        return Target(path, "published", PUBLISHED_CHANNELS, reason, fault)
    return Target(path, "other", settings.model.in_chans if settings else None, reason, fault)


def _named(path: Path) -> Path:
    """The file that --stats names, links kept; a file that is another part of a model is refused."""
    named = absolute(path.parent) / path.name if path.name else absolute(path)
    others = {name for file in weights.SETS["all"] for name in weights.usable_names(file)} - {weights.STATS.name}
    if named.name in others or named.suffix == ".safetensors":
        raise StepError(
            f"--stats {named} is another part of a model, latent statistics were expected",
            f"name a {weights.STATS.name}, or the folder that it belongs to",
        )
    return named


def _settings(config: Path) -> Config | None:
    """What the written configuration holds; None where it is not there."""
    from LightningDiT.config import load_config

    return load_config(config) if config.is_file() else None


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


def from_bundled(target: Target, request: Request) -> Repair:
    """The copy that the bundled tokenizer carries."""
    return from_tokenizer(weights.BUNDLED / "tokenizer.safetensors")


def from_hub(target: Target, request: Request) -> Repair:
    """The published file, verified by its hash."""
    from LightningDiT.tokenizer.latents import LatentStats

    file = weights.STATS
    remote = downloads.describe(file.repo, file.name, request.patience)
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / file.name
        downloads.download(remote, fresh, downloads.hub_token(), request.patience)
        origin = f"{file.repo} on the hub, commit {remote.revision[:8]}"
        return Repair(LatentStats.load(fresh), origin, fresh.read_bytes())


def from_attached(target: Target, request: Request) -> Repair:
    """The first good file of that name in the attached data sets, one beside published weights
    before all others. One that lies elsewhere comes with a doubt: any tokenizer of as many channels
    has a good file of that name.
    """
    from LightningDiT.tokenizer.latents import LatentStats, diagnose

    name, folder = weights.STATS.name, request.attached
    if folder is None:
        raise StepError("no data sets are attached here", "add --attached FOLDER")
    if not folder.is_dir():
        raise StepError(f"{folder}, the folder of attached data sets, is not there", "add --attached FOLDER")
    found = [path for path in weights.search(folder, [name])[name] if path.resolve() != target.path]
    found.sort(key=lambda path: weights.published_in(path.parent) == [name])
    faults = []
    for path in found:
        wrong = diagnose(path, target.channels)
        if not wrong:
            alone = weights.published_in(path.parent) == [name]
            doubt = f"nothing beside {path} shows which tokenizer it belongs to" if alone else ""
            return Repair(LatentStats.load(path), f"the attached {path}", path.read_bytes(), doubt=doubt)
        faults += wrong
    raise StepError(
        f"no good {name} below {folder}" + (f" ({'; '.join(faults)})" if faults else ""),
        "attach a data set that holds it",
    )


def from_latents(target: Target, request: Request) -> Repair:
    """Computed over the latents of all shards in a folder (the mirrored copies are left out, as in
    the published statistics).
    """
    from LightningDiT.data.shards import iterate_shards

    folder = request.latents or _folder_of_shards(target, request)
    count = len(list(folder.glob("*.safetensors")))

    def batches(progress: Progress) -> Iterator[torch.Tensor]:
        for number, shard in enumerate(iterate_shards(folder), 1):
            yield shard["latents"]
            progress.update(number)

    with contextlib.closing(Progress("reading", count, say=lambda count: f"{count:.0f} shards")) as progress:
        return _computed(batches(progress), f"latents in {folder}")


def _folder_of_shards(target: Target, request: Request) -> Path:
    """The folder of the statistics, or the one that a configuration of the same tokenizer names, if
    it holds shards.
    """
    folders = [target.path.parent]
    settings = _settings(request.config)
    if settings and settings.data.data_path and settings.vae.model_name == PUBLISHED_TOKENIZER:
        folders += [Path(settings.data.data_path)] * (target.kind == "published")
    for folder in folders:
        if any(folder.glob("latents*_shard*.safetensors")):
            return folder
    places = " or ".join(dict.fromkeys(str(folder) for folder in folders))
    raise StepError(f"no latent shards in {places}", "add --latents FOLDER")


def from_images(target: Target, request: Request) -> Repair:
    """Computed by encoding images, or the Fashion-MNIST photographs, that a folder holds; like the
    latents that a transformer learns from, they are samples of the posterior.
    """
    from LightningDiT.data.images import holds_fashion_mnist

    if request.images is None:
        raise StepError("no folder of images is named", "add --images FOLDER")
    tokenizer = _tokenizer_for(target, request)
    batch = max(1, ENCODED_PIXELS // tokenizer.img_size**2)
    fashion = holds_fashion_mnist(request.images) and tokenizer.img_size == 32
    pictures = (_fashion_pictures if fashion else _pictures_of)(request.images, request.max_images, tokenizer, batch)
    chosen, there = pictures.chosen, pictures.there
    amount = f"{chosen} of {there} images, evenly spaced," if chosen < there else f"{there} images"
    print(f"  encoding {amount} by {tokenizer.config.source} on {tokenizer.device.type}")
    try:
        with contextlib.closing(Progress("encoding", chosen, say=lambda count: f"{count:.0f} images")) as progress:
            return _computed(_encoded(pictures, tokenizer, progress), f"images in {request.images}")
    finally:
        _list_unreadable(pictures.unreadable, request.images)


@dataclass(frozen=True)
class Pictures:
    """What is encoded: how many of how many that are there, batches (N, 3, h, w) in [-1, 1], and the
    files that no image could be made of so far.
    """

    chosen: int
    there: int
    batches: Iterator[torch.Tensor]
    unreadable: list[Path] = field(default_factory=list)


def _fashion_pictures(folder: Path, at_most: int, tokenizer: VA_VAE, batch: int) -> Pictures:
    """Padded training photographs, evenly spaced where there are more than `at_most`."""
    from LightningDiT.data.images import evenly_spaced, fashion_mnist, pad_to_32

    images, _ = fashion_mnist(folder, train=True)
    chosen = images[evenly_spaced(range(len(images)), at_most)]
    return Pictures(len(chosen), len(images), map(pad_to_32, chosen.split(batch)))


def _pictures_of(folder: Path, at_most: int, tokenizer: VA_VAE, batch: int) -> Pictures:
    """Images of any folder, cut to the tokenizer's resolution, evenly spaced in the order of their
    names where there are more than `at_most`.
    """
    from LightningDiT.data.images import ImageBatches, evenly_spaced, image_files

    files = image_files(folder)
    chosen = evenly_spaced(files, at_most)
    reader = ImageBatches(chosen, tokenizer.img_transform(), batch)
    return Pictures(len(chosen), len(files), (images for images, _ in reader), reader.unreadable)


def _encoded(pictures: Pictures, tokenizer: VA_VAE, progress: Progress) -> Iterator[torch.Tensor]:
    """Latents (N, C, h, w) of one batch after the other, from one generator."""
    import torch

    generator, encoded = torch.Generator().manual_seed(0), 0
    for images in pictures.batches:
        yield tokenizer.encode_images(images, generator=generator)
        encoded += len(images)
        progress.update(encoded + len(pictures.unreadable))


def _list_unreadable(files: Sequence[Path], folder: Path) -> None:
    """Say which files are no images."""
    if files:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:LISTED])
        more = ", ..." if len(files) > LISTED else ""
        print(f"  passed over {len(files)} files that could not be read: {names}{more}")


def _tokenizer_for(target: Target, request: Request) -> VA_VAE:
    """The tokenizer that is asked for, else the one whose latents the file describes: the bundled
    one, the one that the configuration names, or the published one.

    Raises:
        StepError: nothing tells which, or the published weights are not there.
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
        path = request.checkpoint or known or weights.find_file(weights.VAVAE, weights.MODELS, request.attached)
        if path is None:
            raise StepError(
                f"{weights.VAVAE.name}, which encodes the images, is not in {weights.MODELS}",
                f"python step2_download_models.py --only {weights.VAVAE.role}",
            )
        return VA_VAE(TOKENIZER_CONFIGS / f"{PUBLISHED_TOKENIZER}.yaml", ckpt_path=path)
    if settings and settings.data.data_path and Path(settings.data.data_path) in (target.path, target.path.parent):
        return VA_VAE(tokenizer_config_path(settings), ckpt_path=request.checkpoint or named)
    raise StepError(f"nothing tells which tokenizer {target.path} belongs to", "add --tokenizer YAML")


def _computed(batches: Iterable[torch.Tensor], what: str) -> Repair:
    """Mean and deviation of all latents, in one pass.

    Args:
        what: of what, and where; for the report.
    """
    from LightningDiT.tokenizer.latents import Moments

    began, moments = time.monotonic(), Moments()
    for batch in batches:
        moments.add(batch)
    stats = moments.stats()
    seconds = format_seconds(time.monotonic() - began)
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
"""Where good statistics of each kind are looked for, the best first."""


def repair(target: Target, request: Request, sources: Sequence[str]) -> tuple[Repair, str | None]:
    """Put the numbers of the first source that has good ones in place; say of each source before it
    why it is passed over.

    Returns:
        The good statistics, and the name that the bad file has now (None where there was none).

    Raises:
        StepError, LightningDiTError: of the source where it is the only one; else none has any.
    """
    from LightningDiT.errors import LightningDiTError

    for name in sources:
        try:
            found = SOURCES[name](target, request)
            return found, put_in_place(target, found.save)
        except (StepError, LightningDiTError) as error:
            if len(sources) == 1:
                raise
            print(f"  {name}: passed over, {error.message}")
    raise StepError(f"no source has good statistics for {target.path}", _another_source(target))


def _another_source(target: Target) -> str:
    """The command that names where good statistics come from."""
    return (
        f"python fix_latents_stats.py --stats {shlex.quote(str(target.path))} --images FOLDER "
        "(or --latents FOLDER; --source hub if it is the published tokenizer's)"
    )


def require_place(target: Target) -> None:
    """Raise StepError where the folder of the statistics takes no new file, as an attached data set
    does; the published file then has a place of its own in models/.
    """
    try:
        require_writable(target.path.parent)
    except StepError as error:
        own = weights.MODELS / weights.STATS.name
        if target.kind != "published" or target.path == own:
            raise
        raise StepError(
            error.message,
            f"python fix_latents_stats.py --stats {shlex.quote(str(own))}, then "
            f"python step3_setup_configs.py --model 800ep --stats {shlex.quote(str(own))}",
        ) from error


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
    aside = free_name(path, "bad") if os.path.lexists(path) else None
    with replacing(path, aside) as fresh:
        save(fresh)
        faults = diagnose(fresh, target.channels) if check else []
        if faults:
            raise StepError(f"the new statistics are not good either: {'; '.join(faults)}", _another_source(target))
    return aside.name if aside else None


def plausibility(stats: LatentStats) -> str:
    """The range of the numbers, for a person to look at."""
    mean, std = stats.mean, stats.std
    return (
        f"{mean.shape[1]} channels, means {mean.min():.3f} to {mean.max():.3f}, "
        f"standard deviations {std.min():.3f} to {std.max():.3f}"
    )


def doubts(stats: LatentStats, latents: int | None = None) -> list[str]:
    """What is valid and yet hard to believe.

    Args:
        latents: how many latents the numbers were computed from; None where they were not.
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


def save_identity(path: Path, channels: int) -> None:
    """Write mean 0 and std 1, which the library refuses unless latents are not normalised."""
    from LightningDiT.checkpoint import save_training_state
    from LightningDiT.tokenizer.latents import LatentStats

    stats = LatentStats.identity(channels)
    save_training_state({"mean": stats.mean, "std": stats.std}, path)
