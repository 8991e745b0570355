"""The judge: a classifier of Fashion-MNIST, trained on real images alone, that judges generated ones.

`studies/train_judge.py` trains it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from LightningDiT.checkpoint import load_into, load_weights
from LightningDiT.data.fashion_mnist import BORDER, FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError

FEATURES = 96
CHUNK = 500  # images classified at once


class ConvBlock(nn.Module):
    """3x3 convolution, batch normalisation and ReLU; `fold` merges the first two after training."""

    def __init__(self, in_channels: int, out_channels: int, folded: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=folded)
        self.norm = nn.Identity() if folded else nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))  # (N, out, H, W)

    def fold(self) -> None:
        """Merge the normalisation into the convolution's weight and bias (evaluation mode only)."""
        self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()


class Judge(nn.Module):
    """Classifier of 32x32 photographs of garments with 0.14 M parameters.

    Args:
        folded: without batch normalisation, as in the weights file.
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
            raise ValueError(f"images are {tuple(images.shape)}; the judge expects (N, 3, 32, 32)")
        grey = images.mean(1, keepdim=True)  # (N, 1, 32, 32)
        maps = self.blocks(grey[..., BORDER:-BORDER, BORDER:-BORDER])  # (N, 64, 3, 3)
        return F.relu(self.hidden(self.dropout(maps.flatten(1))))  # (N, 96)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for images (N, 3, 32, 32) in [-1, 1]."""
        return self.output(self.features(images))

    def fold(self) -> Judge:
        """Merge normalisation and convolutions for good, and return the judge in evaluation mode."""
        self.eval()
        for block in self.blocks:
            if isinstance(block, ConvBlock):
                block.fold()
        return self


@torch.no_grad()
def judge_images(judge: Judge, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the judge's features (N, 96) and predicted classes (N,) for images (N, 3, 32, 32) in [-1, 1]."""
    features = torch.cat([judge.features(batch) for batch in images.split(CHUNK)])
    return features, judge.output(features).argmax(1)


def load_judge(path: str | Path) -> Judge:
    """Return the judge in `path`, in evaluation mode and float32.

    Raises:
        LightningDiTError: the file is missing, damaged, or of another kind.
    """
    if not Path(path).exists():
        raise LightningDiTError(f"judge {path} does not exist", f"python -m studies.train_judge --output {path}")
    judge = Judge()
    load_into(judge, load_weights(path), path)
    return judge.float().eval()
