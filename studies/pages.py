"""What the studies share: their options, figures kept part by part, pages and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, write_text
from LightningDiT.tools.report import put_between_marks

CLASSES = len(FASHION_MNIST_CLASSES)

Figures = dict[str, Any]
#: How a part of a study is measured, and how its figures become lines of Markdown.
Part = tuple[Callable[[argparse.Namespace], Figures], Callable[[Figures], list[str]]]


def equal_numbers(text: str) -> int:
    """Return an option's value as a number of images with equally many of each class, at least two."""
    count = int(text) if text.isdecimal() else 0
    if count < 2 * CLASSES or count % CLASSES:
        raise argparse.ArgumentTypeError(
            f"{text} images; a multiple of {CLASSES} from {2 * CLASSES} on is expected, equal numbers of each class"
        )
    return count


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """Add the folder of Fashion-MNIST."""
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")


def add_study_options(parser: argparse.ArgumentParser, count: int, output: str = "docs") -> None:
    """Add data set, model, number of images and the folder of the results.

    Args:
        count, output: defaults.
    """
    add_data_option(parser)
    parser.add_argument("--model", default="models/fashion-mnist", help="folder of model, tokenizer and judge")
    parser.add_argument("--count", type=equal_numbers, default=count, help="generated images; default: %(default)s")
    parser.add_argument("--output", default=output, help="folder of the results; default: %(default)s")


def kept_parts(path: Path) -> Figures:
    """Return the figures that the JSON file at `path` holds by part; none if there is no file.

    A study calls it before it measures, so that minutes of measuring do not end at a damaged file.

    Raises:
        LightningDiTError: the file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(study, dict):
            raise ValueError("a mapping is expected")
    except (OSError, ValueError) as error:
        raise LightningDiTError(f"{path} cannot be read ({error})", f"git restore {path}, or remove it") from error
    return study


def write_json(path: Path, figures: Figures) -> None:
    """Write figures, whole or not at all."""
    write_text(path, json.dumps(figures, indent=1) + "\n")


def keep_part(path: Path, part: str, figures: Any) -> Figures:
    """Put the figures of one part into the JSON file at `path` and return everything that it then holds.

    Raises:
        LightningDiTError: see `kept_parts`.
    """
    study = {**kept_parts(path), part: figures}
    write_json(path, study)
    return study


def run_parts(args: argparse.Namespace, name: str, parts: Mapping[str, Part]) -> Figures:
    """Measure the parts `args.part`, keep each in NAME/study.json and renew the tables in NAME.md, and return all."""
    file, page = Path(args.output) / name / "study.json", Path(args.output) / f"{name}.md"
    study = kept_parts(file)
    for part in args.part:
        measure, _ = parts[part]
        study = keep_part(file, part, measure(args))
        tables = {known: table(study[known]) for known, (_, table) in parts.items() if known in study}
        put_between_marks(page, [line for lines in tables.values() for line in lines], name.capitalize())
        print("\n".join(tables[part]), flush=True)
    print(f"wrote {file} and the tables in {page}")
    return study


@contextmanager
def plot(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Give a matplotlib figure, and write it as PNG when the block ends.

    Args:
        rows, columns: of its panels.
        size: of a panel in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure((size[0] * columns, size[1] * rows), layout="constrained")
    figure.subplots(rows, columns)
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
