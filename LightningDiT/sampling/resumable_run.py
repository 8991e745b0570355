"""A run of sampling that can be stopped: a folder of images and a manifest; a rerun samples what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.config import Config, as_dict, resolved_solver, setting_differences
from LightningDiT.console import Progress, StopRequest
from LightningDiT.data.image_sets import Classes, FileImages
from LightningDiT.data.labels import CLASS_NAMES, Labels
from LightningDiT.data.npz import write_npz
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, check_space, fingerprint, held_folder, read_json
from LightningDiT.images import save_png
from LightningDiT.loading import STATS_NAME
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.preview import Preview
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path

MANIFEST = "manifest.json"
LAYOUT, BY_CLASS = "layout", "by class"  # key and value in the manifest of a run with a folder for each class
MOST_LETTERS = 60  # of a class's name in that of its folder: 240 bytes at most
UNFINISHED = "The time budget is over; run the same command again to continue."
#: Settings that change how a run is computed but not its images, or that the manifest holds in another form.
WITHOUT_EFFECT = ("per_proc_batch_size", "fid_num", "precision", "solver_file", "guide_ckpt")
LEFTOVERS = (f".{MANIFEST}.*.tmp", ".[0-9]*.png.*.tmp")  # of `atomic_path`, when the process is killed


@dataclass(frozen=True)
class RunResult:
    """The content of a run's folder when the run ends.

    Attributes:
        paths: the image of each label, None if the run ended before it.
        made: number of images that this call sampled.
        nfe: evaluations of the velocity per image; 0 if nothing was sampled.
        seconds: wall clock of this call.
        interrupted: whether Ctrl-C ended it.
    """

    paths: list[Path | None]
    made: int
    nfe: int
    seconds: float
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every image is there."""
        return all(path is not None for path in self.paths)


