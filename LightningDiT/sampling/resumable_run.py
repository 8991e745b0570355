"""A run of sampling that can be stopped: a folder of images and a manifest; a rerun samples what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from LightningDiT.compiling import WHOLE, Plan
from LightningDiT.config import Config, as_dict, as_mapping, resolved_solver, setting_differences, typed
from LightningDiT.console import Progress, StopRequest
from LightningDiT.data.image_sets import Classes, FileImages
from LightningDiT.data.labels import CLASS_NAMES, CONDITION_NAMES, Labels
from LightningDiT.data.npz import write_npz
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError, fixed_by
from LightningDiT.files import (
    append_text,
    atomic_path,
    check_space,
    digest,
    disk_errors,
    fingerprint,
    held_folder,
    read_json,
    read_text,
    remove_leftovers,
    rename_command,
    write_text,
)
from LightningDiT.images import save_levels, save_png
from LightningDiT.loading import STATS_NAME
from LightningDiT.sampling.conditions import numbers_of_conditions
from LightningDiT.sampling.null_row import check_guidance
from LightningDiT.sampling.options import images_at_once
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.preview import Preview
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path

MANIFEST = "manifest.json"
ACCELERATION = "acceleration"  # key of the plan in the manifest; it belongs to the run, not to its settings
CONDITIONS = "conditions"  # key of the second label of each image in the manifest
PIXELS, LEVELS = "pixels", "grey of 16 bits, 0 is level 0 and 65535 level 1"  # key and value, for one channel
LAYOUT, BY_CLASS = "layout", "by class"  # key and value in the manifest of a run with a folder for each class
MOST_LETTERS = 60  # of a class's name in that of its folder: 240 bytes at most
UNFINISHED = "The time budget is over; run the same command again to continue."
#: Settings that change how a run is computed but not its images, or that the manifest holds in another form.
WITHOUT_EFFECT = ("per_proc_batch_size", "fid_num", "precision", "solver_file", "guide_ckpt", "compile")
DIGESTS = "images.sha256"  # a line for each image, in the form of sha256sum, without the folder of its class
DIGEST_LINE = re.compile(r"([0-9a-f]{64})  ([0-9]+\.png)")
DIGEST_BYTES = 2**10  # for each image at most, since a line is added when an image is made again


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


def manifest_of(
    config: Config, labels: Sequence[int], seed: int, precision: str, conditions: Sequence[int | None] | None = None
) -> dict[str, Any]:
    """Return everything that the pixels of a run depend on, as plain values.

    Args:
        precision: `Precision.name`; `auto` in the configuration depends on the machine.
        conditions: of each image, None for none; None for a model without conditions.
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
    if config.adapter_path:
        files["adapter"] = config.adapter_path
    return {
        "seed": seed,
        "labels": list(labels),
        **({} if conditions is None else {CONDITIONS: list(conditions)}),
        "precision": precision,
        "sample": sample,
        "transport": as_dict(config.transport),
        "model": as_dict(config.model),
        "latents": {"norm": config.data.latent_norm, "multiplier": config.data.latent_multiplier},
        "weights": {name: fingerprint(path) for name, path in files.items() if path},
    }


