"""The model card that `save_pretrained` writes: what the pipeline shows of itself, and what its author states.

Nothing else is in it. What nobody has stated is called so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from LightningDiT.config import as_yaml
from LightningDiT.files import read_text

CARD_NAME, PICTURE_NAME = "README.md", "samples.png"
#: The line by which a card of this program is known; a card without it is somebody's own and stays.
MARK = "<!-- Written by save_pretrained of LightningDiT. Without this line the next one leaves the card as it is. -->"
MOST_NAMES = 20  # of classes that are listed
NOT_STATED = "Not stated."


@dataclass(frozen=True)
class Facts:
    """What the author of a model states in its card.

    Args:
        data: what it was trained on, with the licence of the data; Markdown.
        licence: of the weights, an identifier as the hub has them (`mit`) or a text.
        figures: value of each measured quantity, by its name with the number of samples and the settings.
    """

    data: str | None = None
    licence: str | None = None
    figures: Mapping[str, str] = field(default_factory=dict)


_PUBLISHED = "FID-50k on ImageNet-256 as its authors state it (arXiv 2501.01423)"
_IMAGENET = "ImageNet-1k at 256x256 pixels, as its authors state (arXiv 2501.01423)."
#: What is known of the published models and of the bundled one.
KNOWN = {
    "800ep": Facts(_IMAGENET, "mit", {f"{_PUBLISHED}, guidance": "1.35", f"{_PUBLISHED}, no guidance": "2.17"}),
    "64ep": Facts(_IMAGENET, "mit", {f"{_PUBLISHED}, guidance": "2.11", f"{_PUBLISHED}, no guidance": "5.14"}),
    "fashion-mnist": Facts(
        "[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Xiao, Rasul and Vollgraf, arXiv 1708.07747,"
        " MIT): the 60,000 training photographs, 28x28 grey, with two black pixels added on each side.",
        "mit",
        {
            "2,000 generated images that a judge sees as the requested class": "96.0 %",
            "Fréchet distance of 2,000 generated images to the test images, features of that judge": "0.90",
            "the same of 2,000 real training images": "0.14",
        },
    ),
}


@dataclass(frozen=True)
class Subject:
    """What a pipeline shows of itself.

    Args:
        source: what `from_pretrained` is given to load it.
        network: its kind and size in words.
        parameters: of the network.
        tokenizer: its sizes in words.
        side, channels: of the images, in pixels.
        classes, conditions: their names or numbers, in order.
        solver, guidance: how it samples by default, in words.
        shown, shown_conditions: labels of the images in the picture; none without a picture.
    """

    source: str
    network: str
    parameters: int
    tokenizer: str
    side: int
    channels: int
    classes: Sequence[str]
    conditions: Sequence[str]
    solver: str
    guidance: str
    shown: Sequence[int] = ()
    shown_conditions: Sequence[int] = ()


def model_card(subject: Subject, facts: Facts) -> str:
    """Return the card as Markdown, with the front matter that the hub reads."""
    matter = {"tags": ["lightningdit", "flow-matching", "class-conditional-image-generation"]}
    if facts.licence:
        known = re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", facts.licence)
        matter = {"license": facts.licence if known else "other"} | matter
    what = "images of one channel (levels)" if subject.channels == 1 else "images"
    side, name = f"{subject.side}x{subject.side}", subject.source.rpartition("/")[2]
    parts = [
        f"---\n{as_yaml(matter)}---\n{MARK}",
        f"# Model card: {_cell(name)}",
        f"{subject.network} with a tokenizer generates {side} {what} by class.",
        _picture(subject),
        "## Use",
        _snippet(subject),
        "The code is the Python package LightningDiT (distribution `lightningdit-runnable`).",
        "## What it is",
        _table("what", "here", _rows(subject)),
        f"## Data\n\n{facts.data or NOT_STATED}",
        f"## Licence\n\n{facts.licence or NOT_STATED}",
        "## Figures",
        _table("what", "figure", facts.figures) if facts.figures else NOT_STATED,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_own_card(path: Path) -> bool:
    """Return whether `save_pretrained` wrote a card and nobody has taken its mark away."""
    return MARK in read_text(path, errors="replace")


def _picture(subject: Subject) -> str:
    if not subject.shown:
        return ""
    names = ", ".join(_cell(subject.classes[label]) for label in subject.shown)
    colours = "; levels in the colour map jet" if subject.channels == 1 else ""
    return f"![Generated images]({PICTURE_NAME})\n\nOne image each of {names} (seed 0{colours})."


def _snippet(subject: Subject) -> str:
    labels = list(subject.shown) or [0]
    conditions = f", conditions={list(subject.shown_conditions)}" if subject.shown_conditions else ""
    above = "  # those above" if subject.shown and subject.channels == 3 else ""
    return f"""```python
from LightningDiT import LightningDiTPipeline

pipe = LightningDiTPipeline.from_pretrained({subject.source!r})
images = pipe({labels}, seed=0{conditions}).images{above}
images[0].save("image.png")
```"""


def _rows(subject: Subject) -> dict[str, str]:
    rows = {
        "network": f"{subject.network}, {subject.parameters:,} parameters",
        "tokenizer": subject.tokenizer,
        "classes": _listed(subject.classes),
    }
    if subject.conditions:
        rows["conditions, the second label"] = _listed(subject.conditions)
    return rows | {"sampling by default": subject.solver, "guidance by default": subject.guidance}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{len(names)}: {', '.join(names[:MOST_NAMES])}{more}"


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {_cell(what)} | {_cell(str(value))} |" for what, value in rows.items()]
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])


def _cell(text: str) -> str:
    """Return a text that stays in its cell and in its line: names of classes may be anything."""
    return re.sub(r"([\\`|<>\[\]*_])", r"\\\1", " ".join(text.split()))
