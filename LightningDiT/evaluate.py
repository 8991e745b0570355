"""Evaluate generated images: `python -m LightningDiT.evaluate --samples A --reference B`.

A is a folder of images or an .npz file in ADM's layout; B is that too, or statistics of a reference set. Writes
metrics.json, metrics.png and `features`, a cache from which a stopped evaluation continues. docs/metrics.md explains
the scores and their limits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import natural, positive, program, run_main, seed_number
from LightningDiT.metrics.options import FEATURES, add_evaluation_options
from LightningDiT.reference.option import add_help_config

SOURCES = "folder of images, .npz file of ADM, or FOLDER:train / FOLDER:test of Fashion-MNIST"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("evaluate"), description=__doc__)
    add_help_config(parser)
    parser.add_argument("--samples", required=True, metavar="A", help=f"generated images: {SOURCES}")
    parser.add_argument("--reference", metavar="B", help=f"real images: {SOURCES}; or .npz file with mu and sigma")
    parser.add_argument("--features", default="inception", help=f"{FEATURES}; default: %(default)s")
    parser.add_argument("--size", type=positive, help="reduce and crop every image to SIZE x SIZE pixels, as ADM does")
    parser.add_argument("--training", metavar="SET", help=f"training images among which to search copies: {SOURCES}")
    parser.add_argument("--resamples", type=natural, default=100, help="of the bootstrap; default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the bootstrap")
    parser.add_argument("--npz", metavar="FILE", help="also write the samples for ADM's own evaluator")
    add_evaluation_options(parser, "output/evaluation")
    args = parser.parse_args(argv)
    if not args.reference and not args.npz:
        parser.error("--reference is missing; only --npz works without it")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    from LightningDiT.metrics.evaluation import EvaluationSettings, check_results, evaluate, write_for_adm
    from LightningDiT.metrics.sources import open_images

    given = vars(args)
    npz, output = given.pop("npz"), Path(given.pop("output"))
    if args.reference:
        check_results(output)
    if npz:
        write_for_adm(open_images(args.samples, args.size), Path(npz))
    if not args.reference:
        return 0
    evaluation = evaluate(EvaluationSettings(**given, output=output))
    print("\n".join(evaluation.lines()), flush=True)
    for line in evaluation.report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    print(evaluation.save(output))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