def label_names(pipe: LightningDiTPipeline) -> dict[str, list[str]]:
    """Return what the manifest of a run says of the names of classes and conditions, as far as they have names."""
    names = {CLASS_NAMES: pipe.labels.identity, CONDITION_NAMES: pipe.conditions and pipe.conditions.identity}
    return {key: list(value) for key, value in names.items() if value}


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
        if manifest.get(LAYOUT) == BY_CLASS:  # else the subfolders are runs of their own, as in a demonstration
            for subfolder in folder.glob("*/"):
                remove_leftovers(subfolder)
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
    conditions: Sequence[int | None] | None = None,
) -> RunResult:
    """Sample the image of every label into `folder` as `000000.png`, ..., except those that are there unchanged.

    The images are cut into batches by their index, whatever is there already and however many processes share
    them, and a batch that lacks an image is sampled whole: a run that was killed gives the very bytes of one
    that was not. The processes, which see one file system, take the batches in turn.

    Args:
        minutes: time budget. When it is over, or after Ctrl-C, the current batches are finished and the rest is
            left to a rerun; every call samples at least one batch.
        preview: shows the first images that this call samples.
        by_class: a subfolder for each class, named after it; a run that has begun keeps its layout.
        conditions: of each image, None for none; None: no image has one.

    Raises:
        LightningDiTError: the folder cannot be written, holds another run, or the disk is too small; or guidance by
            null labels that were never trained.
    """
    started = time.monotonic()
    deadline = started + 60 * minutes if minutes is not None else float("inf")
    by_class = processes.from_main(lambda: kept_layout(folder, by_class))
    paths = _image_paths(folder, labels, class_folders(pipe.labels) if by_class else None)
    processes.agree(lambda: check_guidance(pipe.config.sample, pipe.null_failure))
    asked = Asked(
        labels, numbers_of_conditions(pipe.conditions, conditions, len(labels), pipe.null_failure), seed, folder, paths
    )
    with contextlib.ExitStack() as stack:
        opened = _missing_batches(pipe, asked, processes.count)
        plan, batches = processes.from_main(lambda: stack.enter_context(opened))
        processes.agree(lambda: stack.enter_context(pipe.settled(plan, f"the run in {folder}")))
        processes.say(f"acceleration   {plan.describe()}")
        stop = stack.enter_context(StopRequest(quiet=not processes.is_main))
        progress = stack.enter_context(Progress(sum(map(len, batches)), "image", quiet=not processes.is_main))
        shown = preview if batches and processes.is_main else None
        if shown:
            shown.start(pipe, seed, batches[0])
        sampler = _BatchSampler(pipe, asked, progress, shown)
        made, nfe, interrupted = _sample_in_turns(sampler, batches, processes, deadline, stop)
    there = [path if _is_there(path) else None for path in paths]
    return RunResult(there, made, nfe, time.monotonic() - started, interrupted)


def _sample_in_turns(
    sampler: _BatchSampler, batches: Sequence[list[int]], processes: Processes, deadline: float, stop: StopRequest
) -> tuple[int, int, bool]:
    """Sample one batch a process at a time until all are done, the time is over or somebody asks to stop.

    Returns:
        The number of images made, the evaluations of each in the last turn, and whether a request stopped it.
    """
    asked, made, nfe = sampler.asked, 0, 0
    for first in range(0, len(batches), processes.count):
        turn = batches[first : first + processes.count]

        def report(turn: list[list[int]] = turn) -> tuple[dict[str, str], int, bool, bool]:
            return *sampler.sample(turn, processes.rank), time.monotonic() > deadline, stop.asked

        saved, evaluations, over, stopped = zip(*processes.share(report), strict=True)
        new = dict(pair for some in saved for pair in some.items())
        processes.from_main(partial(append_text, asked.folder / DIGESTS, _digest_lines(new)))
        made, nfe = made + len(new), max(evaluations)
        if sampler.preview and first == 0:
            sampler.preview.save()
        if any(stopped) or any(over):
            return made, nfe, any(stopped)
    processes.from_main(lambda: _require_all(asked.folder, asked.paths))
    return made, nfe, False


@dataclass(frozen=True)
class Asked:
    """What a run is to make.

    Attributes:
        labels, conditions: of each image; see `sample_run`.
        seed: of the noise.
        folder: of the run.
        paths: of each image.
    """

    labels: Sequence[int]
    conditions: list[int | None] | None
    seed: int
    folder: Path
    paths: Sequence[Path]