def manifest_of(config: Config, labels: Sequence[int], seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything that the pixels of a run depend on, as plain values.

    Args:
        dtype: precision of the transformer; `auto` in the configuration depends on the machine.
    """
    spelt = as_dict(resolved_solver(config.sample)) | {"sampling_method": config.sample.sampling_method}
    sample = {name: value for name, value in spelt.items() if name not in WITHOUT_EFFECT}
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    files = {"transformer": config.ckpt_path, "tokenizer": config.vae.ckpt_path or tokenizer.ckpt_path}
    if config.data.latent_norm and config.data.data_path:
        files["statistics"] = str(Path(config.data.data_path) / STATS_NAME)
    if config.sample.solver_file and Path(config.sample.solver_file).is_file():
        files["solvers"] = config.sample.solver_file
    if config.sample.guide_ckpt:
        files["guide"] = config.sample.guide_ckpt
    return {
        "seed": seed,
        "labels": list(labels),
        "precision": str(dtype).removeprefix("torch."),
        "sample": sample,
        "transport": as_dict(config.transport),
        "model": as_dict(config.model),
        "latents": {"norm": config.data.latent_norm, "multiplier": config.data.latent_multiplier},
        "weights": {name: fingerprint(path) for name, path in files.items() if path},
    }


def run_name(manifest: dict[str, Any]) -> str:
    """Return a short name that belongs to these settings."""
    text = json.dumps(manifest, sort_keys=True)
    return f"run-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


@contextlib.contextmanager
def opened_run(folder: Path, manifest: dict[str, Any]) -> Iterator[None]:
    """Hold `folder` for a new run or for the run of this manifest, and remove half-written files of a killed one.

    Raises:
        LightningDiTError: the folder holds a run of other settings (the message names them) or images of no known run,
            another run is writing there, or it cannot be written.
    """
    file = folder / MANIFEST
    # asked in this order: a run that starts meanwhile has its manifest before its first image
    by_class = (image for image in folder.glob("*/[0-9]*.png") if not (image.parent / MANIFEST).exists())
    images = itertools.chain(folder.glob("[0-9]*.png"), by_class)
    if any(image.stem.isdigit() for image in images) and not file.exists():
        raise LightningDiTError(f"{folder} holds images of no known run", "choose another --output")
    with held_folder(folder, "run"):
        if file.exists():
            _check_manifest(file, manifest)
        else:
            with atomic_path(file) as temporary:
                temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        # only a run by class owns its subfolders: those of a demonstration are runs of their own
        folders = [folder, *(path for path in folder.glob("*/") if manifest.get(LAYOUT) == BY_CLASS)]
        for leftover in (file for one in folders for pattern in LEFTOVERS for file in one.glob(pattern)):
            leftover.unlink(missing_ok=True)
        yield


def kept_layout(folder: Path, by_class: bool) -> bool:
    """Return whether the run in `folder` has a subfolder for each class; `by_class` if none has begun."""
    try:
        kept = read_json(folder / MANIFEST).get(LAYOUT) == BY_CLASS
    except (OSError, ValueError, AttributeError):
        return by_class  # none has begun, or `opened_run` refuses the manifest
    if kept != by_class:
        print(
            f"note: the run in {folder} keeps its layout, {'one folder a class' if kept else 'one folder'}", flush=True
        )
    return kept


def class_folders(labels: Labels) -> list[str]:
    """Return a folder name for each class: its own name, without characters that some system refuses."""
    folders, taken = list[str](), set[str]()
    for number in range(labels.count):
        name = labels.identity[number] if labels.identity else str(number)
        name = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]|^\.|[. ]$', "_", name[:MOST_LETTERS].strip()) or "_"
        while name.casefold() in taken:
            name += f"_{number}"
        taken.add(name.casefold())
        folders.append(name)
    return folders


def sample_run(
    pipe: LightningDiTPipeline,
    labels: Sequence[int],
    seed: int,
    folder: Path,
    minutes: float | None,
    processes: Processes = ALONE,
    preview: Preview | None = None,
    by_class: bool = False,
) -> RunResult:
    """Sample the image of every label into `folder` as `000000.png`, ..., except those that are there.

    The images are cut into batches by their index, whatever is there already and however many processes share
    them, and a batch that lacks an image is sampled whole: a run that was killed gives the very bytes of one
    that was not. The processes, which see one file system, take the batches in turn.

    Args:
        minutes: time budget. When it is over, or after Ctrl-C, the current batches are finished and the rest is
            left to a rerun; every call samples at least one batch.
        preview: shows the first images that this call samples.
        by_class: a subfolder for each class, named after it; a run that has begun keeps its layout.

    Raises:
        LightningDiTError: the folder cannot be written, holds another run, or the disk is too small.
    """
    started = time.monotonic()
    deadline = started + 60 * minutes if minutes is not None else float("inf")
    by_class = processes.from_main(lambda: kept_layout(folder, by_class))
    folders = class_folders(pipe.labels) if by_class else None
    paths = [
        (folder / folders[label] if folders else folder) / f"{index:06d}.png" for index, label in enumerate(labels)
    ]
    made, nfe, interrupted = 0, 0, False
    with contextlib.ExitStack() as stack:
        batches = processes.from_main(lambda: stack.enter_context(_missing_batches(pipe, labels, seed, folder, paths)))
        stop = stack.enter_context(StopRequest(quiet=not processes.is_main))
        progress = stack.enter_context(Progress(sum(map(len, batches)), "image", quiet=not processes.is_main))
        shown = preview if batches and processes.is_main else None
        if shown:
            shown.start(pipe, seed, batches[0])
        sampler = _BatchSampler(pipe, labels, seed, folder, paths, progress, shown)
        for first in range(0, len(batches), processes.count):
            turn = batches[first : first + processes.count]

            def report(turn: list[list[int]] = turn) -> tuple[int, int, bool, bool]:
                mine = turn[processes.rank] if processes.rank < len(turn) else []
                made, nfe = sampler.sample(mine, sum(map(len, turn)))
                return made, nfe, time.monotonic() > deadline, stop.asked

            saved, evaluations, over, stopped = zip(*processes.share(report), strict=True)
            made, nfe, interrupted = made + sum(saved), max(evaluations), any(stopped)
            if shown and first == 0:
                shown.save()
            if interrupted or any(over):
                break
        else:
            _require_all(folder, paths)
    there = [path if _is_there(path) else None for path in paths]
    return RunResult(there, made, nfe, time.monotonic() - started, interrupted)


def write_samples(run: RunResult, labels: Sequence[int], side: int, target: Path) -> None:
    """Write the images of a complete run into one file; see `write_npz`.

    Raises:
        LightningDiTError: see `write_npz`; or the disk is too small.
    """
    files = [path for path in run.paths if path is not None]
    check_space(target.parent, len(files), side)
    images = FileImages(str(files[0].parent), files, Classes(torch.tensor(labels)))
    with Progress(images.count, "image") as progress:
        write_npz(images, side, target, progress.update)


class _BatchSampler:
    """Samples the batches of one process, saves their images and shows the progress of all processes."""

    def __init__(
        self,
        pipe: LightningDiTPipeline,
        labels: Sequence[int],
        seed: int,
        folder: Path,
        paths: Sequence[Path],
        progress: Progress,
        preview: Preview | None,
    ) -> None:
        self.pipe, self.labels, self.seed = pipe, labels, seed
        self.folder, self.paths = folder, paths
        self.progress, self.preview = progress, preview
        self._done, self._note = 0, ""
        self._steps = pipe.solver(pipe.config.sample).steps  # of a batch, until the first one has shown it

    def sample(self, indices: list[int], images: int) -> tuple[int, int]:
        """Sample a batch, save the images that are missing, and return their number and the evaluations of each.

        Args:
            indices: of the batch; none if the other processes take the last batches.
            images: that all processes sample at the same time.
        """
        made, nfe = self._sample(indices, images) if indices else (0, 0)
        self._done += images
        self._note = f"{nfe} evaluations each" if nfe else self._note
        self.progress.reach(self._done, self._note)
        return made, nfe

    def _sample(self, indices: list[int], images: int) -> tuple[int, int]:
        seen, last = 0, 0

        def watch(step: int, t: float, state: Tensor) -> None:
            nonlocal seen, last
            seen, last = seen + len(state), step
            share = min(1.0, seen / (self._steps * len(indices)))
            self.progress.reach(self._done + images * share, self._note)
            if self.preview is not None:
                self.preview(step, t, state)

        labels = [self.labels[index] for index in indices]
        out = self.pipe(labels, seed=self.seed, indices=indices, batch_size=len(indices), callback=watch)
        self._steps = last + 1
        if not (self.folder / MANIFEST).is_file():  # else the images would come to lie in a folder of no run
            raise _removed(self.folder)
        missing = [position for position, index in enumerate(indices) if not _is_there(self.paths[index])]
        for position in missing:
            save_png(out.images[position], self.paths[indices[position]])
        return len(missing), out.nfe


def _require_all(folder: Path, paths: Sequence[Path]) -> None:
    """Raise LightningDiTError if an image is missing after all batches were sampled."""
    if not all(map(_is_there, paths)):
        raise _removed(folder)


def _removed(folder: Path) -> LightningDiTError:
    return LightningDiTError(
        f"{folder} or files in it were removed while the run was sampling", "run the same command again"
    )


@contextlib.contextmanager
def _missing_batches(
    pipe: LightningDiTPipeline, labels: Sequence[int], seed: int, folder: Path, paths: Sequence[Path]
) -> Iterator[list[list[int]]]:
    """Hold the run's folder and yield the batches, as indices, in which an image is missing."""
    size = pipe.config.sample.per_proc_batch_size
    described = manifest_of(pipe.config, labels, seed, pipe.dtype)
    if names := pipe.labels.identity:
        described[CLASS_NAMES] = list(names)
    if paths[0].parent != folder:
        described[LAYOUT] = BY_CLASS
    with opened_run(folder, described):
        missing = [index for index, path in enumerate(paths) if not _is_there(path)]
        check_space(folder, len(missing), pipe.config.data.image_size)
        numbers = sorted({index // size for index in missing})
        yield [list(range(number * size, min((number + 1) * size, len(paths)))) for number in numbers]


def _is_there(path: Path) -> bool:
    """Tell whether an image is there; a power cut can leave an empty file."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    try:
        known = read_json(file)
        if not isinstance(known, dict):
            raise ValueError("a mapping was expected")
    except (ValueError, OSError) as error:
        raise LightningDiTError(f"{file} cannot be read ({error})", "choose another --output") from error
    # manifests of earlier releases have no names, and those of models without names have none
    ignored = () if CLASS_NAMES in known and CLASS_NAMES in manifest else (CLASS_NAMES,)
    if changed := setting_differences(known, json.loads(json.dumps(manifest)), ignored):
        raise LightningDiTError(
            f"{file.parent} holds a run of other settings ({'; '.join(changed)})", "choose another --output"
        )
