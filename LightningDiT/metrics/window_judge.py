"""Classifiers of radar windows, each trained in seconds on the windows that it is given: who walks here?

They serve to choose weights, guidance and tokenizers. The classifier of a final verdict is another one, since a judge
that has selected does not report.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.radar.pictures import SHOWN
from LightningDiT.radar.separability import COLUMNS, ROWS, features, predictions
from LightningDiT.seeds import generator_for

STEPS, BATCH = 300, 32
SIDES = (64, 32)  # rows and columns that a judge sees at most; larger windows are averaged down to it
RATE, WEIGHT_DECAY, SMOOTHING = 3e-3, 0.05, 0.1
GAIN, NOISE = 0.1, 0.05  # standard deviations of an augmented window's offset and of its pixels, in levels of [-1, 1]
WIDTHS = (16, 32, 64)  # channels of the stem and of the two residual blocks
GROUPS = 8
BANDS = 8  # of Doppler, in which the last maps are averaged; all time is averaged
CHUNK = 250  # windows classified at once
AUGMENTATION_STREAM = 7  # a second seed, beside that of the initial weights


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions that halve the size, and a shortcut (He et al., arXiv 1512.03385) with group norms."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, out_channels) for _ in range(2))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))  # (N, out, H/2, W/2)
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))  # (N, out, H/2, W/2)


class WindowJudge(nn.Module):
    """Residual network with 73,000 weights and 512 a class, for windows of any size.

    The mean over time makes it blind to when a step begins; Doppler is kept in bands.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTHS[0], 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(*pair) for pair in itertools.pairwise(WIDTHS)))
        self.output = nn.Linear(WIDTHS[-1] * BANDS, classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the penultimate layer (N, 512) for pixels (N, 1, H, W) in [-1, 1]."""
        seen = F.adaptive_avg_pool2d(pixels, [min(pair) for pair in zip(pixels.shape[2:], SIDES, strict=True)])
        maps = self.blocks(F.relu(self.stem(seen)))  # (N, 64, H/8, W/8)
        return F.adaptive_avg_pool2d(maps, (BANDS, 1)).flatten(1)  # (N, 64 BANDS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, classes) for pixels (N, 1, H, W) in [-1, 1]."""
        return self.output(F.dropout(self.features(pixels), 0.2, self.training))


def train_judge(pixels: Tensor, labels: Tensor, classes: int, steps: int = STEPS, seed: int = 0) -> WindowJudge:
    """Return a judge trained on windows, in evaluation mode on their device; the same for the same seed.

    Each window of a batch is shifted in time at random (circularly), and its gain and noise vary.

    Args:
        pixels: (N, 1, H, W) in [-1, 1].
        labels: (N,) whole numbers from 0.
        classes: number of classes; those without a window are never named.
        steps: of AdamW, with `BATCH` windows each.
    """
    with torch.random.fork_rng(devices=[]):  # a run's own generators go on as if no judge were trained
        torch.manual_seed(seed)
        judge = WindowJudge(classes).to(pixels.device)
        generator = generator_for(seed, AUGMENTATION_STREAM)
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(2, steps))
        with torch.enable_grad():
            for _ in range(steps):
                rows = torch.randint(len(pixels), (min(BATCH, len(pixels)),), generator=generator)
                logits = judge(augmented(pixels[rows], generator))
                loss = F.cross_entropy(logits, labels[rows].to(pixels.device), label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return judge.eval().requires_grad_(False)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return windows (N, 1, H, W), each shifted in time at random, with another gain and with noise."""
    count, width = len(pixels), pixels.shape[-1]
    shifts = torch.randint(width, (count, 1), generator=generator)
    columns = (torch.arange(width) + shifts) % width  # (N, W)
    shifted = pixels.gather(3, columns.to(pixels.device)[:, None, None].expand_as(pixels))
    gain = GAIN * torch.randn(count, 1, 1, 1, generator=generator)
    noise = NOISE * torch.randn(pixels.shape, generator=generator)
    return shifted + (gain + noise).to(pixels.device)


@torch.no_grad()
def predicted(judge: nn.Module, pixels: Tensor) -> Tensor:
    """Return the class (N,) that a judge sees in each of the windows (N, 1, H, W), on the CPU."""
    device = next(judge.parameters()).device
    return torch.cat([judge(part.to(device)).argmax(1).cpu() for part in pixels.split(CHUNK)])


def share_right(judge: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of windows (N, 1, H, W) in which a judge sees the class of `labels` (N,)."""
    return float((predicted(judge, pixels) == labels.cpu()).double().mean())


def quick_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the share of test windows that `quick_predictions` labels rightly.

    Args:
        test_labels: (M,) whole numbers from 0.
    """
    return float((quick_predictions(train, train_labels, test) == test_labels.cpu()).double().mean())


def quick_predictions(train: Tensor, train_labels: Tensor, test: Tensor) -> Tensor:
    """Return the classes (M,) that a logistic regression of pooled windows sees in test windows; it takes seconds.

    The classifier is that of `radar.separability`.

    Args:
        train, test: (N, 1, H, W) and (M, 1, H, W) in [-1, 1].
        train_labels: (N,) whole numbers from 0.
    """
    return torch.from_numpy(predictions(_pooled(train), train_labels.cpu().numpy(), _pooled(test)))


def _pooled(pixels: Tensor) -> NDArray[np.float64]:
    """Return the features (N, F) of windows (N, 1, H, W)."""
    height, width = pixels.shape[2:]
    if height < ROWS or width < COLUMNS:  # each block of the pool needs a pixel
        pixels = F.interpolate(pixels, (max(height, ROWS), max(width, COLUMNS)), mode="nearest")
    return features(((pixels[:, 0].float() + 1) * (SHOWN / 2)).cpu().numpy())
