"""Latents of an image set, shard by shard, by any number of processes, with the same bytes after any interruption.

Shard k holds the latents of images k S, ..., (k + 1) S - 1 of the set, whichever process makes it, without those that
cannot be read. The noise of a posterior's sample comes from (seed, image, mirrored or not), and images meet the network
in groups that follow from their numbers alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.config import setting_differences
from LightningDiT.console import Progress, StopRequest
from LightningDiT.data.image_sets import MOST_READERS, ImageBatch, ImageSet, Unreadable
from LightningDiT.data.labels import CLASS_NAMES, LATENTS_MANIFEST
from LightningDiT.data.prefetching import one_ahead
from LightningDiT.data.reading import ReadingProcesses
from LightningDiT.data.shards import (
    DIGEST,
    FIX,
    RECORD,
    manifest_digests,
    shard_digest,
    shard_files,
    shard_path,
    write_shard,
)
from LightningDiT.device import TF32, float32_products, ready_for, usable_cores
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import (
    fingerprint,
    held_folder,
    read_json,
    require_regular,
    require_space,
    require_unicode,
    write_text,
)
from LightningDiT.images import to_float
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import DiagonalGaussian
from LightningDiT.tokenizer.latent_space import KEY, encoder_values
from LightningDiT.tokenizer.latents import Moments
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.training.run_dir import require_form

STATS_NAME = "latents_stats.pt"
PART = ".part"  # suffix of an unfinished shard
PART_SECONDS = 300.0  # between two savings of an unfinished shard
FEWEST_CORES = 3  # of a process whose images are read by others
NO_EXTRAS: Mapping[str, Tensor] = MappingProxyType({})
MOMENTS_ROWS = 256  # latents that are in memory as float64 at once
#: What JSON and tensors of another form raise.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError)

T = TypeVar("T")


@dataclass(frozen=True)
class ExtractionSettings:
    """How images become latents.

    Attributes:
        image_size: side in pixels of the square.
        shard_size: images in a shard.
        sample: draw from the posterior, as published; false stores its mode.
        flips: also store the latents of the mirrored images.
        seed: of the posterior's noise.
        batch_size: images that are encoded between two looks at Ctrl-C; the latents do not depend on it.
        workers: processes that read images ahead; 0: threads do.
        threads: see `ImageSet.batches`.
        tf32: let a GPU's encoder compute from TF32 inputs, in place of exact float32.
        fit: how images become squares, see `images.FITS`.
    """

    image_size: int
    shard_size: int = 10_000
    sample: bool = True
    flips: bool = False
    seed: int = 0
    batch_size: int = 64
    workers: int = 0
    threads: int | None = None
    tf32: bool = False
    fit: str = "crop"


def default_workers(device: torch.device, processes: int) -> int:
    """Return how many processes read images for one of `processes` that encode.

    None on a CPU, where the encoder takes every core for itself. On a GPU one a core but one, from three cores on.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # that share this machine
    cores = usable_cores() // local
    return 0 if device.type == "cpu" or cores < FEWEST_CORES else min(cores - 1, MOST_READERS)


@dataclass(frozen=True)
class ExtractionResult:
    """What an extraction has done.

    Attributes:
        manifest: as it was written; None after an interruption.
        made: images encoded by this call.
        seconds: wall clock of this call, summed over the processes.
        shares: of these seconds, by what they went into.
    """

    manifest: dict[str, Any] | None
    made: int
    seconds: float
    shares: dict[str, float]


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
        **({"precision": TF32} if settings.tf32 else {}),  # earlier manifests have none, nor what follows
        **({"fit": settings.fit} if settings.fit != "crop" else {}),
        **images.settings,
    }