def _image_paths(folder: Path, labels: Sequence[int], subfolders: Sequence[str] | None) -> list[Path]:
    parents = [folder / subfolders[label] if subfolders else folder for label in labels]
    return [parent / f"{index:06d}.png" for index, parent in enumerate(parents)]


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
        asked: Asked,
        progress: Progress,
        preview: Preview | None,
    ) -> None:
        self.pipe, self.asked = pipe, asked
        self.progress, self.preview = progress, preview
        self._done, self._note = 0, ""
        self._steps = pipe.solver(pipe.config.sample).steps  # of a batch, until the first one has shown it

    def sample(self, turn: list[list[int]], rank: int) -> tuple[dict[str, str], int]:
        """Sample a batch, save the images that are missing, and return their digests and the evaluations of each.

        Args:
            turn: the batches, as indices, that all processes sample at the same time; the last turn may have too few.
            rank: of this process.
        """
        images = sum(map(len, turn))
        saved, nfe = self._sample(turn[rank], images) if rank < len(turn) else ({}, 0)
        self._done += images
        self._note = f"{nfe} evaluations each" if nfe else self._note
        self.progress.reach(self._done, self._note)
        return saved, nfe

    def _sample(self, indices: list[int], images: int) -> tuple[dict[str, str], int]:
        seen, last = 0, 0

        def watch(step: int, t: float, state: Tensor) -> None:
            nonlocal seen, last
            seen, last = seen + len(state), step
            share = min(1.0, seen / (self._steps * len(indices)))
            self.progress.reach(self._done + images * share, self._note)
            if self.preview is not None:
                self.preview(step, t, state)

        asked, levels = self.asked, self.pipe.channels == 1
        out = self.pipe(
            [asked.labels[index] for index in indices],
            seed=asked.seed,
            indices=indices,
            batch_size=len(indices),
            callback=watch,
            output_type="pt" if levels else "pil",
            conditions=asked.conditions and [asked.conditions[index] for index in indices],
        )
        self._steps = last + 1
        if not (asked.folder / MANIFEST).is_file():  # else the images would come to lie in a folder of no run
            raise _removed(asked.folder)
        saved = {}
        for image, path in zip(out.images, (asked.paths[index] for index in indices), strict=True):
            if not _is_there(path):
                saved[path.name] = digest(save_image(image, path))
        return saved, out.nfe


def save_image(image: Image.Image | Tensor, path: Path) -> Path:
    """Write an image as PNG, levels (1, H, W) as one of 16 bits, and return its path."""
    if isinstance(image, Tensor):
        save_levels(image.unsqueeze(0), [path])
        return path
    return save_png(image, path)


def _require_all(folder: Path, paths: Sequence[Path]) -> None:
    """Raise LightningDiTError if an image is missing after all batches were sampled; put the digests into order."""
    if not all(map(_is_there, paths)):
        raise _removed(folder)
    _write_digests(folder, _noted_digests(folder, len(paths)), paths)


def _removed(folder: Path) -> LightningDiTError:
    return LightningDiTError(
        f"{folder} or files in it were removed while the run was sampling", "run the same command again"
    )


