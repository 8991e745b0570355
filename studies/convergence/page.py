"""What the study found: tables for docs/training.md, and the curves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from LightningDiT.files import atomic_path
from LightningDiT.tools.report import put_between_marks
from studies.convergence.arms import ALIGNED, ARMS, PLAIN, Plan, run_name, start_name

MARK = "convergence"
CURVES = "training/convergence.png"  # beside the page
#: Figures of a checkpoint: title, and how a table writes them.
DISTANCES = {
    "frechet": ("Fréchet distance, judge's features", "{:.2f}"),
    "frechet_pixels": ("Fréchet distance, 4x4 means of pixels", "{:.3f}"),
}
BASELINES = ARMS[:2]  # whose ends the others are to reach
#: Figures of a tokenizer: keys in evaluation.json, title, and how they are written.
TOKENIZER_FIGURES = (
    (("psnr_mean",), "PSNR (dB)", "{:.1f}"),
    (("frechet_distance",), "Fréchet distance of reconstructions", "{:.3f}"),
    (("latents", "uniformity"), "uniformity of latents", "{:.2f}"),
)


@dataclass(frozen=True)
class Curve:
    """One training: images seen, and a figure after each number of them."""

    images: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def final(self) -> float:
        """The figure at the end."""
        return self.values[-1]

    def reached(self, level: float) -> float | None:
        """Return after how many images the figure first falls to `level`; None where it never does.

        Between two checkpoints the logarithm of the figure is taken to fall evenly. Where the first checkpoint is
        below already, its number of images is an upper bound, and is returned.
        """
        if self.values[0] <= level:
            return self.images[0]
        pairs = list(zip(self.images, self.values, strict=True))
        for (start, high), (end, low) in pairwise(pairs):
            if low <= level:
                share = math.log(high / level) / math.log(high / low) if low > 0 else 1.0
                return start + share * (end - start)
        return None


Curves = dict[tuple[str, int], Curve]  # by name of the arm, and seed


def read_curves(plan: Plan, figure: str) -> Curves:
    """Return the curves of one figure of all trainings."""
    curves = {}
    for arm in ARMS:
        for seed in plan.seeds:
            found = _read(plan.folder / f"{run_name(arm, seed)}.json")
            found |= _read(plan.folder / f"{start_name(arm, seed)}.json") if arm.quick else {}
            steps = sorted(int(key) for key in found if key.isdigit())
            values = tuple(found[str(step)][figure] for step in steps)
            curves[arm.name, seed] = Curve(tuple(plan.images(step) for step in steps), values)
    return curves


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def images_saved(goal: Curve, curve: Curve) -> str:
    """Return how many times fewer images `curve` needs to come to the end of `goal`, as text."""
    images = curve.reached(goal.final)
    if images is None:
        return "not reached"
    ratio = f"{goal.images[-1] / images:.1f}"
    return f"{ratio} or more" if images == curve.images[0] else ratio


def arms_table(plan: Plan, figure: str) -> list[str]:
    """Return the Markdown table of one distance: at the end, and the images saved against each baseline."""
    curves, (title, written) = read_curves(plan, figure), DISTANCES[figure]
    heads = [title, *(f"images saved to the end of “{base.title}”" for base in BASELINES)]
    lines = [f"| arm | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for arm in ARMS:
        cells = [_each(plan, lambda seed, arm=arm: written.format(curves[arm.name, seed].final))]
        for base in BASELINES:
            pairs = {seed: (curves[base.name, seed], curves[arm.name, seed]) for seed in plan.seeds}
            cells.append("" if arm is base else _each(plan, lambda seed, pairs=pairs: images_saved(*pairs[seed])))
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    real = _read(plan.folder / f"{run_name(ARMS[0], plan.seeds[0])}.json")["real"]
    return [
        *lines,
        f"| {plan.count} real training photographs | {written.format(real[figure])} |{' |' * len(BASELINES)}",
        "",
    ]


def accuracy_line(plan: Plan) -> str:
    """Return in a sentence how many images the judge sees as the class that was asked for, at the end."""
    curves = read_curves(plan, "accuracy")
    shares = (f"{arm.title} {_each(plan, lambda s, arm=arm: f'{curves[arm.name, s].final:.1%}')}" for arm in ARMS)
    return f"Seen as asked, at the end: {'; '.join(shares)}."


def _each(plan: Plan, text: Callable[[int], str]) -> str:
    """Return the texts of all seeds, or the one that they share."""
    texts = [text(seed) for seed in plan.seeds]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def tokenizers_table(plan: Plan) -> list[str]:
    """Return the Markdown table of both tokenizers."""
    titles = [title for _, title, _ in TOKENIZER_FIGURES]
    lines = [f"| tokenizer | {' | '.join(titles)} |", "|---" * (1 + len(titles)) + "|"]
    for name in (PLAIN, ALIGNED):
        report = _read(plan.folder / f"evaluation-{name}" / "evaluation.json")
        cells = [written.format(_at(report, keys)) for keys, _, written in TOKENIZER_FIGURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _at(report: dict[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        report = report[key]
    return report


def write_page(plan: Plan, page: Path) -> Path:
    """Put the tables between the marks of `page`, write the curves beside it, and return the path of their picture."""
    lines = [
        f"**{plan.images(plan.steps):,} images a training, {plan.count} images judged a checkpoint, seeds"
        f" {' / '.join(map(str, plan.seeds))}:**",
        "",
    ]
    for figure in DISTANCES:
        lines += arms_table(plan, figure)
    put_between_marks(page, [*lines, accuracy_line(plan), "", *tokenizers_table(plan)], "Training", MARK)
    curves = page.parent / CURVES
    draw(plan, curves)
    with atomic_path(curves.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(points(plan), indent=1) + "\n", encoding="utf-8")
    return curves


def points(plan: Plan) -> dict[str, Any]:
    """Return every point of the curves: by training, the figures after each number of images."""
    every = {name: read_curves(plan, name) for name in (*DISTANCES, "accuracy")}
    return {
        run_name(arm, seed): {
            "images": every["accuracy"][arm.name, seed].images,
            **{name: curves[arm.name, seed].values for name, curves in every.items()},
        }
        for arm in ARMS
        for seed in plan.seeds
    }


def draw(plan: Plan, path: Path) -> None:
    """Draw each distance against the images seen: the mean of the seeds as a line, each seed as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(DISTANCES), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, (title, _)) in enumerate(DISTANCES.items(), 1):
        axes = figure.add_subplot(1, len(DISTANCES), place)
        curves = read_curves(plan, name)
        for number, arm in enumerate(ARMS):
            runs = [curves[arm.name, seed] for seed in plan.seeds]
            thousands = [images / 1000 for images in runs[0].images]
            means = [fmean(values) for values in zip(*(run.values for run in runs), strict=True)]
            axes.plot(thousands, means, color=f"C{number}", label=arm.title)
            for run in runs:
                axes.plot(thousands, run.values, ".", color=f"C{number}", alpha=0.6)
        axes.set(title=title, xlabel="images seen, thousands", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
