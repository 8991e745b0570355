"""Latents of an image set, shard by shard, by any number of processes, with the same bytes after any interruption.

Shard k holds the latents of images k S, ..., (k + 1) S - 1 of the set, whichever process makes it; what cannot be read
is left out of it. The noise of a posterior's sample comes from (seed, image, mirrored or not), and images meet the
network in groups that follow from their numbers alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import setting_differences
from LightningDiT.console import Progress, StopRequest
from LightningDiT.data.image_sets import ImageSet
from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.data.prefetching import Ahead
from LightningDiT.data.shards import FIX, shard_files, shard_path, write_shard
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, disk_errors, fingerprint, held_folder
from LightningDiT.images import centre_crop
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import DiagonalGaussian
from LightningDiT.tokenizer.latents import LatentStats, Moments
from LightningDiT.tokenizer.vavae import VA_VAE, images_at_once

STATS_NAME = "latents_stats.pt"
RECORD = "extraction"  # of a shard's metadata: what the manifest says of it, as JSON
PART = ".part"  # ending of a shard that is not whole yet
PART_SECONDS = 300.0  # a shard that takes longer is kept as far as it has come, so often
MOMENTS_ROWS = 256  # latents that are in memory as float64 at once
#: What a kill leaves behind: files of `atomic_path`, and of safetensors, which has temporary files of its own.
TORN = (".latents_rank*.tmp", f".{LATENTS_MANIFEST}.*.tmp", f".{STATS_NAME}.*.tmp", ".tmp??????")

T = TypeVar("T")


@dataclass(frozen=True)
class ExtractionSettings:
    """How images become latents.

    Attributes:
        image_size: side in pixels of the centre crop.
        shard_size: images of a shard.
        sample: draw from the posterior, as published; false stores its mode.
        flips: store the latents of the mirrored images besides.
        seed: of the posterior's noise.
        batch_size: images that are read and encoded between two looks at Ctrl-C; the latents do not depend on it.
        threads: that read images ahead.
    """

    image_size: int
    shard_size: int = 10_000
    sample: bool = True
    flips: bool = False
    seed: int = 0
    batch_size: int = 64
    threads: int = 2


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a whole shard, kept in its file.

    Attributes:
        file: its name.
        images: how many images of the set it covers.
        moments: `Moments.as_dict` of its latents, mirrored ones left out.
        largest_label: -1 where it has no latents.
        unreadable: name and reason of each image that it leaves out.
    """

    file: str
    images: int
    moments: dict[str, Any]
    largest_label: int
    unreadable: list[list[str]]


@dataclass(frozen=True)
class ExtractionResult:
    """What an extraction has in its folder when it ends.

    Attributes:
        records: of all shards, in order; empty where it was interrupted.
        made: images encoded by this call.
        seconds: wall clock of this call, summed over the processes.
        shares: of these seconds, by what they went into.
    """

    records: list[ShardRecord]
    made: int
    seconds: float
    shares: dict[str, float]
    interrupted: bool

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return max(record.largest_label for record in self.records) + 1

    @property
    def latents(self) -> int:
        """How many latents there are, mirrored ones left out."""
        return sum(record.moments["latents"] for record in self.records)

    @property
    def images(self) -> int:
        """How many images the set has, unreadable ones among them."""
        return sum(record.images for record in self.records)

    @property
    def unreadable(self) -> list[list[str]]:
        """Name and reason of each image that was left out."""
        return [row for record in self.records for row in record.unreadable]


