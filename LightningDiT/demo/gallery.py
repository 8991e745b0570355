"""A gallery: one image of every class, and of every condition, each above the command that makes it."""

from __future__ import annotations

import itertools
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from LightningDiT.config import Config, describe_guidance
from LightningDiT.console import Progress, StopRequest, printable
from LightningDiT.demo.choices import Model, sample_program, typed_name
from LightningDiT.files import atomic_path, check_space, check_target, holding, write_text
from LightningDiT.sampling.demo_report import STYLE as REPORT_STYLE
from LightningDiT.sampling.demo_report import both_languages, escaped, html_row, html_table
from LightningDiT.sampling.pipeline import LightningDiTPipeline, captions_of
from LightningDiT.sampling.resumable_run import label_names, manifest_of, opened_run
from LightningDiT.sampling.views import views
from LightningDiT.verdict.pictures import STYLE as PLOT_STYLE
from LightningDiT.verdict.pictures import plot_figure

PAGE, README, IMAGES = "index.html", "README.md", "images"
#: Text by which each page is known for ours.
MARKS = {PAGE: "<title>Every class of ", README: "| class 类别 | image 图像 | command 命令 |"}
GALLERY = "gallery"  # key of the manifest that tells a gallery's images from a run's
SMALLEST = 128  # pixels; smaller images are enlarged by a whole factor
LOSSLESS = 64  # pixels of a side up to which images are PNG files; larger ones are WebP, a fifth as large
WEBP_QUALITY = 90
STYLE = (
    REPORT_STYLE
    + PLOT_STYLE
    + """
.ldit-report .all { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); gap: 1rem }
.ldit-report .all figure { display: block; margin: 0; text-align: left; content-visibility: auto;
  contain-intrinsic-size: auto 20rem }
.ldit-report .all .plot { display: grid; grid-template-columns: 3.2rem minmax(0, 1fr) }
.ldit-report .all figcaption { max-width: none }
.ldit-report .all code { display: block; margin: .2rem 0; padding: .4rem .5rem; font-size: .72rem; border-radius: 4px;
  background: rgba(128, 128, 128, .15); overflow-wrap: anywhere; user-select: all }
.ldit-report .all img { width: 100%; max-width: 16rem }
.ldit-report input { font: inherit; padding: .4rem .6rem; width: min(100%, 22rem); box-sizing: border-box }
.ldit-report [hidden] { display: none !important }
"""
).strip()
#: Hides the classes whose captions lack what is typed; the page works without it.
SEARCH = """
const field = document.getElementById("search");
field.closest("p").hidden = false;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\\s+/);
  for (const figure of document.querySelectorAll(".all figure")) {
    const caption = figure.querySelector("figcaption b").textContent.toLowerCase();
    figure.hidden = !words.every(word => caption.includes(word));
  }
});
""".strip()


@dataclass(frozen=True)
class Entry:
    """One image of a gallery.

    Attributes:
        label, condition: of the image; None is no condition, or a model without.
        caption: its number and name.
        file: below the gallery's folder.
        command: that makes it, alone.
    """

    label: int
    condition: int | None
    caption: str
    file: str
    command: str


def entries_of(model: Model, conditions: Sequence[int | None] | None, options: Sequence[str]) -> list[Entry]:
    """Return the images of every class under each of some conditions.

    Args:
        conditions: None: the model has none.
        options: of the commands, beyond class and condition.
    """
    ending = "png" if model.config.data.image_size <= LOSSLESS else "webp"
    entries = []
    for condition, label in itertools.product(conditions or [None], range(model.labels.count)):
        [name] = captions_of(model, [label], None if conditions is None else [condition])  # labels as a pipeline's
        words = ["--config", model.path, "--classes", typed_name(model.labels, label)]
        words += ["--conditions", typed_name(model.conditions, condition)] if condition is not None else []
        folder = re.sub(r"[^\w]+", "_", name).strip("_").lower()[:60] or str(label)
        command = f"{sample_program()} {shlex.join([*words, *options, '--count', '1', '--output', folder])}"
        caption = f"{label} {name}" if model.labels.names else name
        entries.append(Entry(label, condition, caption, f"{IMAGES}/{len(entries):04d}.{ending}", command))
    return entries


def check_pages(folder: Path) -> None:
    """Raise LightningDiTError if a page of the gallery would replace a file that is none."""
    for name, mark in MARKS.items():
        check_target(folder / name, holding(mark))


def make_gallery(
    model: Model, config: Config, entries: Sequence[Entry], seed: int, folder: Path, minutes: float | None = None
) -> tuple[int, bool]:
    """Sample the images that are missing, each alone as its command does, and write the page of those that are there.

    Args:
        config: of the model, with the sampling settings of the commands.
        minutes: time budget.

    Returns:
        The number of images that are there, and whether Ctrl-C ended the call.

    Raises:
        LightningDiTError: see `LightningDiTPipeline` and `opened_run`.
    """
    check_pages(folder)
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    pipe = LightningDiTPipeline.from_config(config)
    plan = pipe.plan(1, 1)
    labels = [entry.label for entry in entries]
    conditions = [entry.condition for entry in entries] if pipe.conditions else None
    check_space(folder, len(entries), max(SMALLEST, config.data.image_size))
    manifest = manifest_of(config, labels, seed, pipe.precision.name, conditions) | label_names(pipe) | {GALLERY: 1}
    with opened_run(folder / IMAGES, manifest), pipe.settled(plan, f"the gallery in {folder}"), StopRequest() as stop:
        missing = [entry for entry in entries if not _is_there(folder / entry.file)]
        with Progress(len(missing), "image") as progress:
            for entry in missing:
                _save(_view(pipe, model, entry, seed), folder / entry.file)
                progress.update()
                if stop.asked or time.monotonic() > deadline:
                    break
    there = [entry for entry in entries if _is_there(folder / entry.file)]
    for name, page in ((PAGE, page_html(model, config, there, seed)), (README, page_markdown(model, there, seed))):
        write_text(folder / name, page, holding(MARKS[name]))
    return len(there), stop.asked


