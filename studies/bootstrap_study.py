"""Hold the bootstrap against the truth: `python -m studies.bootstrap_study --data-root FOLDER`.

Sets of real training images of Fashion-MNIST, drawn again and again, have a true mean and a true spread of their
Frechet distance to the test images; the bootstrap has to tell both from one set alone. Prints docs/metrics.md's table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from LightningDiT.console import Progress, run_main
from LightningDiT.metrics.cache import views_of
from LightningDiT.metrics.extractors import make_extractor
from LightningDiT.metrics.formulas import FrechetDistance, moments
from LightningDiT.metrics.scores import LEVEL, Score, bootstrap_score, distance_of
from LightningDiT.metrics.sources import open_images
from LightningDiT.sampling.options import natural, positive
from LightningDiT.seeds import generator_for

BATCH_SIZE = 50
COLUMNS = ("images", "mean distance", "true bias", "bootstrap's bias", "true spread", "interval's width", "it holds")


def row_of(count: int, scores: Sequence[Score], limit: float) -> str:
    """Return a row of the table: what sets of `count` images show, and what the bootstrap says of each.

    Args:
        limit: the distance of all images, whose own bias is small.
    """
    values = np.array([score.value for score in scores])
    ends = np.array([(score.low, score.high) for score in scores])
    held = ((ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])).mean()
    spread = np.subtract(*np.quantile(values, [(1 + LEVEL) / 2, (1 - LEVEL) / 2]))
    figures = [values.mean(), values.mean() - limit, np.mean([score.bias for score in scores]), spread]
    cells = [f"{figure:.3g}" for figure in [*figures, np.subtract(ends[:, 1], ends[:, 0]).mean()]]
    return f"| {count} | {' | '.join(cells)} | {held:.0%} |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.bootstrap_study", description=__doc__)
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--features", default="judge", help="inception, judge, timm:NAME or timm:NAME@FILE")
    parser.add_argument("--counts", type=positive, nargs="+", default=[200, 500, 2000], help="images in a set")
    parser.add_argument("--sets", type=positive, default=60, help="sets of each count")
    parser.add_argument("--resamples", type=positive, default=40, help="of each set")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--output", default="output/evaluation", help="folder whose `features` keeps what is seen")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    extractor, folder = make_extractor(args.features), Path(args.output) / "features"
    sides = {"training": open_images(f"{args.data_root}:train"), "reference": open_images(f"{args.data_root}:test")}
    known, real = (views_of(side, extractor, folder, title, BATCH_SIZE)["features"] for title, side in sides.items())
    distance = FrechetDistance(*moments(real))
    limit = distance(*moments(known))
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    progress = Progress(len(args.counts) * args.sets, "set")
    for count in args.counts:
        scores = []
        for number in range(args.sets):
            drawn = torch.randperm(len(known), generator=generator_for(args.seed, count, number))[:count]
            score = distance_of(known[drawn].double(), distance)
            again = [
                torch.randint(count, (count,), generator=generator_for(args.seed, count, number, place))
                for place in range(args.resamples)
            ]
            scores.append(bootstrap_score(score(torch.arange(count)), [score(indices) for indices in again]))
            progress.update()
        lines.append(row_of(count, scores, limit))
    progress.close()
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
