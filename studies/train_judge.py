"""Train the judge: `python -m studies.train_judge --data-root FOLDER --output judge.safetensors`.

The judge is an independent classifier of Fashion-MNIST. It learns from the 60,000 real training photographs
alone and has never seen a reconstruction or a generated image.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.console import run_main
from LightningDiT.data.fashion_mnist import fashion_mnist
from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.judge import Judge
from studies.classifiers import Recipe, accuracy_on_test_images, add_training_options, train_classifier

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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.train_judge", description=__doc__)
    add_training_options(parser, epochs=14)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    judge = train_judge(*fashion_mnist(args.data_root, train=True), args.epochs, args.seed)
    accuracy = accuracy_on_test_images(judge.half().float(), args.data_root)  # rounded, as the file gives it back
    print(f"the judge knows {accuracy:.2%} of the real test images")
    if accuracy < LEAST_ACCURACY:
        raise LightningDiTError(
            f"{accuracy:.2%} of the test images is too few for a judge ({LEAST_ACCURACY:.0%} is expected);"
            f" {args.output} is left as it was",
            f"give --epochs more than {args.epochs}",
        )
    save_judge(judge, args.output, {"test_accuracy": accuracy, "seed": args.seed, "epochs": args.epochs})
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
