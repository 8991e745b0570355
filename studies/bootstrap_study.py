"""Compare the bootstrap with the truth: `python -m studies.bootstrap_study --data-root FOLDER`.

Many sets of real training images of Fashion-MNIST give the true mean and the true spread of their Frechet distance to
the test images; the bootstrap has to estimate both from one set alone. Prints the table of docs/metrics.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from LightningDiT.console import Progress, positive, run_main, seed_number
from LightningDiT.metrics.cache import cached_activations
from LightningDiT.metrics.extractors import make_extractor
from LightningDiT.metrics.formulas import FrechetDistance, moments
from LightningDiT.metrics.scores import LEVEL, Score, bootstrap_score, distance_of
from LightningDiT.metrics.sources import open_images
from LightningDiT.seeds import generator_for
from LightningDiT.tools.report import table
from studies.pages import add_data_option

BATCH_SIZE = 50
COLUMNS = ("images", "mean distance", "true bias", "bootstrap's bias", "true spread", "interval's width", "it holds")


def row_of(count: int, scores: Sequence[Score], limit: float) -> list[str]:
    """Return a row of the table: the truth from all sets of `count` images, and the bootstrap's mean estimates.

    Args:
        limit: the distance of all images, which has little bias.
    """
    values = np.array([score.value for score in scores])
    ends = np.array([(score.low, score.high) for score in scores])
    held = ((ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])).mean()
    spread = np.subtract(*np.quantile(values, [(1 + LEVEL) / 2, (1 - LEVEL) / 2]))
    figures = [values.mean(), values.mean() - limit, np.mean([score.bias for score in scores]), spread]
    widths = np.subtract(ends[:, 1], ends[:, 0])
    return [str(count), *(f"{figure:.3g}" for figure in [*figures, widths.mean()]), f"{held:.0%}"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.bootstrap_study", description=__doc__)
    add_data_option(parser)
    parser.add_argument("--features", default="judge", help="inception, judge, timm:NAME or timm:NAME@FILE")
    parser.add_argument("--counts", type=positive, nargs="+", default=[200, 500, 2000], help="images in a set")
    parser.add_argument("--sets", type=positive, default=60, help="sets of each count")
    parser.add_argument("--resamples", type=positive, default=40, help="of each set")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--output", default="output/evaluation", help="its folder `features` keeps the features")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    extractor, folder = make_extractor(args.features), Path(args.output) / "features"
    sides = {"training": open_images(f"{args.data_root}:train"), "reference": open_images(f"{args.data_root}:test")}
    known, real = (
        cached_activations(side, extractor, folder, title, BATCH_SIZE)["features"] for title, side in sides.items()
    )
    distance = FrechetDistance(*moments(real))
    limit = distance(*moments(known))
    rows = []
    progress = Progress(len(args.counts) * args.sets, "set")
    for count in args.counts:
        scores = []
        for number in range(args.sets):
            drawn = torch.randperm(len(known), generator=generator_for(args.seed, count, number))[:count]
            score = distance_of(known[drawn].double(), distance)
            again = [
                torch.randint(count, (count,), generator=generator_for(args.seed, count, number, resample))
                for resample in range(args.resamples)
            ]
            scores.append(bootstrap_score(score(torch.arange(count)), [score(indices) for indices in again]))
            progress.update()
        rows.append(row_of(count, scores, limit))
    progress.close()
    print("\n".join(table(COLUMNS, rows)[:-1]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
