"""Judge the checkpoints of one training: `python -m studies.convergence.judging --help`.

Images are made without guidance from the averaged weights of every kept checkpoint, of the same noises, and compared
with the 10,000 real test photographs: by the Frechet distance in the judge's features, by that in the 49 means of 4x4
pixels, which knows nothing of classes, and by how many the judge sees as the class that was asked for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from LightningDiT.config import load_config
from LightningDiT.console import run_main
from LightningDiT.data.images import FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.judge import Judge, load_judge
from LightningDiT.sampling.options import positive
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tools.report import keep_part, kept_parts
from LightningDiT.training import RunFolder
from LightningDiT.training.run_dir import step_of
from studies.evaluate_bundled import (
    JUDGE_NAME,
    ImageSet,
    generated,
    photographs,
    real_images,
    recognised,
    some_of_each_class,
)

JUDGE = Path(__file__).parents[2] / "models" / "fashion-mnist" / JUDGE_NAME
CLASSES = len(FASHION_MNIST_CLASSES)
SEED = 0  # of the noises
MEANS_SIDE = 4  # pixels

Figures = dict[str, float]


def pixel_means(images: ImageSet) -> Tensor:
    """Return the means (N, 49) of the 4x4 squares of the photographs."""
    return F.avg_pool2d(photographs(images).unsqueeze(1), MEANS_SIDE).flatten(1)


def distances(made: ImageSet, real: ImageSet) -> Figures:
    """Return both Frechet distances between images, and the judge's accuracy on the first."""
    return {
        "frechet": frechet_distance(made.features, real.features),
        "frechet_pixels": frechet_distance(pixel_means(made), pixel_means(real)),
        "accuracy": recognised(made)["accuracy"],
    }


def judge_checkpoint(path: Path, config_path: str, count: int, judge: Judge, real: ImageSet) -> Figures:
    """Return the figures of `count` images by the averaged weights in a checkpoint."""
    config = replace(load_config(config_path), ckpt_path=str(path))
    pipeline = LightningDiTPipeline.from_config(config)
    options = argparse.Namespace(count=count, seed=SEED, guidance_scale=None, steps=None)
    return distances(generated(pipeline, judge, options)[0], real)


def real_figures(judge: Judge, root: str, count: int, test: ImageSet) -> Figures:
    """Return the figures of `count` real training photographs: what the best generator reaches."""
    train = real_images(judge, root, train=True)
    return distances(some_of_each_class(train, count // CLASSES, SEED), test)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.convergence.judging", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the training")
    parser.add_argument("--run", required=True, help="its folder")
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--count", type=positive, default=2000, help="images of a checkpoint; default: %(default)s")
    parser.add_argument("--output", required=True, help="JSON file to write, once every checkpoint is judged")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; what was judged before is in the run's folder and is not judged again."""
    args = parse(argv)
    run = Path(args.run)
    checkpoints = [path for path in RunFolder(run).checkpoints() if step_of(path)]
    if not checkpoints:
        raise LightningDiTError(
            f"{run} holds no checkpoint after a step",
            f"python -m LightningDiT.train --config {args.config} --output {run}",
        )
    judge, parts = load_judge(JUDGE), run / f"judged-{args.count}.json"
    test = real_images(judge, args.data_root, train=False)
    known: dict[str, Any] = kept_parts(parts)
    for path in checkpoints:
        if str(step_of(path)) not in known:
            print(f"{path}", flush=True)
            figures = judge_checkpoint(path, args.config, args.count, judge, test)
            known = keep_part(parts, str(step_of(path)), figures)
    known["real"] = real_figures(judge, args.data_root, args.count, test)
    with atomic_path(Path(args.output)) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
