"""The classifiers of the verdict, and one training of them: equal updates, the step chosen on validation windows."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError
from LightningDiT.seeds import generator_for

SMALL, RESNET = "small", "resnet18"
CLASSIFIERS = (SMALL, RESNET)
VERSION = 1  # of networks and training: a change of either makes trials that are kept obsolete
WIDTHS = (16, 32, 64, 128)  # channels of the stem and of the three residual blocks
STEM_SIZE = (32, 16)  # rows and columns of the stem's maps, whatever the window's size
STRIDES = ((2, 2), (2, 2), (1, 2))  # of the blocks, in Doppler and time
#: Of Doppler, over each of which time is averaged and maximised. With 4, and (2, 2) in the last block, the accuracy on
#: 6 simulated walkers was 70.5 % in place of 75.7 % (mean of two folds, 30 images a person, augmented).
BANDS = 8
RATE, WEIGHT_DECAY, SMOOTHING = 2e-3, 0.05, 0.1
CHUNK = 250  # windows classified at once
#: First numbers of the seeds, so that neither weights nor batches are those of a judge that selected.
WEIGHTS_STREAM, BATCH_STREAM, AUGMENTATION_STREAM = 6101, 6102, 6103
#: Classical augmentation: standard deviations of a window's gain and of its noise in levels of [-1, 1], and the largest
#: share by which velocities change. At 45 dB a gain of 0.2 is 4.5 dB.
GAIN, NOISE, DOPPLER = 0.2, 0.05, 0.05


class Block(nn.Module):
    """Residual block with normalisation first (He et al., arXiv 1603.05027), which makes maps smaller by its stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (in_channels, out_channels))
        self.first = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(F.relu(self.norms[0](x)))  # (N, out, h, w)
        inner = self.second(F.relu(self.norms[1](inner)))  # (N, out, h, w)
        return inner + self.shortcut(F.avg_pool2d(x, self.stride, ceil_mode=True))  # (N, out, h, w)