def in_kept_order(images: ImageSet, output: Path) -> ImageSet:
    """Return the images with the class numbers of an extraction that has begun in `output`.

    Manifests of unfinished extractions had no names once, and folders were numbered in alphabetical order.
    """
    file = output / LATENTS_MANIFEST
    try:
        content = read_json(file)
        names, key = content.get(CLASS_NAMES), content["settings"]["image_list"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return images  # none has begun, or `_check_settings` refuses the manifest
    if images.key == key:
        return images
    kept = images.in_order(names if isinstance(names, list) else sorted(images.class_names or ()))
    return kept if kept.key == key else images


def extract(
    images: ImageSet,
    tokenizer: VA_VAE,
    weights: str | Path,
    output: Path,
    settings: ExtractionSettings,
    processes: Processes = ALONE,
) -> ExtractionResult:
    """Write the latents of all `images` into `output`: shards, statistics and a manifest. Finished shards stay.

    The processes, which share one file system, make the missing shards in turn. After Ctrl-C each ends its batch
    and keeps the unfinished shard; a rerun goes on from there.

    Args:
        weights: the tokenizer's file, by which the manifest knows it.

    Raises:
        LightningDiTError: the folder holds other latents (differing settings are named) or statistics, another
            extraction writes there, the disk is too small, or no image can be read.
    """
    images = in_kept_order(images, output)
    described = settings_of(images, tokenizer, weights, settings)
    keys = processes.share(lambda: described["image_list"])
    processes.agree(lambda: _check_agreement(keys))
    reports, interrupted = list[_Report](), False
    with contextlib.ExitStack() as stack:
        if settings.workers:
            images = images.read_by(stack.enter_context(ReadingProcesses(settings.workers)))
        maker = _ShardMaker(images.cropped(settings.image_size, settings.fit), tokenizer, output, settings)
        missing = processes.from_main(lambda: stack.enter_context(_planned(maker, described)))
        stop = stack.enter_context(StopRequest(quiet=not processes.is_main))
        count = sum(len(maker.span(shard)) for shard in missing)
        maker.progress = stack.enter_context(Progress(count, "image", quiet=not processes.is_main))
        for first in range(0, len(missing), processes.count):
            turn = missing[first : first + processes.count]
            reports += processes.share(partial(maker.make, turn, processes.rank, stop))
            if interrupted := any(report.interrupted for report in reports):
                break
        manifest = None if interrupted else processes.from_main(lambda: _finish(maker, described))
    seconds = sum(report.seconds for report in reports)
    shares = {name: sum(report.parts[name] for report in reports) / max(seconds, 1e-9) for name in _Report().parts}
    return ExtractionResult(manifest, sum(report.made for report in reports), seconds, shares)


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
        """Return the result of `action`, and count its seconds."""
        started = time.perf_counter()
        result = action()
        self.parts[name] += time.perf_counter() - started
        return result


class _ShardMaker:
    """One process's part of an extraction: from the numbers of shards to their files."""

    progress: Progress

    def __init__(self, images: ImageSet, tokenizer: VA_VAE, output: Path, settings: ExtractionSettings) -> None:
        self.images, self.tokenizer, self.output, self.settings = images, tokenizer, output, settings
        group = tokenizer.images_at_once(settings.image_size**2)
        self.batch_size = -(-settings.batch_size // group) * group
        side = settings.image_size // tokenizer.downsample_factor
        self.shape = (tokenizer.embed_dim, side, side)
        self.shards = range(-(-images.count // settings.shard_size))
        self._done = 0

    def span(self, shard: int) -> range:
        """Return the numbers of the images of a shard."""
        size = self.settings.shard_size
        return range(shard * size, min((shard + 1) * size, self.images.count))

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return shard_path(self.output, 0, shard)

    def make(self, turn: list[int], rank: int, stop: StopRequest) -> _Report:
        """Make the shard of this process in `turn`, which has one for each process, or fewer in the last turn."""
        report, started = _Report(), time.perf_counter()
        if rank < len(turn):
            self._make(turn[rank], len(turn), stop, report)
        self._done += sum(map(len, map(self.span, turn)))
        report.seconds, report.interrupted = time.perf_counter() - started, stop.asked
        return report

    def _make(self, shard: int, sharing: int, stop: StopRequest, report: _Report) -> None:
        span = self.span(shard)
        rows = _ShardRows(self.path(shard), len(span), self.shape, self.settings.flips, self.images.extras)
        numbers = span[rows.done :]
        read = self.images.batches(numbers, self.batch_size, Unreadable.BLACK, self.settings.threads)
        kept = time.monotonic()
        with contextlib.closing(one_ahead(map(self._ready, read))) as batches:
            while rows.done < len(span):
                batch = report.timed("waiting for images", partial(next, batches))
                rows.put(report.timed("encoder", partial(self._encode, batch, span[rows.done])), batch)
                report.made += len(batch.labels)
                self.progress.reach(self._done + rows.done * sharing)
                if stop.asked:
                    break
                if time.monotonic() - kept > PART_SECONDS:
                    report.timed("writing", rows.keep)
                    kept = time.monotonic()
        report.timed("writing", rows.write if rows.done == len(span) else rows.keep)

    def _ready(self, batch: ImageBatch) -> ImageBatch:
        return batch._replace(pixels=ready_for(self.tokenizer.device, batch.pixels))

    def _encode(self, batch: ImageBatch, start: int) -> list[Tensor]:
        """Return the latents (N, C, h, w) of the images from number `start` on, then those of the mirrored ones."""
        pixels = batch.pixels.to(self.tokenizer.device, non_blocking=True)
        pictures = [pixels, pixels.flip(-1)][: 1 + self.settings.flips]
        return [self._latents(picture, start, mirrored) for mirrored, picture in enumerate(pictures)]

    def _latents(self, pixels: Tensor, start: int, mirrored: int) -> Tensor:
        with float32_products(self.tokenizer.device, self.settings.tf32):
            posterior = self.tokenizer.posterior(to_float(pixels))
        mean, logvar = posterior.mean.cpu(), posterior.logvar.cpu()
        if not self.settings.sample:
            return mean
        each = (DiagonalGaussian(mean[row : row + 1], logvar[row : row + 1]) for row in range(len(mean)))
        seed = self.settings.seed
        return torch.cat([one.sample(generator_for(seed, start + row, mirrored)) for row, one in enumerate(each)])


class _ShardRows:
    """The rows of one shard as they come, including those of unreadable images until it is written.

    Args:
        extras: see `ImageSet.extras`.

    Attributes:
        done: number of rows, including those of an earlier call that was interrupted.
    """

    def __init__(
        self, path: Path, size: int, shape: tuple[int, int, int], flips: bool, extras: Mapping[str, Tensor] = NO_EXTRAS
    ) -> None:
        self.path, self.size, self.extras = path, size, tuple(extras)
        self.done, self.unreadable = 0, list[list[str]]()
        self.rows = {"labels": torch.zeros(size, dtype=torch.long), "read": torch.ones(size, dtype=torch.bool)}
        self.rows["cut"] = torch.zeros(size)
        self.latents = [f"latents{number}" for number in range(1 + flips)]  # names of rows
        self.rows |= {name: torch.empty(size, *shape) for name in self.latents}
        self.rows |= {name: form.new_zeros(size, *form.shape[1:]) for name, form in extras.items()}
        self._part = path.with_suffix(PART)
        self._take_part()

    def put(self, encoded: list[Tensor], batch: ImageBatch) -> None:
        """Add a batch."""
        added = {name: getattr(batch, name) for name in ("labels", "read", "cut", *self.extras)}
        added |= dict(zip(self.latents, encoded, strict=True))
        for name, rows in added.items():
            self.rows[name][self.done : self.done + len(rows)] = rows
        self.unreadable += map(list, batch.unreadable)
        self.done += len(batch.labels)

    def keep(self) -> None:
        """Write the rows so far beside the future shard, for a rerun to go on from."""
        rows = {name: whole[: self.done] for name, whole in self.rows.items()}
        save_weights(rows, self._part, {"unreadable": json.dumps(self.unreadable)})

    def _take_part(self) -> None:
        """Read the rows of an interrupted call, unless a power cut has damaged them."""
        from safetensors import SafetensorError, safe_open

        try:
            require_regular(self._part)
            with safe_open(self._part, framework="pt") as opened:
                unreadable = json.loads(opened.metadata()["unreadable"])
                there = {name: opened.get_tensor(name) for name in self.rows}
            if not all(isinstance(text, str) for name, reason in unreadable for text in (name, reason)):
                raise ValueError("names are no texts")
            done = len(there["labels"])
            require_form(there, {name: whole[:done] for name, whole in self.rows.items()})
            if not bool((there["labels"] >= 0).all()):
                raise ValueError("a label is below 0")
        except (SafetensorError, OSError, *MALFORMED):
            return
        self.done, self.unreadable = done, unreadable
        for name, rows in there.items():
            self.rows[name][: self.done] = rows

    def write(self) -> None:
        """Write the shard without unreadable images."""
        read = self.rows["read"]
        chosen = slice(None) if bool(read.all()) else read
        labels, *latents = (self.rows[name][chosen] for name in ("labels", *self.latents))
        extras = {name: self.rows[name][chosen] for name in self.extras}
        moments = Moments()
        for some in latents[0].split(MOMENTS_ROWS):
            moments.add(some)
        record = {
            "images": self.size,
            "moments": moments.as_dict(),
            "largest_label": int(labels.max()) if len(labels) else -1,
            "cut": {"images": int((self.rows["cut"] > 0).sum()), "most": round(float(self.rows["cut"].max()), 4)},
            "unreadable": self.unreadable,  # name and reason of each image that is left out
        }
        tensors = dict(zip(("labels", "latents", "latents_flip"), (labels, *latents), strict=False)) | extras
        record[DIGEST] = shard_digest({"file": self.path.name, **record}, tensors)
        write_shard(self.path, latents[0], labels, *latents[1:], metadata={RECORD: json.dumps(record)}, extras=extras)
        self._part.unlink(missing_ok=True)


@contextlib.contextmanager
def _planned(maker: _ShardMaker, described: dict[str, Any]) -> Iterator[list[int]]:
    """Hold the folder and give the numbers of the missing shards."""
    output, file = maker.output, maker.output / LATENTS_MANIFEST
    require_unicode(output)
    with held_folder(output, "extraction"):
        if file.exists():
            _check_settings(file, described)
        elif foreign := [*shard_files(output), *output.glob(STATS_NAME)]:
            raise LightningDiTError(
                f"{output} holds {foreign[0].name} already, which is of another origin",
                "choose another --output, or move it away",
            )
        else:
            begun = {"settings": described, CLASS_NAMES: maker.images.class_names, **maker.images.facts}
            _write_manifest(output, begun)
        noted, paths = manifest_digests(output), {shard: maker.path(shard) for shard in maker.shards}
        missing = [shard for shard, path in paths.items() if not _is_whole(path, noted.get(path.name))]
        _forget_digests(output, noted.keys() & {paths[shard].name for shard in missing})
        for shard in paths.keys() - set(missing):
            paths[shard].with_suffix(PART).unlink(missing_ok=True)
        numbers = int(np.prod(maker.shape)) * (1 + maker.settings.flips)
        needed = sum(len(maker.span(shard)) for shard in missing) * (4 * numbers + 8)
        require_space(output, needed, "the latents", "choose another --output, or leave out --flip")
        yield missing


def _check_settings(file: Path, described: dict[str, Any]) -> None:
    try:
        known = read_json(file)["settings"]
        changed = setting_differences(known, json.loads(json.dumps(described)))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise LightningDiTError(f"{file} is no manifest of latents ({error})", "choose another --output") from error
    if changed:
        raise LightningDiTError(
            f"{file.parent} holds latents of other settings ({'; '.join(changed)})", "choose another --output"
        )


def _record(path: Path) -> dict[str, Any] | None:
    """Return what a shard says of itself (see `_ShardRows.write`); None for a missing or damaged one."""
    from safetensors import SafetensorError, safe_open

    try:
        require_regular(path)
        with safe_open(path, framework="pt") as opened:
            record = json.loads((opened.metadata() or {})[RECORD])
            _check_record(record, opened.get_slice("latents").get_shape())
        return {"file": path.name, **record}
    except (SafetensorError, OSError, *MALFORMED):
        return None


def _forget_digests(output: Path, names: set[str]) -> None:
    """Drop digests from a finished manifest: on another machine a shard that is made again may have another one."""
    if names:
        content = read_json(output / LATENTS_MANIFEST)
        for row in content["shards"]:
            if row["file"] in names:
                row.pop(DIGEST, None)
        _write_manifest(output, content)


def _is_whole(path: Path, noted: str | None) -> bool:
    """Tell whether a shard is as it was written; those of earlier releases have no digest, and are believed.

    Args:
        noted: its digest by the manifest of a finished extraction.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    record = _record(path)
    if record is None or record.get(DIGEST) != (noted or record.get(DIGEST)):
        return False
    try:
        require_regular(path)
        return DIGEST not in record or shard_digest(record, load_file(path)) == record[DIGEST]
    except (SafetensorError, OSError, *MALFORMED):
        return False


def _check_record(record: Any, shape: list[int]) -> None:
    """Raise one of `MALFORMED` unless `record` is what `_ShardRows.write` says of latents of this shape."""
    moments, cut = Moments(), record.get("cut", {"images": 0, "most": 0.0})
    moments.merge(record["moments"])
    counts = (record["images"], record["largest_label"], moments.latents, moments.values, cut["images"])
    texts = [text for name, reason in record["unreadable"] for text in (name, reason)]
    if not (all(type(count) is int for count in counts) and isinstance(cut["most"], float)):
        raise ValueError("counts are no whole numbers")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("names are no texts")
    sums = moments.as_dict()
    if moments.latents != shape[0] or any(np.shape(sums[name]) != (shape[1],) for name in ("total", "squares")):
        raise ValueError("the moments are of other latents")


def _finish(maker: _ShardMaker, described: dict[str, Any]) -> dict[str, Any]:
    """Write statistics and manifest from the records of all shards, in their order, and return the manifest.

    Raises:
        LightningDiTError: no image of the set can be read.
    """
    images, moments = maker.images, Moments()
    records = [record for shard in maker.shards if (record := _record(maker.path(shard))) is not None]
    unreadable = [row for record in records for row in record["unreadable"]]
    for record in records:
        moments.merge(record["moments"])
    if not moments.latents:
        name, reason = unreadable[0]
        raise LightningDiTError(
            f"none of the {images.count} images of {images.source} can be read ({name}: {reason})", FIX
        )
    # validation windows are normalised by the statistics of the training: their own would be mistaken for those
    stats = moments.stats() if images.has_statistics else None
    if stats:
        stats.save(maker.output / STATS_NAME, moments.latents)
    manifest = {
        "settings": described,
        "source": images.source,
        "classes": len(images.class_names or ()) or max(record["largest_label"] for record in records) + 1,
        CLASS_NAMES: images.class_names,
        **images.facts,
        "cut": {
            "images": sum(record.get("cut", {}).get("images", 0) for record in records),
            "most": max(record.get("cut", {}).get("most", 0.0) for record in records),
        },
        KEY: encoder_values(maker.tokenizer.model.state_dict()),
        "precision": TF32 if maker.settings.tf32 else "fp32",
        "latents": moments.latents,
        "values_per_channel": moments.values,
        **({"mean": stats.mean.flatten().tolist(), "std": stats.std.flatten().tolist()} if stats else {}),
        "shards": [_manifest_row(record) for record in records],
        "unreadable": unreadable,
    }
    _write_manifest(maker.output, manifest)
    return manifest


def _manifest_row(record: dict[str, Any]) -> dict[str, Any]:
    digest = {DIGEST: record[DIGEST]} if DIGEST in record else {}
    return {"file": record["file"], "images": record["images"], **digest, **record["moments"]}


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    write_text(folder / LATENTS_MANIFEST, json.dumps(content, indent=1) + "\n")
