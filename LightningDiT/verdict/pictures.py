"""Real windows, generated ones and their nearest training windows side by side, in the colour map with axes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.metrics.copies import nearest_under_shift
from LightningDiT.radar.colour_maps import NAMES, coloured
from LightningDiT.radar.level_images import Windows
from LightningDiT.sampling.demo_report import both_languages, escaped
from LightningDiT.verdict.gait import Axes
from LightningDiT.verdict.rows import Generated

COLOUR_MAP = "jet"  # of data without one
STEPS = (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 20, 25, 50, 100)  # between two ticks of an axis


@dataclass(frozen=True)
class Triple:
    """One person's pictures.

    Attributes:
        person: number.
        real: (H, W) levels in 0 to 1 of a held-out window; None if there is none.
        generated: (H, W) levels.
        nearest: (H, W) levels of the training window nearest to `generated`, moved in time to where it is nearest.
        distance: between them, see `copies.nearest_under_shift`.
        shift: columns by which it was moved.
    """

    person: int
    real: Tensor | None
    generated: Tensor
    nearest: Tensor
    distance: float
    shift: int


def triples(generated: Generated, held_out: Windows, training: Windows, shown: int, turn: int = 0) -> list[Triple]:
    """Return the pictures of `shown` people, evenly from all, and last the generated window most like a training one.

    Each person's first generated window is shown, which nobody chose, beside the first held-out one.

    Args:
        turn: people by whom the choice is moved on, so that folds show different ones.
    """
    people = np.roll(generated.people.unique().numpy(), -turn).tolist()
    chosen = [
        people[at] for at in np.unique(np.linspace(0, len(people) - 1, min(shown, len(people))).round().astype(int))
    ]
    firsts = [int(torch.nonzero(generated.people == person)[0]) for person in chosen]
    distances, indices, shifts = nearest_under_shift(generated.pixels, training.pixels)
    found = []
    for row in [*firsts, int(distances.argmin())]:
        person = int(generated.people[row])
        held = torch.nonzero(held_out.people == person)[:, 0]
        near = training.pixels[indices[row]].roll(int(shifts[row]), -1)
        real = _levels(held_out.pixels[held[0]]) if len(held) else None
        pair = _levels(generated.pixels[row]), _levels(near)
        found.append(Triple(person, real, *pair, float(distances[row]), int(shifts[row])))
    return found


def _levels(pixels: Tensor) -> Tensor:
    return ((pixels[0].float() + 1) / 2).clamp(0, 1)


STYLE = """
.ldit-report .triple { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem 1.2rem; margin: .6rem 0 }
.ldit-report .plot { display: grid; grid-template-columns: 3.2rem minmax(7rem, 15rem); margin: 0; text-align: left }
.ldit-report .plot img { grid-column: 2; width: 100%; aspect-ratio: 1; image-rendering: pixelated }
.ldit-report .plot .up, .ldit-report .plot .across { position: relative; font-size: .72rem; line-height: 1 }
.ldit-report .plot .up { grid-column: 1; grid-row: 1 }
.ldit-report .plot .up > span { position: absolute; right: .3rem; transform: translateY(-50%) }
.ldit-report .plot .up > .unit { right: auto; left: .5rem; top: 50%; white-space: nowrap;
  transform: translate(-50%, -50%) rotate(-90deg) }
.ldit-report .plot .across { grid-column: 2; height: 2.2rem }
.ldit-report .plot .across > span { position: absolute; top: .25rem; transform: translateX(-50%); white-space: nowrap }
.ldit-report .plot .across > .unit { left: 50%; top: 1.2rem }
.ldit-report .plot figcaption { grid-column: 2; max-width: none }
""".strip()


def triple_html(triple: Triple, names: Sequence[str], axes: Axes, colour_map: str) -> str:
    """Return the pictures of one person as a row of figures."""
    name = names[triple.person]
    distance = f"{triple.distance:.2f}"
    parts = [
        (triple.real, "real, held out", "真实（留出）"),
        (triple.generated, "generated", "生成"),
        (triple.nearest, f"nearest training window, distance {distance}", f"最近的训练窗口，距离 {distance}"),
    ]
    figures = [
        plot_html(levels, axes, colour_map, f"{name}: {english}", chinese)
        for levels, english, chinese in parts
        if levels is not None
    ]
    return '<div class="triple">\n' + "\n".join(figures) + "\n</div>"


def plot_html(levels: Tensor, axes: Axes, colour_map: str, english: str, chinese: str) -> str:
    """Return levels (H, W) as a figure with both axes: time across, speed down."""
    image = f'<img alt="{escaped(english)}" src="data:image/png;base64,{encoded(levels, colour_map)}">'
    names = both_languages(f"time, {axes.time_unit}", "时间"), both_languages(f"speed, {axes.speed_unit}", "速度")
    return plot_figure(image, axes, names, both_languages(escaped(english), escaped(chinese)))


def plot_figure(image: str, axes: Axes, names: tuple[str, str], caption: str) -> str:
    """Return the HTML of an image as a figure with both axes.

    Args:
        image: HTML, as is `caption`.
        names: of the axis of time and that of speed, with their units, HTML.
    """
    height, width = axes.size
    seconds, speed = axes.column_seconds or 1.0, axes.row_speed or 1.0
    across = [
        f'<span style="left:{100 * at / (width * seconds):.2f}%">{at:g}</span>' for at in ticks(0, width * seconds, 4)
    ]
    low, high = -height / 2 * speed, height / 2 * speed
    up = [f'<span style="top:{100 * (at - low) / (high - low):.2f}%">{at:g}</span>' for at in ticks(low, high, 6)]
    return (
        f'<figure class="plot"><div class="up">{"".join(up)}<span class="unit">{names[1]}</span></div>{image}'
        f'<div class="across">{"".join(across)}<span class="unit">{names[0]}</span></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def colour_map_of(settings: Mapping[str, Any]) -> str:
    """Return the colour map that most windows of a split had, by the split's settings."""
    maps = {name: count for name, count in (settings.get("colour_maps") or {}).items() if name in NAMES}
    return max(maps, key=lambda name: maps[name], default=COLOUR_MAP)


def encoded(levels: Tensor, colour_map: str) -> str:
    """Return levels (H, W) as a PNG in base64, in the colours of a map."""
    content = io.BytesIO()
    Image.fromarray(coloured(levels.numpy(), colour_map)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round numbers, evenly spaced, within low and high."""
    step = next((step for step in STEPS if (high - low) / step <= most), (high - low) / most)
    first = int(np.ceil(low / step - 1e-9))
    last = int(np.floor(high / step + 1e-9))
    return [round(at * step, 6) + 0.0 for at in range(first, last + 1)]