def settings_of(
    images: ImageSet, tokenizer: VA_VAE, weights: str | Path, settings: ExtractionSettings
) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on, as plain values."""
    return {
        "images": images.count,
        "image_list": images.key,
        "tokenizer": {"weights": fingerprint(weights), "embed_dim": tokenizer.embed_dim, **tokenizer.config.ddconfig},
        "image_size": settings.image_size,
        "shard_size": settings.shard_size,
        "posterior": f"sample, seed {settings.seed}" if settings.sample else "mode",
        "flips": settings.flips,
    }


def extract(
    images: ImageSet,
    tokenizer: VA_VAE,
    weights: str | Path,
    output: Path,
    settings: ExtractionSettings,
    processes: Processes = ALONE,
) -> ExtractionResult:
    """Write the latents of all `images` into `output`: shards, statistics and a manifest. Shards that are there stay.

    The processes, which see one file system, make the missing shards in turn. After Ctrl-C each ends its batch
    and keeps what its shard has; a rerun goes on from there.

    Args:
        weights: the tokenizer's file, by which the manifest knows it.

    Raises:
        LightningDiTError: the folder holds other latents (differing settings are named) or statistics, another
            extraction writes there, the disk is too small, or nothing can be read.
    """
    described = settings_of(images, tokenizer, weights, settings)
    keys = processes.share(lambda: images.key)
    processes.agree(lambda: _check_agreement(keys))
    part = _Part(images, tokenizer, output, settings)
    reports, interrupted = [], False
    with contextlib.ExitStack() as stack:
        missing = processes.from_main(lambda: stack.enter_context(_planned(part, described)))
        stop = stack.enter_context(StopRequest(quiet=not processes.is_main))
        part.progress = Progress(sum(len(part.span(shard)) for shard in missing), "image", quiet=not processes.is_main)
        stack.callback(part.progress.close)
        for first in range(0, len(missing), processes.count):
            turn = missing[first : first + processes.count]
            reports += processes.share(partial(part.make, turn, processes.rank, stop))
            if interrupted := any(report.interrupted for report in reports):
                break
        records = [] if interrupted else processes.from_main(lambda: _finish(part, images, described))
    seconds = sum(report.seconds for report in reports)
    shares = {
        name: sum(report.parts[name] for report in reports) / max(seconds, 1e-9)
        for name in ("encoder", "waiting for images", "writing")
    }
    return ExtractionResult(records, sum(report.made for report in reports), seconds, shares, interrupted)


def _check_agreement(keys: list[str]) -> None:
    if len(set(keys)) > 1:
        raise LightningDiTError(
            "the processes of this run find different images", "give them one file system, or start one process"
        )


@dataclass
class _Report:
    """What one process did in a turn: images, seconds, and the seconds of each part of the work."""

    made: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: {"encoder": 0.0, "waiting for images": 0.0, "writing": 0.0})
    interrupted: bool = False

    def timed(self, name: str, action: Callable[[], T]) -> T:
        """Return what `action` gives, and count its seconds."""
        started = time.perf_counter()
        result = action()
        self.parts[name] += time.perf_counter() - started
        return result


@dataclass(frozen=True)
class _Batch:
    """Images as they are read: (N, 3, H, W) in [-1, 1], black where unreadable; labels (N,); which were read (N,)."""

    start: int
    pixels: Tensor
    labels: Tensor
    read: Tensor
    unreadable: list[list[str]]


class _Part:
    """One process's part of an extraction: numbers of shards in, files in the folder."""

    progress: Progress

    def __init__(self, images: ImageSet, tokenizer: VA_VAE, output: Path, settings: ExtractionSettings) -> None:
        self.images, self.tokenizer, self.output, self.settings = images, tokenizer, output, settings
        group = images_at_once(settings.image_size**2)
        self.batch_size = -(-settings.batch_size // group) * group
        side = settings.image_size // tokenizer.downsample_factor
        self.shape = (tokenizer.embed_dim, side, side)
        self._done = 0

    @property
    def shards(self) -> int:
        """How many shards the set takes."""
        return -(-self.images.count // self.settings.shard_size)

    def span(self, shard: int) -> range:
        """Return the numbers of the images of a shard."""
        size = self.settings.shard_size
        return range(shard * size, min((shard + 1) * size, self.images.count))

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return shard_path(self.output, 0, shard)

    def make(self, turn: list[int], rank: int, stop: StopRequest) -> _Report:
        """Make this process's shard of `turn`, which has one a process but for the last turn."""
        report, started = _Report(), time.perf_counter()
        if rank < len(turn):
            self._make(turn[rank], len(turn), stop, report)
        self._done += sum(map(len, map(self.span, turn)))
        report.seconds, report.interrupted = time.perf_counter() - started, stop.asked
        return report

    def _make(self, shard: int, sharing: int, stop: StopRequest, report: _Report) -> None:
        span, path = self.span(shard), self.path(shard)
        rows = _Rows(path, len(span), self.shape, self.settings.flips)
        starts = range(span.start + rows.done, span.stop, self.batch_size)
        batches = Ahead(
            self._read,
            [range(start, min(start + self.batch_size, span.stop)) for start in starts],
            self.settings.threads,
        )
        kept = time.monotonic()
        for batch in batches:
            encoded = report.timed("encoder", partial(self._encode, batch))
            rows.put(encoded, batch)
            report.made += len(batch.labels)
            self.progress.reach(self._done + rows.done * sharing)
            if stop.asked and rows.done < len(span):
                break
            if time.monotonic() - kept > PART_SECONDS:
                report.timed("writing", rows.keep)
                kept = time.monotonic()
        report.parts["waiting for images"] += batches.waited
        report.timed("writing", rows.write if rows.done == len(span) else rows.keep)

    def _read(self, span: range) -> _Batch:
        """Return the images of `span`, cropped; called in threads."""
        size = self.settings.image_size
        pixels = np.zeros((len(span), size, size, 3), np.uint8)
        labels, read, unreadable = torch.zeros(len(span), dtype=torch.long), torch.ones(len(span), dtype=torch.bool), []
        for place, index in enumerate(span):
            try:
                image, label = self.images.read(index)
                pixels[place] = np.asarray(centre_crop(image, size))
                labels[place] = label
            except MemoryError:
                raise
            except Exception as error:  # arbitrary bytes make Pillow's readers fail in arbitrary ways
                read[place] = False
                unreadable.append([self.images.name_of(index), " ".join(str(error).split())[:160]])
        values = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
        return _Batch(span.start, torch.from_numpy(values), labels, read, unreadable)

    def _encode(self, batch: _Batch) -> list[Tensor]:
        """Return the latents (N, C, h, w) of the images, then those of the mirrored ones where they are wanted."""
        pictures = [batch.pixels, batch.pixels.flip(-1)][: 1 + self.settings.flips]
        return [self._latents(pixels, batch.start, mirrored) for mirrored, pixels in enumerate(pictures)]

    def _latents(self, pixels: Tensor, start: int, mirrored: int) -> Tensor:
        posterior = self.tokenizer.posterior(pixels)
        mean, logvar = posterior.mean.cpu(), posterior.logvar.cpu()
        if not self.settings.sample:
            return mean
        each = (DiagonalGaussian(mean[row : row + 1], logvar[row : row + 1]) for row in range(len(mean)))
        seed = self.settings.seed
        return torch.cat([one.sample(generator_for(seed, start + row, mirrored)) for row, one in enumerate(each)])


class _Rows:
    """The rows of one shard as they come, those of unreadable images included until it is written.

    Attributes:
        done: how many there are, also from an earlier call that was interrupted.
    """

    def __init__(self, path: Path, size: int, shape: tuple[int, int, int], flips: bool) -> None:
        self.path, self.size = path, size
        self.done, self.unreadable = 0, list[list[str]]()
        self.latents = [torch.empty(size, *shape) for _ in range(1 + flips)]
        self.labels, self.read = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
        self._part = path.with_suffix(PART)
        self._take_part()

    def put(self, encoded: list[Tensor], batch: _Batch) -> None:
        """Add a batch."""
        place = slice(self.done, self.done + len(batch.labels))
        for rows, latents in zip(self.latents, encoded, strict=True):
            rows[place] = latents
        self.labels[place], self.read[place] = batch.labels, batch.read
        self.unreadable += batch.unreadable
        self.done = place.stop

    def keep(self) -> None:
        """Write what there is beside the place of the shard, for a rerun to go on from."""
        with disk_errors(self._part):
            save_weights(self._tensors(slice(self.done)), self._part, {"unreadable": json.dumps(self.unreadable)})

    def write(self) -> None:
        """Write the shard, unreadable images left out."""
        rows = slice(None) if bool(self.read.all()) else self.read
        latents, labels = [part[rows] for part in self.latents], self.labels[rows]
        moments = Moments()
        for some in latents[0].split(MOMENTS_ROWS):
            moments.add(some)
        record = {
            "images": self.size,
            "moments": moments.as_dict(),
            "largest_label": int(labels.max()) if len(labels) else -1,
            "unreadable": self.unreadable,
        }
        flipped = latents[1] if len(latents) > 1 else None
        with disk_errors(self.path):
            write_shard(self.path, latents[0], labels, flipped, {RECORD: json.dumps(record)})
        self._part.unlink(missing_ok=True)

    def _tensors(self, rows: slice) -> dict[str, Tensor]:
        named = {"labels": self.labels, "read": self.read, **{f"latents{n}": x for n, x in enumerate(self.latents)}}
        return {name: tensor[rows] for name, tensor in named.items()}

    def _take_part(self) -> None:
        """Take over what an interrupted call left; what a power cut has damaged is made again."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._part, framework="pt") as opened:
                self.unreadable = json.loads(opened.metadata()["unreadable"])
                there = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError):
            return
        self.done = len(there["labels"])
        for name, tensor in self._tensors(slice(self.done)).items():
            tensor.copy_(there[name])


@contextlib.contextmanager
def _planned(part: _Part, described: dict[str, Any]) -> Iterator[list[int]]:
    """Hold the folder and give the numbers of the shards that are missing."""
    file = part.output / LATENTS_MANIFEST
    with held_folder(part.output, "extraction"):
        if file.exists():
            _check_settings(file, described)
        elif foreign := [*shard_files(part.output), *part.output.glob(STATS_NAME)]:
            raise LightningDiTError(
                f"{part.output} holds {foreign[0].name} already, which is of another origin",
                "choose another --output, or move it away",
            )
        else:
            _write_manifest(file, {"settings": described})
        missing = [shard for shard in range(part.shards) if _record(part.path(shard)) is None]
        left = [part.path(shard).with_suffix(PART) for shard in range(part.shards) if shard not in missing]
        for torn in (*left, *(path for pattern in TORN for path in part.output.glob(pattern))):
            torn.unlink(missing_ok=True)
        _check_space(part, missing)
        yield missing


def _check_settings(file: Path, described: dict[str, Any]) -> None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["settings"]
        changed = setting_differences(known, json.loads(json.dumps(described)))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise LightningDiTError(f"{file} is no manifest of latents ({error})", "choose another --output") from error
    if changed:
        raise LightningDiTError(
            f"{file.parent} holds latents of other settings ({'; '.join(changed)})", "choose another --output"
        )


def _check_space(part: _Part, missing: list[int]) -> None:
    """Refuse an extraction that the disk would not hold."""
    numbers = int(np.prod(part.shape)) * (1 + part.settings.flips)
    needed = sum(len(part.span(shard)) for shard in missing) * (4 * numbers + 8)
    free = shutil.disk_usage(part.output).free
    if needed > free:
        raise LightningDiTError(
            f"the latents take {needed / 1e9:.2f} GB and {part.output} has {free / 1e9:.2f} GB free",
            "choose another --output, or leave out --flip",
        )


def _record(path: Path) -> ShardRecord | None:
    """Return what a shard says of itself; None where it is missing, or damaged and to be made again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            return ShardRecord(file=path.name, **json.loads((opened.metadata() or {})[RECORD]))
    except (SafetensorError, OSError, KeyError):
        return None


def _finish(part: _Part, images: ImageSet, described: dict[str, Any]) -> list[ShardRecord]:
    """Write statistics and manifest of what all shards say, in their order."""
    found = (_record(part.path(shard)) for shard in range(part.shards))
    records = [record for record in found if record is not None]
    stats, moments = _statistics(records, images)
    stats.save(part.output / STATS_NAME, moments.latents)
    _write_manifest(
        part.output / LATENTS_MANIFEST,
        {
            "settings": described,
            "source": images.source,
            "classes": len(images.class_names or ()) or max(record.largest_label for record in records) + 1,
            "class_names": images.class_names,
            "latents": moments.latents,
            "values_per_channel": moments.values,
            "mean": stats.mean.flatten().tolist(),
            "std": stats.std.flatten().tolist(),
            "shards": [{"file": record.file, "images": record.images, **record.moments} for record in records],
            "unreadable": [row for record in records for row in record.unreadable],
        },
    )
    return records


def _statistics(records: list[ShardRecord], images: ImageSet) -> tuple[LatentStats, Moments]:
    """Return mean and standard deviation over all shards, and the moments that they come from."""
    moments = Moments()
    for record in records:
        moments.merge(record.moments)
    if not moments.latents:
        name, reason = next(row for record in records for row in record.unreadable)
        raise LightningDiTError(
            f"none of the {images.count} images of {images.source} can be read ({name}: {reason})", FIX
        )
    return moments.stats(), moments


def _write_manifest(file: Path, content: dict[str, Any]) -> None:
    with disk_errors(file), atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
