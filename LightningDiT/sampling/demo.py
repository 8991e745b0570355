"""A demonstration: a few classes, one image each, and one grid with a caption under every image."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from LightningDiT.config import Config
from LightningDiT.console import duration
from LightningDiT.device import gpu_name, processor_name
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.files import check_target, holding, read_json, write_text
from LightningDiT.images import caption_note, image_grid, save_png
from LightningDiT.sampling.conditions import Conditions, condition_text, numbers_of_conditions
from LightningDiT.sampling.pipeline import LightningDiTPipeline, captions_of
from LightningDiT.sampling.preview import Preview
from LightningDiT.sampling.resumable_run import (
    MANIFEST,
    UNFINISHED,
    RunResult,
    label_names,
    manifest_of,
    run_name,
    sample_run,
)
from LightningDiT.sampling.views import shown_file

MARK = "LightningDiT demonstration"  # text in the grid's PNG, by which it is known for ours
RECORD = "made.json"  # beside the images: who made them when, and their copies
MOST_COLUMNS = 12  # of a grid with a class in each column
GAP_COLOUR = (200, 200, 200)


@dataclass(frozen=True)
class Session:
    """A call that made images of a run.

    Attributes:
        date: its end, ISO 8601 in local time.
        images: that it made.
        seconds: of sampling and decoding them.
        load_seconds: from the call to the first sampling step.
        nfe: evaluations of the velocity for each image.
        device: GPU, or processor and number of its threads; of all processes.
        torch: its version.
        precision: of the transformer.
    """

    date: str
    images: int
    seconds: float
    load_seconds: float
    nfe: int
    device: str
    torch: str
    precision: str


@dataclass(frozen=True)
class Record:
    """What is kept beside the images of a run for its later calls.

    Attributes:
        sessions: the calls that made the images.
        copies: digest of each copy in the folder above, by its name.
    """

    sessions: list[Session] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Return the record in a run's folder; an empty one if there is none or it is damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            content = read_json(folder / RECORD)
            kinds = {"images": int, "seconds": float, "load_seconds": float, "nfe": int}
            rows = [{name: kinds.get(name, str)(value) for name, value in row.items()} for row in content["sessions"]]
            if not all(0 <= row["seconds"] < math.inf and 0 <= row["load_seconds"] < math.inf for row in rows):
                raise ValueError
            return cls([Session(**row) for row in rows], {str(name): str(of) for name, of in content["copies"].items()})
        return cls()

    def write(self, folder: Path) -> None:
        """Write the record into a run's folder."""
        write_text(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Demo:
    """A finished demonstration.

    Attributes:
        config: the settings that it was made with.
        captions: one per image.
        run: the images' files, time and evaluations.
        grid: the grid's file.
        load_seconds: from the call to the first sampling step.
        seed: of the noise.
        folder: of the run, with its images.
        sessions: the calls that made the images, as far as they are known.
    """

    config: Config
    captions: list[str]
    run: RunResult
    grid: Path
    load_seconds: float
    seed: int
    folder: Path
    sessions: list[Session]

    def summary(self) -> str:
        """Return a few lines about the images, their time and the grid."""
        head = f"{sum(path is not None for path in self.run.paths)} of {len(self.captions)} images"
        lines = [f"{head}, all of them made before"]
        if self.run.made:
            lines = [
                f"{head}, {self.run.made} made now: {duration(self.run.seconds)}"
                f" for sampling and decoding, {self.load_seconds:.1f} s for loading, {self.run.nfe} evaluations each"
            ]
        elif self.sessions:
            spent = duration(sum(made.seconds for made in self.sessions))
            lines[0] += f": {spent} for sampling and decoding until {self.sessions[-1].date}"
        if not self.run.complete:
            lines.append(UNFINISHED)
        lines.append(f"grid: {self.grid}")
        return "\n".join(lines)


def sample_demo(
    config: Config,
    classes: Sequence[int | str],
    seed: int,
    folder: Path,
    name: str,
    minutes: float | None,
    processes: Processes = ALONE,
    preview: Preview | None = None,
    conditions: Conditions = None,
) -> Demo:
    """Sample one image per class and write the grid `name` into `folder`.

    The images lie in a subfolder named after their settings, so that a rerun continues and other settings never
    overwrite them. A grid with gaps never replaces a complete one.

    Raises:
        LightningDiTError: see `LightningDiTPipeline` and `sample_run`.
        KeyboardInterrupt: Ctrl-C ended the run; the grid of the finished images is written.
    """
    started, target = time.perf_counter(), folder / name
    unfinished = target.with_name(f"{target.stem}_unfinished{target.suffix}")
    processes.from_main(lambda: [check_target(path, _is_grid) for path in (target, unfinished)])
    pipe = processes.agree(lambda: LightningDiTPipeline.from_config(config))
    labels = pipe.labels.numbers(classes)
    processes.say(f"classes        {pipe.labels.listing(labels)}")
    devices = processes.share(lambda: _device_words(pipe.device))
    numbers = processes.agree(
        lambda: numbers_of_conditions(pipe.conditions, conditions, len(labels), pipe.null_failure)
    )
    if pipe.conditions and numbers:
        processes.say(f"conditions     {condition_text(pipe.conditions, numbers, conditions is not None)}")
    captions = captions_of(pipe, labels, numbers)
    if note := processes.from_main(lambda: caption_note(captions)):
        processes.say(f"captions       {note}")
    manifest = manifest_of(config, labels, seed, pipe.precision.name, numbers) | label_names(pipe)
    run_folder = folder / run_name(manifest)
    load_seconds = time.perf_counter() - started
    run = sample_run(pipe, labels, seed, run_folder, minutes, processes, preview, conditions=numbers)
    if not run.complete and target.exists():
        target = unfinished
    sessions = list[Session]()
    if processes.is_main:
        sessions = _recorded(run_folder, run, load_seconds, devices, pipe.precision.name)
        save_png(_grid(run.paths, captions, labels, config.data.image_size), target, MARK)
    if run.interrupted:
        processes.end_by_interrupt()
    return Demo(config, captions, run, target, load_seconds, seed, run_folder, sessions)


def _is_grid(path: Path) -> bool:
    """Return whether a file is a grid of ours; those of earlier releases have no mark, and lie beside their runs."""
    return holding(MARK)(path) or any(path.parent.glob(f"run-*/{MANIFEST}"))


def _recorded(
    folder: Path, run: RunResult, load_seconds: float, devices: Sequence[str], precision: str
) -> list[Session]:
    """Return the calls that made the images in a run's folder, this one among them if it made any, and keep them."""
    record = Record.read(folder)
    if not run.made:
        return record.sessions
    now = Session(
        datetime.now().astimezone().isoformat(" ", "seconds"),
        run.made,
        run.seconds,
        load_seconds,
        run.nfe,
        ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(devices).items()),
        str(torch.__version__),
        precision,
    )
    earlier = record.sessions if run.made < len(run.paths) else []
    Record([*earlier, now], record.copies).write(folder)
    return [*earlier, now]


def _device_words(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return gpu_name(device) or f"CPU {processor_name()}, {threads} thread{'s' * (threads > 1)}"


def _grid(paths: Sequence[Path | None], captions: Sequence[str], labels: Sequence[int], side: int) -> Image.Image:
    """Return the grid of images of `side` pixels, with a grey square for each that is not there yet."""
    images = []
    for path in paths:
        if path is None:
            images.append(Image.new("RGB", (side, side), GAP_COLOUR))
            continue
        images.append(shown_file(path))
    return image_grid(images, captions, _columns(captions), [f"class {label}" for label in labels])


def _columns(captions: Sequence[str]) -> int | None:
    """Return the number of classes where they take turns, so that a column is one class; None: as it comes."""
    kinds = len(set(captions))
    turns = kinds <= MOST_COLUMNS and all(caption == captions[index % kinds] for index, caption in enumerate(captions))
    return kinds if turns and 1 < kinds < len(captions) else None
