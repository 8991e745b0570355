"""The results of the study: tables for docs/training.md, and the curves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from LightningDiT.tools.report import put_between_marks, table
from studies.convergence.arms import ALIGNED, ARMS, PLAIN, Plan, run_name, start_name
from studies.pages import kept_parts, plot, write_json

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
    ("psnr_mean", "PSNR (dB)", "{:.1f}"),
    ("frechet_distance", "Fréchet distance of reconstructions", "{:.3f}"),
    ("uniformity", "uniformity of latents", "{:.2f}"),
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
        """Return the number of images after which the figure first falls to `level`; None if it never does.

        The logarithm of the figure is interpolated between two checkpoints. If the first checkpoint is below `level`
        already, its number of images is returned, which is an upper bound.
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
            found = kept_parts(plan.folder / f"{run_name(arm, seed)}.json")
            found |= kept_parts(plan.folder / f"{start_name(arm, seed)}.json") if arm.quick else {}
            steps = sorted(int(key) for key in found if key.isdigit())
            values = tuple(found[str(step)][figure] for step in steps)
            curves[arm.name, seed] = Curve(tuple(plan.images(step) for step in steps), values)
    return curves


def images_saved(goal: Curve, curve: Curve) -> str:
    """Return by what factor `curve` needs fewer images to reach the end of `goal`, as text."""
    images = curve.reached(goal.final)
    if images is None:
        return "not reached"
    ratio = f"{goal.images[-1] / images:.1f}"
    return f"{ratio} or more" if images == curve.images[0] else ratio


def arms_table(plan: Plan, figure: str) -> list[str]:
    """Return the Markdown table of one distance: at the end, and the images saved against each baseline."""
    curves, (title, written) = read_curves(plan, figure), DISTANCES[figure]
    rows = []
    for arm in ARMS:
        own = [curves[arm.name, seed] for seed in plan.seeds]
        cells = [arm.title, _joined(written.format(curve.final) for curve in own)]
        for base in BASELINES:
            saved = (images_saved(curves[base.name, seed], curves[arm.name, seed]) for seed in plan.seeds)
            cells.append("" if arm is base else _joined(saved))
        rows.append(cells)
    real = kept_parts(plan.folder / f"{run_name(ARMS[0], plan.seeds[0])}.json")["real"]
    rows.append([f"{plan.count} real training photographs", written.format(real[figure]), *("" for _ in BASELINES)])
    return table(("arm", title, *(f"images saved to the end of “{base.title}”" for base in BASELINES)), rows)


def accuracy_line(plan: Plan) -> str:
    """Return a sentence with the shares of images that the judge sees as the class asked for, at the end."""
    curves = read_curves(plan, "accuracy")
    finals = {arm.title: _joined(f"{curves[arm.name, seed].final:.1%}" for seed in plan.seeds) for arm in ARMS}
    return f"Seen as asked, at the end: {'; '.join(f'{title} {shares}' for title, shares in finals.items())}."


def _joined(texts: Iterable[str]) -> str:
    """Return the texts of all seeds, or the one that they share."""
    found = list(texts)
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def tokenizers_table(plan: Plan) -> list[str]:
    """Return the Markdown table of both tokenizers."""
    rows = []
    for name in (PLAIN, ALIGNED):
        report = kept_parts(plan.folder / f"evaluation-{name}" / "evaluation.json")
        report |= report["latents"]
        rows.append([name, *(written.format(report[key]) for key, _, written in TOKENIZER_FIGURES)])
    return table(("tokenizer", *(title for _, title, _ in TOKENIZER_FIGURES)), rows)


def write_page(plan: Plan, page: Path) -> Path:
    """Put the tables between the marks of `page`, write the curves beside it, and return the path of their picture."""
    lines = [
        f"**{plan.images(plan.steps):,} images a training, {plan.count} images of each checkpoint, seeds"
        f" {' / '.join(map(str, plan.seeds))}:**",
        "",
    ]
    for figure in DISTANCES:
        lines += arms_table(plan, figure)
    put_between_marks(page, [*lines, accuracy_line(plan), "", *tokenizers_table(plan)], "Training", MARK)
    curves = page.parent / CURVES
    draw(plan, curves)
    write_json(curves.with_suffix(".json"), points(plan))
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
    with plot(path, 1, len(DISTANCES), (5.5, 4.6)) as figure:
        for axes, (name, (title, _)) in zip(figure.axes, DISTANCES.items(), strict=True):
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
