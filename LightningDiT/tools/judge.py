"""Train the judge: `python -m LightningDiT.tools.judge --data-root FOLDER --output judge.safetensors`.

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
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from LightningDiT.checkpoint import inspect, load_into, load_weights, save_weights
from LightningDiT.console import run_main
from LightningDiT.data.images import FASHION_MNIST_CLASSES, fashion_mnist, pad_to_32
from LightningDiT.errors import LightningDiTError
from LightningDiT.tools.classifiers import Recipe, train_classifier

BORDER = 2  # black pixels that pad_to_32 puts around a photograph
FEATURES = 96
LEAST_ACCURACY = 0.91  # a weaker judge is not worth keeping
RECIPE = Recipe(peak_rate=3e-3, weight_decay=0.02)
EVALUATION_BATCH = 500


class ConvBlock(nn.Module):
    """3x3 convolution, batch normalisation and ReLU; `fold` joins the first two after training."""

    def __init__(self, in_channels: int, out_channels: int, folded: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=folded)
        self.norm = nn.Identity() if folded else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))  # (N, out, H, W)

    def fold(self) -> None:
        """Move the normalisation into the convolution's weight and bias (eval mode only)."""
        self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Judge(nn.Module):
    """Classifier of 32x32 photographs of garments, 0.14 M parameters.

    Args:
        folded: without batch normalisation, as the weights are saved.
    """

    def __init__(self, folded: bool = True) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            ConvBlock(1, 24, folded),
            nn.MaxPool2d(2),
            ConvBlock(24, 40, folded),
            ConvBlock(40, 40, folded),
            nn.MaxPool2d(2),
            ConvBlock(40, 64, folded),
            ConvBlock(64, 64, folded),
            nn.MaxPool2d(2),
        )
        self.hidden = nn.Linear(64 * 3 * 3, FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(FEATURES, len(FASHION_MNIST_CLASSES))

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate layer (N, 96) for images (N, 3, 32, 32) in [-1, 1]."""
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"the judge got images {tuple(images.shape)}; (N, 3, 32, 32) is expected")
        grey = images.mean(1, keepdim=True)  # (N, 1, 32, 32)
        maps = self.blocks(grey[..., BORDER:-BORDER, BORDER:-BORDER])  # (N, 64, 3, 3)
        return F.relu(self.hidden(self.dropout(maps.flatten(1))))  # (N, 96)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for images (N, 3, 32, 32) in [-1, 1]."""
        return self.output(self.features(images))

    def fold(self) -> Judge:
        """Join normalisation and convolutions for good; returns the judge in eval mode."""
        self.eval()
        for block in self.blocks:
            if isinstance(block, ConvBlock):
                block.fold()
        return self


@torch.no_grad()
def judge_images(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (N, 96) and classes (N,) that the judge sees in images (N, 3, 32, 32)."""
    features = torch.cat([judge.features(batch) for batch in images.split(EVALUATION_BATCH)])
    return features, judge.output(features).argmax(1)


def train_judge(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Judge:
    """Return a folded judge trained on images (N, 28, 28) uint8 with labels (N,); one line an epoch."""
    torch.manual_seed(seed)  # initial weights and dropout
    return train_classifier(Judge(folded=False), images, labels, RECIPE, epochs, seed).fold()


def save_judge(judge: Judge, path: str | Path, metadata: dict[str, object]) -> None:
    """Write a folded judge in half precision with `metadata`, atomically."""
    weights = {name: value.half() for name, value in judge.state_dict().items()}
    save_weights(weights, path, {name: json.dumps(value) for name, value in metadata.items()})


def load_judge(path: str | Path) -> Judge:
    """Return the judge in `path` in eval mode and float32.

    Raises:
        LightningDiTError: the file is missing, damaged or holds something else.
    """
    if not Path(path).exists():
        raise LightningDiTError(f"judge {path} does not exist", f"python -m LightningDiT.tools.judge --output {path}")
    judge = Judge()
    load_into(judge, load_weights(path), path)
    return judge.float().eval()


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
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.judge", description=__doc__)
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
