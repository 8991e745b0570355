"""The judge: an independent classifier of Fashion-MNIST, which says what generated images show.

`studies/judge.py` trains it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from LightningDiT.checkpoint import load_into, load_weights
from LightningDiT.data.images import FASHION_MNIST_CLASSES
from LightningDiT.errors import LightningDiTError

BORDER = 2  # black pixels that pad_to_32 puts around a photograph
FEATURES = 96
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


def load_judge(path: str | Path) -> Judge:
    """Return the judge in `path` in eval mode and float32.

    Raises:
        LightningDiTError: the file is missing, damaged or holds something else.
    """
    if not Path(path).exists():
        raise LightningDiTError(f"judge {path} does not exist", f"python -m studies.judge --output {path}")
    judge = Judge()
    load_into(judge, load_weights(path), path)
    return judge.float().eval()
