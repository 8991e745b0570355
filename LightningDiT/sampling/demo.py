"""A demonstration: a few classes, one image each, and one grid with a caption under every image."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from LightningDiT.config import Config
from LightningDiT.console import duration
from LightningDiT.data.image_files import open_image
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.files import read_bytes, write_text
from LightningDiT.images import image_grid, save_png
from LightningDiT.sampling.options import describe_settings
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.preview import Preview
from LightningDiT.sampling.resumable_run import UNFINISHED, RunResult, manifest_of, run_name, sample_run

REPORT_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}"
    "figure{display:inline-block;margin:.4rem;text-align:center}"
    "figure img{width:128px;image-rendering:pixelated;border-radius:4px}figcaption{font-size:.85rem}"
    "pre{background:#f4f4f4;padding:1rem;white-space:pre-wrap}"
)
MOST_COLUMNS = 12  # of a grid with a class in each column
GAP_COLOUR = (200, 200, 200)


@dataclass(frozen=True)
class Demo:
    """A finished demonstration.

    Attributes:
        config: the settings that it was made with.
        captions: one per image.
        run: the images' files, time and evaluations.
        grid: the grid's file.
        load_seconds: from the call to the first sampling step.
    """

    config: Config
    captions: list[str]
    run: RunResult
    grid: Path
    load_seconds: float

    def summary(self) -> str:
        """Return a few lines about the images, their time and the grid."""
        done = sum(path is not None for path in self.run.paths)
        made = f"{self.run.made} made now" if self.run.made else "all of them made before"
        lines = [
            f"{done} of {len(self.captions)} images, {made}: {duration(self.run.seconds)}"
            f" for sampling and decoding, {self.load_seconds:.1f} s for loading, {self.run.nfe} evaluations each"
        ]
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
) -> Demo:
    """Sample one image per class and write the grid `name` into `folder`.

    The images lie in a subfolder named after their settings, so that a rerun continues and other settings never
    overwrite them. A grid with gaps never replaces a complete one.

    Raises:
        LightningDiTError: see `LightningDiTPipeline` and `sample_run`.
        KeyboardInterrupt: Ctrl-C ended the run; the grid of what is there is written.
    """
    started = time.perf_counter()
    pipe = processes.agree(lambda: LightningDiTPipeline.from_config(config))
    labels = pipe.labels.numbers(classes)
    processes.say(f"classes        {pipe.labels.listing(labels)}")
    captions = [pipe.labels.caption(label) for label in labels]
    run_folder = folder / run_name(manifest_of(config, labels, seed, pipe.dtype))
    load_seconds = time.perf_counter() - started
    run = sample_run(pipe, labels, seed, run_folder, minutes, processes, preview)
    target = folder / name
    if not run.complete and target.exists():
        target = folder / f"{target.stem}_unfinished{target.suffix}"
    if processes.is_main:
        save_png(_grid(run.paths, captions, config.data.image_size), target)
    if run.interrupted:
        processes.end_by_interrupt()
    return Demo(config, captions, run, target, load_seconds)


def write_report(demo: Demo, path: Path) -> Path:
    """Write an HTML page that holds the images themselves, their classes, settings and timings, and return `path`."""
    figures = []
    for file, caption in zip(demo.run.paths, demo.captions, strict=True):
        if file is not None:
            data = base64.b64encode(read_bytes(file)).decode()
            label = html.escape(caption)
            image = f'<img alt="{label}" src="data:image/png;base64,{data}">'
            figures.append(f"<figure>{image}<figcaption>{label}</figcaption></figure>")
    settings = html.escape(describe_settings(demo.config, len(demo.captions), demo.grid))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>LightningDiT samples</title>'
        f"<style>{REPORT_STYLE}</style><h1>LightningDiT samples</h1><div>{''.join(figures)}</div>"
        f"<h2>Settings</h2><pre>{settings}</pre><h2>Timings</h2><pre>{html.escape(demo.summary())}</pre></html>\n"
    )
    write_text(path, page)
    return path


def _grid(paths: Sequence[Path | None], captions: Sequence[str], side: int) -> Image.Image:
    """Return the grid of images of `side` pixels, with a grey square for each that is not there yet."""
    images = []
    for path in paths:
        if path is None:
            images.append(Image.new("RGB", (side, side), GAP_COLOUR))
            continue
        with open_image(path) as image:  # closed at once: a contact sheet has a thousand files
            images.append(image.convert("RGB"))
    return image_grid(images, captions, _columns(captions))


def _columns(captions: Sequence[str]) -> int | None:
    """Return the number of classes where they take turns, so that a column is one class; None: as it comes."""
    kinds = len(set(captions))
    turns = kinds <= MOST_COLUMNS and all(caption == captions[index % kinds] for index, caption in enumerate(captions))
    return kinds if turns and 1 < kinds < len(captions) else None