@contextlib.contextmanager
def _missing_batches(
    pipe: LightningDiTPipeline, asked: Asked, processes: int
) -> Iterator[tuple[Plan, list[list[int]]]]:
    """Hold the run's folder and yield its plan, and the batches, as indices, in which an image is missing."""
    sample, folder, paths = pipe.config.sample, asked.folder, asked.paths
    at_most, by_memory = pipe.batch_size(sample, processes), pipe.batch_follows_memory(sample)
    size = images_at_once(len(paths), at_most, processes if pipe.device.type != "cpu" else 1)
    fixed = at_most if sample.deterministic else size  # the same in a run of any length
    described = manifest_of(pipe.config, asked.labels, asked.seed, pipe.precision.name, asked.conditions)
    described[ACCELERATION] = asdict(pipe.plan(math.ceil(len(paths) / processes), fixed))
    described |= label_names(pipe) | ({PIXELS: LEVELS} if pipe.channels == 1 else {})
    if paths[0].parent != folder:
        described[LAYOUT] = BY_CLASS
    with opened_run(folder, described):
        plan = kept_plan(folder / MANIFEST)
        if plan.batch:
            size = plan.batch
            if by_memory:
                print(f"batch size     {size}, by the GPU's free memory when the run began", flush=True)
            elif size != described[ACCELERATION]["batch"]:
                print(f"note: the run in {folder} keeps its batches of {size} images", flush=True)
        _remove_changed(folder, paths)
        missing = [index for index, path in enumerate(paths) if not _is_there(path)]
        check_space(folder, len(missing), pipe.config.data.image_size)
        numbers = sorted({index // size for index in missing})
        yield plan, [list(range(number * size, min((number + 1) * size, len(paths)))) for number in numbers]


def _remove_changed(folder: Path, paths: Sequence[Path]) -> None:
    """Remove the images that are not those whose digests were noted, and note the digests that are missing.

    An image without a digest is one of an earlier release, or of a run that was killed after its last batch: it stays.
    """
    noted, changed = _noted_digests(folder, len(paths)), list[Path]()
    for path in filter(_is_there, paths):
        try:
            found = digest(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        if noted.setdefault(path.name, found) != found:
            changed.append(path)
            with disk_errors(path):
                path.unlink()
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        print(f"note: images that changed after they were written are made again: {changed[0]}{more}", flush=True)
    _write_digests(folder, noted, paths)


def _noted_digests(folder: Path, count: int) -> dict[str, str]:
    """Return the digest of each image by its name; the last one counts, and torn lines do not."""
    matches = filter(None, map(DIGEST_LINE.fullmatch, _digest_text(folder, count).split("\n")))
    return {match[2]: match[1] for match in matches}


def _digest_text(folder: Path, count: int) -> str:
    try:
        return read_text(folder / DIGESTS, DIGEST_BYTES * max(count, 1), errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise _unreadable(folder / DIGESTS, error) from error


def _write_digests(folder: Path, digests: dict[str, str], paths: Sequence[Path]) -> None:
    """Write the digests in the order of the images, unless the file holds just that."""
    text = _digest_lines({path.name: digests[path.name] for path in paths if path.name in digests})
    if text != _digest_text(folder, len(paths)):
        write_text(folder / DIGESTS, text)


def _digest_lines(digests: dict[str, str]) -> str:
    return "".join(f"{found}  {name}\n" for name, found in digests.items())


def _unreadable(path: Path, error: OSError) -> LightningDiTError:
    return LightningDiTError(f"{path} cannot be read ({error.strerror or error})", rename_command(path, ".old"))


def _is_there(path: Path) -> bool:
    """Tell whether an image is there; a power cut can leave an empty file."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def kept_plan(file: Path) -> Plan:
    """Return the plan in a run's manifest; runs of earlier releases computed plainly, or compiled if asked."""
    known = _known_manifest(file)
    if ACCELERATION in known:
        with fixed_by("choose another --output"):
            return typed(Plan, as_mapping(known[ACCELERATION], f"{file}: {ACCELERATION}"), f"{file}: {ACCELERATION}")
    compiled = as_mapping(known.get("sample", {}), f"{file}: sample").get("compile") is True
    return Plan(compiled=WHOLE if compiled else "", reason="as the run began")


def _known_manifest(file: Path) -> dict[str, Any]:
    try:
        return as_mapping(read_json(file), "the manifest")
    except (ValueError, OSError, LightningDiTError) as error:
        raise LightningDiTError(f"{file} cannot be read ({error})", "choose another --output") from error


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    known, now = ({**content, ACCELERATION: None} for content in (_known_manifest(file), manifest))
    # manifests of earlier releases have no names, and those of models without names have none
    ignored = {key for key in (CLASS_NAMES, CONDITION_NAMES) if not (key in known and key in manifest)}
    # and those of earlier releases have the setting that is now part of the plan
    if changed := setting_differences(known, json.loads(json.dumps(now)), {*ignored, "sample.compile"}):
        raise LightningDiTError(
            f"{file.parent} holds a run of other settings ({'; '.join(changed)})", "choose another --output"
        )
