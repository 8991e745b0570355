"""How often the intervals of a verdict hold the truth, for passes and trainings of known variance.

The command prints the table that docs/radar.md sums up. A value of a pass in a training is the sum of three normal
numbers: of the pass, of the training, and of both. Their true mean is 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from LightningDiT.console import OK, positive, run_main
from LightningDiT.tools.report import table
from LightningDiT.verdict.intervals import PassBootstrap

Floats = NDArray[np.float64]
#: Tested passes of each person.
LAYOUTS = ((2,) * 10, (2,) * 4 + (1,) * 6, (2,) * 31)
#: Name, and shares of the variance of a mean that come from passes, from trainings, and from each pass of a training.
PARTS = (
    ("passes", (1.0, 0.0, 0.0)),
    ("each pass of a training", (0.0, 0.0, 1.0)),
    ("trainings", (0.0, 1.0, 0.0)),
    ("passes and trainings", (0.5, 0.5, 0.0)),
    ("all three", (0.4, 0.2, 0.4)),
)
HEAD = ("people, passes", "variance of", "seeds", "intervals that hold 0", "over passes alone", "error said / true")


def drawn(rng: np.random.Generator, seeds: int, passes: int, deviations: Sequence[float]) -> Floats:
    """Return values (S, P) whose true mean is 0; deviations are those of passes, of trainings, and of both."""
    shapes = ((1, passes), (seeds, 1), (seeds, passes))
    parts = [one * rng.standard_normal(shape) for one, shape in zip(deviations, shapes, strict=True)]
    return np.asarray(sum(parts))


def row_of(
    counts: Sequence[int], named: tuple[str, Sequence[float]], seeds: int, tests: int, resamples: int = 2000
) -> list[str]:
    """Return a row of the table.

    Args:
        counts: tested passes of each person.
        named: of `PARTS`.
    """
    people, passes = np.repeat(np.arange(len(counts)), counts), sum(counts)
    name, shares = named
    deviations = np.sqrt(np.array(shares) * [passes, seeds, passes * seeds])  # the mean has the variance 1
    bootstrap, rng = PassBootstrap(people, np.arange(passes), resamples), np.random.default_rng(0)
    values = [drawn(rng, seeds, passes, deviations) for _ in range(tests)]
    both, alone = [bootstrap.interval(one) for one in values], [bootstrap.interval(one.mean(0)) for one in values]
    held = [np.mean([one.low <= 0 <= one.high for one in found]) for found in (both, alone)]
    error = np.sqrt(np.mean([one.standard_error**2 for one in both]))
    return [f"{len(counts)}, {passes}", name, str(seeds), *(f"{share:.1%}" for share in held), f"{error:.2f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m studies.interval_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tests", type=positive, default=1000, metavar="N", help="of each row; default: 1000")
    parser.add_argument("--seeds", type=positive, nargs="+", default=[3, 5], metavar="N", help="trainings; 3 and 5")
    options = parser.parse_args(argv)
    rows = [
        row_of(counts, named, seeds, options.tests) for counts in LAYOUTS for named in PARTS for seeds in options.seeds
    ]
    print("\n".join(table(HEAD, rows)[:-1]))
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
