"""Evaluate the checkpoints of one training: `python -m studies.convergence.evaluate_checkpoints --help`.

Images are made without guidance from the averaged weights of every kept checkpoint, of the same noises, and compared
with the 10,000 real test photographs: by the Frechet distance in the judge's features, by that in the 49 means of 4x4
pixels, which knows nothing of classes, and by how many the judge sees as the class that was asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.training.run_dir import RunDir, step_of
from studies.judged import (
    ImageSet,
    distance_and_accuracy,
    generated,
    judge_of,
    photographs,
    real_images,
    some_of_each_class,
)
from studies.pages import CLASSES, add_data_option, equal_numbers, keep_part, kept_parts, write_json

MODEL = Path(__file__).parents[2] / "models" / "fashion-mnist"
SEED = 0  # of the noises
MEANS_SIDE = 4  # pixels


def pixel_means(images: ImageSet) -> Tensor:
    """Return the means (N, 49) of the 4x4 squares of the photographs."""
    return F.avg_pool2d(photographs(images).unsqueeze(1), MEANS_SIDE).flatten(1)


def figures_of(made: ImageSet, real: ImageSet) -> dict[str, float]:
    """Return both Frechet distances between images, and the judge's accuracy on the first."""
    return {
        **distance_and_accuracy(made, real),
        "frechet_pixels": frechet_distance(pixel_means(made), pixel_means(real)),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.convergence.evaluate_checkpoints", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the training")
    parser.add_argument("--run", required=True, help="its folder")
    add_data_option(parser)
    parser.add_argument("--count", type=equal_numbers, default=2000, help="images of each; default: %(default)s")
    parser.add_argument("--output", required=True, help="JSON file to write, once every checkpoint is evaluated")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; figures that the run's folder holds already are not computed again."""
    args = parse(argv)
    run = Path(args.run)
    checkpoints = [path for path in RunDir(run).checkpoints() if step_of(path)]
    if not checkpoints:
        raise LightningDiTError(
            f"{run} holds no checkpoint after a step",
            f"python -m LightningDiT.train --config {args.config} --output {run}",
        )
    config, judge, parts = load_config(args.config), judge_of(MODEL), run / f"evaluated-{args.count}.json"
    test = real_images(judge, args.data_root, train=False)
    known = kept_parts(parts)
    for path in checkpoints:
        if str(step_of(path)) not in known:
            print(f"{path}", flush=True)
            pipe = LightningDiTPipeline.from_config(replace(config, ckpt_path=str(path)))
            figures = figures_of(generated(pipe, judge, args.count, SEED), test)
            known = keep_part(parts, str(step_of(path)), figures)
    train = real_images(judge, args.data_root, train=True)  # what the best generator reaches
    known["real"] = figures_of(some_of_each_class(train, args.count // CLASSES, SEED), test)
    write_json(Path(args.output), known)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
