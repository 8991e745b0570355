"""Train a vision model on Fashion-MNIST: `python -m studies.train_vision_model --output vision.safetensors`.

Use it where DINOv2 cannot be downloaded or has never seen such images: a small model from timm learns the classes of
the 60,000 training photographs. A tokenizer names the file by `train.vision_weights` and the model by
`train.vision_model`. It is trained on what the alignment will show it: images scaled to `--size` pixels, normalised as
timm says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from LightningDiT.checkpoint import save_weights
from LightningDiT.console import positive, run_main
from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES, fashion_mnist
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.vision import normalised, resized
from studies.classifiers import Recipe, accuracy_on_test_images, add_training_options, train_classifier

RECIPE = Recipe(peak_rate=2e-3, weight_decay=0.05)


class VisionClassifier(nn.Module):
    """A timm model with a classifier, as a function of images in [-1, 1].

    Args:
        model: from `timm.create_model`.
        side: pixels a side that it sees.
    """

    def __init__(self, model: Any, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side
        data = resolve_model_data_config(model)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(data[name])[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W) in [-1, 1]."""
        return self.model(normalised(resized(images, self.side), self.mean, self.std))


def create_classifier(name: str, side: int) -> VisionClassifier:
    """Return timm's model `name` with random weights for the classes of Fashion-MNIST.

    Raises:
        LightningDiTError: timm has no such model, or not for images of `side` pixels.
    """
    if not timm.is_model(name):
        raise LightningDiTError(
            f"timm {timm.__version__} knows no model {name!r}", "give --model a name of timm.list_models()"
        )
    options = {"num_classes": len(FASHION_MNIST_CLASSES)}
    try:
        model = timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:  # a convolutional network takes any size as it is, and does not know the option
        model = timm.create_model(name, **options)
    classifier = VisionClassifier(model, side).eval()
    try:
        with torch.no_grad():
            classifier(torch.zeros(1, 3, side, side))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise LightningDiTError(
            f"timm's {name} does not take {side} pixels ({error})", "give another --size"
        ) from error
    return classifier


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.train_vision_model", description=__doc__)
    parser.add_argument("--model", default="mobilenetv3_small_050", help="of timm; default: %(default)s")
    parser.add_argument("--size", type=positive, default=128, help="pixels a side that it sees; default: %(default)s")
    add_training_options(parser, epochs=4)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    torch.manual_seed(args.seed)  # initial weights and dropout
    classifier = create_classifier(args.model, args.size)
    images, labels = fashion_mnist(args.data_root, train=True)
    train_classifier(classifier, images, labels, RECIPE, args.epochs, args.seed)
    share = accuracy_on_test_images(classifier, args.data_root)
    metadata = {"model": args.model, "size": str(args.size), "epochs": str(args.epochs), "test_accuracy": str(share)}
    save_weights(classifier.model.state_dict(), args.output, metadata)
    print(f"the model knows {share:.2%} of the test photographs; wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
