"""What a notebook shows between the steps: real windows, generated ones beside the nearest real ones, the verdict.

Each function returns HTML in English and Chinese that needs nothing from elsewhere.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_bytes, read_json
from LightningDiT.radar.level_images import LevelFiles, load_windows, open_level_files
from LightningDiT.radar.sensor import Sensor
from LightningDiT.sampling.demo_report import STYLE, both_languages, escaped, html_row, html_table
from LightningDiT.verdict.cells import judged_models
from LightningDiT.verdict.gait import Axes, axes_of
from LightningDiT.verdict.generated import read_generated
from LightningDiT.verdict.judging import Judged
from LightningDiT.verdict.pictures import colour_map_of, plot_html, triple_html, triples
from LightningDiT.verdict.report import FORMAT, HTML, JSON, PAGE_STYLE, report_files
from LightningDiT.verdict.rows import ROWS, Scenario, subset
from LightningDiT.verdict.sentences import percent, points

JUDGE = "python step7_judge_generated.py"


def real_windows(levels: Path, split_file: Path, shown: int = 6, known_sensor: bool = True) -> str:
    """Return the first training window of `shown` people, evenly from all, in the colour map with axes.

    Args:
        levels, split_file: of step 5.
        known_sensor: whether axes are those of the simulator's sensor; else rows and columns.

    Raises:
        LightningDiTError: see `open_level_files`.
    """
    opened = open_level_files(Path(levels), Path(split_file))
    axes, first = _axes(opened, known_sensor), dict[str, int]()
    for at, row in enumerate(opened.split.rows):
        if row.part == "training":
            first.setdefault(row.person, at)
    people = [name for name in opened.split.people if name in first]
    chosen = np.unique(np.linspace(0, len(people) - 1, min(shown, len(people))).round().astype(int))
    plots = [_real_window(opened, first[people[at]], axes) for at in chosen]
    return _framed([f'<div class="triple">\n{"".join(plots)}\n</div>', _note(axes.note)])


def _real_window(opened: LevelFiles, at: int, axes: Axes) -> str:
    """Return the window of a row of the split as a figure."""
    row = opened.split.rows[at]
    name = ", ".join(filter(None, (row.person, row.condition)))
    return plot_html(torch.from_numpy(opened.read(at)), axes, colour_map_of(opened.split.settings), name, "")


def generated_windows(adapted: Path, shown: int = 3, known_sensor: bool = True) -> str:
    """Return generated windows of each model of step 6 beside held-out and nearest training windows.

    The first generated window of `shown` people is taken, which nobody chose, and last of all generated windows the one
    nearest to a training window; all are of the first fold and number of images.

    Raises:
        LightningDiTError: see `judged_models` and `read_generated`.
    """
    models = judged_models(Path(adapted))
    return _framed([part for name, one in models.items() for part in _model_html(name, one, shown, known_sensor)])


def _model_html(name: str, judged: Judged, shown: int, known_sensor: bool) -> list[str]:
    fold, _ = cell = judged.folds[0], judged.images[0]
    opened = open_level_files(judged.levels, judged.split_file)
    training, test = (load_windows(judged.levels, judged.split_file, part, fold) for part in ("training", "test"))
    saw = torch.isin(training.rows, torch.tensor(sorted(judged.trained[cell])))
    seen = subset(training, torch.nonzero(saw)[:, 0])
    found = triples(read_generated(judged.folders[cell], opened, fold), test, seen, shown)
    axes, colour_map = _axes(opened, known_sensor), colour_map_of(opened.split.settings)
    rows = [triple_html(one, test.class_names, axes, colour_map) for one in found]
    nearest = "Of all generated windows the one nearest to a training window:", "所有生成窗口中与训练窗口最接近的一个："
    return [f"<h2>{escaped(name)}</h2>", *rows[:-1], _note(nearest), rows[-1], _note(axes.note)]


def verdict(folder: Path) -> str:
    """Return the sentences, the table and what to try of each report of step 7, with a link to its report.html.

    Shown are the reports of the last call; those of earlier calls with other networks are named below.

    Args:
        folder: of step 7; with several models each has a folder of its own in it.

    Raises:
        LightningDiTError: there is no report, or it cannot be read.
    """
    there = report_files(Path(folder))
    if not there:
        raise LightningDiTError(f"there is no {Path(folder) / JSON}, which step 7 writes", JUDGE)
    read = [_verdict_html(path) for path in there]
    last = max(call for call, _ in read)
    parts = [part for call, own in read if call == last for part in own]
    older = ", ".join(str(path) for path, (call, _) in zip(there, read, strict=True) if call != last)
    if older:
        said = f"Not shown, since earlier calls wrote them: {older}", f"未显示（由更早的命令写入）：{older}"
        parts.append(_note(said))
    return _framed(parts)


def _verdict_html(path: Path) -> tuple[str, list[str]]:
    """Return when the call of a report began, and what is shown of it; earlier releases wrote no time."""
    folder = path.parent
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        said = f'<div class="verdict"><p class="first">{_both(content["verdict"])}</p></div>'
        tried = "".join(f"<li>{_both(text)}</li>" for text in content["what_to_try"])
        tables, call = [_table(results) for results in content["results"]], str(content.get("call", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LightningDiTError(f"{path} is no report of step 7 ({first_line(error)})", JUDGE) from error
    return call, [said, f"<ul>{tried}</ul>" if tried else "", *tables, _download(folder / HTML)]


def _both(text: Mapping[str, str]) -> str:
    return both_languages(escaped(text["en"]), escaped(text["zh"]))


def _table(results: Mapping[str, Any]) -> str:
    """Return the rows of one number of images: accuracy and difference with their intervals."""
    images = results["images"]
    english, chinese = ("all images", "全部图像") if images is None else (f"{images} images", f"{images} 张图像")
    unseen = "" if results["scenario"] == Scenario.name else escaped(f", {results['scenario']}")
    titles = [
        (f"Training data, {english} a person{unseen}", f"训练数据，每人 {chinese}{unseen.replace(', ', '，')}"),
        ("Accuracy, 95 % interval", "准确率，95 % 区间"),
        ("Difference in points, interval", "差异（百分点），区间"),
    ]
    head = "".join(f'<th scope="col">{both_languages(*title)}</th>' for title in titles)
    lines = [f"<tr>{head}</tr>"]
    for row in results["rows"]:
        known = ROWS[row["row"]]
        title = both_languages(escaped(known.title), escaped(known.chinese))
        difference = _interval(row["difference"], points) if row["difference"] else ""
        lines.append(html_row(title, _interval(row["accuracy"], percent), difference))
    return f'<div class="narrow">{html_table(lines)}</div>'


def _interval(found: Mapping[str, float | None], write: Callable[[float], str]) -> str:
    """Return a value with the ends of its interval, which one pass alone does not have."""
    value, low, high = (found[key] for key in ("value", "low", "high"))
    text = write(value or 0.0)
    return text if low is None or high is None else f"{text} ({write(low)} to {write(high)})"


def _download(page: Path) -> str:
    """Return a link that holds the whole page, so that a browser saves it from wherever the notebook runs."""
    content = base64.b64encode(read_bytes(page)).decode()
    name = escaped(f"{page.parent.name}-{page.name}")
    link = f'<a download="{name}" href="data:text/html;base64,{content}">{name}</a>'
    return f"<p>{both_languages('The whole report:', '完整报告：')} {link} ({escaped(str(page))})</p>"


def _axes(opened: LevelFiles, known_sensor: bool) -> Axes:
    return axes_of(opened.split.settings, opened.size, Sensor() if known_sensor else None)


def _note(text: tuple[str, str]) -> str:
    return f'<p class="notes">{both_languages(*map(escaped, text))}</p>'


def _framed(parts: Sequence[str]) -> str:
    content = "\n".join(filter(None, parts))
    return f'<style>\n{STYLE}\n{PAGE_STYLE}\n</style>\n<div class="ldit-report" lang="en">\n{content}\n</div>'