class SmallResidual(nn.Module):
    """Residual network with 0.3 M weights, and 2,049 a class, that reports.

    It is not the network that selects weights during training (`metrics.window_judge`): batch norm in place of group
    norm, normalisation before the convolutions, a block more, twice the width, mean and maximum over time, seeds of its
    own. Samples that were chosen because one judge likes them thus meet another one.

    Args:
        classes: number of people.
        size: (height, width) of the windows. The stem's stride follows from it, so that the cost does not.
    """

    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        stride = tuple(max(1, round(side / wanted)) for side, wanted in zip(size, STEM_SIZE, strict=True))
        kernel = tuple(2 * one + 1 for one in stride)
        self.stem = nn.Conv2d(1, WIDTHS[0], kernel, stride, stride, bias=False)
        pairs = zip(itertools.pairwise(WIDTHS), STRIDES, strict=True)
        self.blocks = nn.Sequential(*(Block(*widths, stride) for widths, stride in pairs))
        self.norm = nn.BatchNorm2d(WIDTHS[-1])
        self.output = nn.Linear(2 * BANDS * WIDTHS[-1], classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the penultimate layer (N, 2048) for pixels (N, 1, H, W) in [-1, 1]."""
        maps = F.relu(self.norm(self.blocks(self.stem(pixels))))  # (N, 128, 8, 2) or so
        pools = (F.adaptive_avg_pool2d(maps, (BANDS, 1)), F.adaptive_max_pool2d(maps, (BANDS, 1)))
        return torch.cat(pools, 1).flatten(1)  # (N, 2 * 128 * BANDS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (N, classes) for pixels (N, 1, H, W) in [-1, 1]."""
        return self.output(F.dropout(self.features(pixels), 0.3, self.training))


def make_classifier(name: str, classes: int, size: tuple[int, int]) -> nn.Module:
    """Return a classifier of `CLASSIFIERS` with random weights, from pixels (N, 1, H, W) to logits (N, classes).

    Raises:
        LightningDiTError: another name.
    """
    if name == SMALL:
        return SmallResidual(classes, size)
    if name != RESNET:
        raise LightningDiTError(f"classifier {name!r} is unknown; {' and '.join(CLASSIFIERS)} are there", SEE_NAMES)
    import timm

    return timm.create_model(RESNET, pretrained=False, in_chans=1, num_classes=classes)


SEE_NAMES = "choose one of these"


@dataclass(frozen=True)
class Recipe:
    """One training, the same for all rows that are compared.

    Attributes:
        classifier: of `CLASSIFIERS`.
        steps, batch: updates and windows in each.
        looks: how often the validation windows are classified; the weights of the best look are taken.
    """

    classifier: str = SMALL
    steps: int = 500
    batch: int = 64
    looks: int = 10


@dataclass(frozen=True)
class Trained:
    """A trained classifier in evaluation mode, the step of its weights, and its accuracy on validation windows."""

    model: nn.Module
    step: int
    valid_accuracy: float | None


def train_classifier(
    pixels: Tensor,
    labels: Tensor,
    valid: tuple[Tensor, Tensor],
    classes: int,
    recipe: Recipe,
    seed: int,
    augmented: bool,
) -> Trained:
    """Return a classifier after `recipe.steps` updates, with the weights of the best look at the validation windows.

    Of equal looks the last one counts. Without validation windows the last weights are taken.

    Args:
        pixels, labels: (N, 1, H, W) in [-1, 1] and (N,), drawn with replacement.
        valid: such pixels and labels.
        augmented: by `classically_augmented`.
    """
    device = best_device()
    with torch.random.fork_rng(devices=[]):  # dropout, too
        torch.manual_seed(int(generator_for(WEIGHTS_STREAM, seed).initial_seed()))
        model = make_classifier(recipe.classifier, classes, (pixels.shape[2], pixels.shape[3]))
        model = model.to(device, memory_format=torch.channels_last)  # a fourth faster on a CPU
        batches, changes = generator_for(BATCH_STREAM, seed), generator_for(AUGMENTATION_STREAM, seed)
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(2, recipe.steps))
        looks = {round(recipe.steps * (look + 1) / recipe.looks) for look in range(recipe.looks)} | {recipe.steps}
        best, kept = Trained(model, recipe.steps, None), None
        for step in range(1, recipe.steps + 1):
            rows = torch.randint(len(pixels), (recipe.batch,), generator=batches)
            batch = pixels[rows].to(device)
            batch = classically_augmented(batch, changes) if augmented else batch
            _update(model, optimizer, batch, labels[rows].to(device))
            schedule.step()
            if step in looks and len(valid[1]):
                share = float((predicted(model, valid[0]) == valid[1]).double().mean())
                if best.valid_accuracy is None or share >= best.valid_accuracy:
                    best, kept = Trained(model, step, share), copy.deepcopy(model.state_dict())
        if kept is not None:
            model.load_state_dict(kept)
    model.eval().requires_grad_(False)
    return best


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> None:
    with torch.enable_grad():
        loss = F.cross_entropy(model.train()(pixels), labels, label_smoothing=SMOOTHING)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def classically_augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return windows (N, 1, H, W), each shifted in time (circularly), its velocities scaled, with gain and noise.

    Never a mirror: a mirrored window is another walk.

    Args:
        generator: on the CPU; the noise of windows on a GPU is drawn there, from a seed that it gives.
    """
    device, (count, _, height, width) = pixels.device, pixels.shape
    shifts = torch.randint(width, (count, 1), generator=generator)
    scale = 1 + DOPPLER * (2 * torch.rand(count, 1, generator=generator) - 1)
    gain = GAIN * torch.randn(count, 1, 1, 1, generator=generator).to(device)
    columns = ((torch.arange(width) + shifts) % width).to(device)  # (N, W)
    shifted = pixels.gather(3, columns[:, None, None].expand_as(pixels))
    rows = (torch.linspace(-1, 1, height) / scale).clamp(-1, 1).to(device)  # (N, H), 0 is velocity zero
    across = torch.linspace(-1, 1, width, device=device).expand(count, height, width)
    grid = torch.stack([across, rows[:, :, None].expand(count, height, width)], 3)  # (N, H, W, 2)
    scaled = F.grid_sample(shifted, grid, align_corners=True, padding_mode="border")
    if device.type != "cpu":
        seed = int(torch.randint(2**62, (1,), generator=generator))
        generator = torch.Generator(device).manual_seed(seed)
    noise = NOISE * torch.randn(pixels.shape, generator=generator, device=device)
    return (scaled + gain + noise).clamp(-1, 1)


@torch.no_grad()
def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits (N, classes) of windows (N, 1, H, W) on the CPU, in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(part.to(device)).float().cpu() for part in pixels.split(CHUNK)])


def predicted(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the class (N,) of each of the windows (N, 1, H, W)."""
    return logits_of(model, pixels).argmax(1)
