"""Train the judge: `python -m studies.judge --data-root FOLDER --output judge.safetensors`.

The judge is an independent classifier of Fashion-MNIST. It learns from the 60,000 real training photographs
alone, has never seen a reconstruction or a generated image, and says what they show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.checkpoint import inspect, save_weights
from LightningDiT.console import run_main
from LightningDiT.data.images import fashion_mnist, pad_to_32
from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.judge import Judge, judge_images
from studies.classifiers import Recipe, train_classifier

LEAST_ACCURACY = 0.91  # a weaker judge is not worth keeping
RECIPE = Recipe(peak_rate=3e-3, weight_decay=0.02)


def train_judge(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Judge:
    """Return a folded judge trained on images (N, 28, 28) uint8 with labels (N,); one line an epoch."""
    torch.manual_seed(seed)  # initial weights and dropout
    return train_classifier(Judge(folded=False), images, labels, RECIPE, epochs, seed).fold()


def save_judge(judge: Judge, path: str | Path, metadata: dict[str, object]) -> None:
    """Write a folded judge in half precision with `metadata`, atomically."""
    weights = {name: value.half() for name, value in judge.state_dict().items()}
    save_weights(weights, path, {name: json.dumps(value) for name, value in metadata.items()})


def judge_metadata(path: str | Path) -> dict[str, object]:
    """Return how the judge in `path` was made: test accuracy, seed, epochs."""
    return {name: json.loads(value) for name, value in inspect(path).metadata.items()}


def half_precision(judge: Judge) -> Judge:
    """Round the weights of `judge` to half precision, as a file gives them back, and return it."""
    return judge.half().float()


def accuracy_on_test_images(judge: Judge, root: str | Path) -> float:
    """Return the share of the 10,000 real test images that the judge knows."""
    images, labels = fashion_mnist(root, train=False)
    return float((judge_images(judge, pad_to_32(images))[1] == labels).double().mean())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.judge", description=__doc__)
    parser.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    images, labels = fashion_mnist(args.data_root, train=True)
    judge = half_precision(train_judge(images, labels, args.epochs, args.seed))
    accuracy = accuracy_on_test_images(judge, args.data_root)
    print(f"the judge knows {accuracy:.2%} of the real test images")
    if accuracy < LEAST_ACCURACY:
        raise LightningDiTError(
            f"{accuracy:.2%} of the test images is too few for a judge ({LEAST_ACCURACY:.0%} is expected);"
            f" {args.output} is left as it was",
            f"give --epochs more than {args.epochs}",
        )
    metadata = {"test_accuracy": accuracy, "seed": args.seed, "epochs": args.epochs}
    save_judge(judge, args.output, metadata)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