def _is_there(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _view(pipe: LightningDiTPipeline, model: Model, entry: Entry, seed: int) -> Image.Image:
    """Return the image that an entry's command makes, as people see it."""
    conditions = [entry.condition] if pipe.conditions else None
    out = pipe([entry.label], seed=seed, indices=[0], batch_size=1, output_type="pt", conditions=conditions)
    [view] = views(out.images, model.colour_map)
    factor = max(1, SMALLEST // view.width)
    return view.resize((factor * view.width, factor * view.height), Image.Resampling.NEAREST)


def _save(view: Image.Image, path: Path) -> None:
    kind = {"format": "PNG", "optimize": True} if path.suffix == ".png" else {"format": "WEBP", "quality": WEBP_QUALITY}
    with atomic_path(path) as temporary:
        view.save(temporary, **kind)


# ---- pages


def page_html(model: Model, config: Config, entries: Sequence[Entry], seed: int) -> str:
    """Return the page: its images are loaded as they come into sight, and nothing is loaded from elsewhere."""
    facts = (
        ("Model", "模型", f"{model.name}: {config.model.model_type}"),
        ("Images", "图像", str(len(entries))),
        ("Seed", "随机种子", str(seed)),
        ("Guidance scale", "引导强度", describe_guidance(config.sample)),
    )
    rows = [html_row(both_languages(english, chinese), value) for english, chinese, value in facts]
    title, title_zh = f"Every class of {escaped(model.name)}", "每个类别的图像"
    note = both_languages(
        "Each image starts from the same noise. The command below it makes it.",
        "每张图像从同一噪声开始；图像下的命令可重现它。",
    )
    return (
        '<!doctype html>\n<html lang="en" style="color-scheme: light dark">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n{MARKS[PAGE]}{escaped(model.name)}</title>\n'
        f"<style>\n{STYLE}\n</style>\n"
        f'</head>\n<body style="margin: 0">\n<div class="ldit-report">\n<h1>{both_languages(title, title_zh)}</h1>\n'
        f"<p>{note}</p>\n{html_table(rows)}\n"
        f'<p hidden><label>{both_languages("Search", "搜索")} <input id="search" type="search"></label></p>\n'
        '<div class="all">\n' + "\n".join(_figures(model, entries)) + "\n</div>\n</div>\n"
        f"<script>\n{SEARCH}\n</script>\n</body>\n</html>\n"
    )


def _figures(model: Model, entries: Sequence[Entry]) -> Iterator[str]:
    side = model.config.data.image_size
    side *= max(1, SMALLEST // side)
    names = None
    if model.axes:
        units = model.axes.time_unit, model.axes.speed_unit
        names = both_languages(f"time, {units[0]}", "时间"), both_languages(f"speed, {units[1]}", "速度")
    for entry in entries:
        words = f"<b>{escaped(entry.caption)}</b><code>{escaped(entry.command)}</code>"
        image = (
            f'<img loading="lazy" width="{side}" height="{side}" alt="{escaped(entry.caption)}"'
            f' src="{quote(entry.file)}">'
        )
        if model.axes and names:
            yield plot_figure(image, model.axes, names, words)
        else:
            yield f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def page_markdown(model: Model, entries: Sequence[Entry], seed: int) -> str:
    """Return the same as Markdown, which the sites that keep repositories show."""
    rows = "\n".join(
        f"| {_cell(entry.caption)} | ![{_cell(entry.caption)}]({quote(entry.file)}) | `{_code(entry.command)}` |"
        for entry in entries
    )
    return (
        f"# Every class of {model.name} 每个类别的图像\n\n"
        f"Seed {seed}; each image starts from the same noise, and the command beside it makes it. "
        f"The same as a page: [{PAGE}]({PAGE}).\n"
        f"种子 {seed}；每张图像从同一噪声开始，旁边的命令可重现它。\n\n"
        f"{MARKS[README]}\n|---|---|---|\n{rows}\n"
    )


def _cell(text: str) -> str:
    """Return a text that ends no cell, starts no tag, link or code."""
    return re.sub(r"[|<\[\]`*_\\]", lambda found: f"&#{ord(found[0])};", printable(text))


def _code(text: str) -> str:
    """Return a text that ends neither the code nor the cell that it stands in."""
    return printable(text).replace("|", "\\|").replace("`", "'").replace("\n", " ")


def sampling_words(given: dict[str, Any]) -> list[str]:
    """Return sampling options that were given as words of a command line."""
    return [word for option, value in given.items() if value is not None for word in (option, f"{value}")]


def numbers_of_all(model: Model, named: Sequence[str] | None) -> list[int | None] | None:
    """Return the conditions of a gallery: those named, else every one; None for a model without."""
    from LightningDiT.sampling.conditions import numbers_of_conditions

    if model.conditions is None:
        return numbers_of_conditions(None, named, len(named or ()))
    chosen = partial(numbers_of_conditions, model.conditions)
    return chosen(list(named), len(named)) if named else list(range(model.conditions.count))
