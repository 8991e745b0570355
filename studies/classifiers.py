"""Train and test classifiers of Fashion-MNIST: the judge, and the vision model that latents are aligned with."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.console import duration, positive, seed_number
from LightningDiT.data.fashion_mnist import fashion_mnist, pad_to_32
from LightningDiT.device import autocast, best_device, training_dtype
from LightningDiT.seeds import generator_for
from LightningDiT.training.schedule import BatchOrder, learning_rate
from studies.pages import add_data_option

M = TypeVar("M", bound=nn.Module)
BATCH_SIZE, TEST_BATCH_SIZE = 128, 500
WARMUP_STEPS = 300  # at most; a tenth of a shorter training
MAX_SHIFT = 2  # pixels by which training images move
LABEL_SMOOTHING = 0.1


@dataclass(frozen=True)
class Recipe:
    """What differs between the classifiers."""

    peak_rate: float  # of AdamW, after a linear rise and before a cosine fall
    weight_decay: float


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images (N, 3, 32, 32) moved by up to 2 pixels each way, half of them mirrored.

    Black pixels move in and out, since the border is black and as wide.
    """
    count, _, side, _ = images.shape
    padded = F.pad(images, [MAX_SHIFT] * 4, value=-1.0)  # (N, 3, 36, 36)
    shifts = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = torch.arange(side) + shifts  # (N, 32) each
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(count)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]  # (N, 32, 32, 3)
    return moved.permute(0, 3, 1, 2)  # (N, 3, 32, 32)


def add_training_options(parser: argparse.ArgumentParser, epochs: int) -> None:
    """Add data set, output, epochs (default `epochs`) and seed."""
    add_data_option(parser)
    parser.add_argument("--output", required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=positive, default=epochs, help="default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0)


def train_classifier(model: M, images: Tensor, labels: Tensor, recipe: Recipe, epochs: int, seed: int) -> M:
    """Train `model` and return it on the CPU in eval mode; prints one line an epoch.

    Args:
        model: from images (N, 3, 32, 32) in [-1, 1] to logits.
        images: (N, 28, 28) uint8.
        labels: (N,).
        seed: of the order of the images and of their augmentation.
    """
    device = best_device()
    dtype = training_dtype(device)
    # channels last: a third faster in bfloat16 on the CPU
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    order = BatchOrder(len(images), BATCH_SIZE, seed)
    total = epochs * order.steps_per_epoch
    warmup = min(WARMUP_STEPS, total // 10)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(total):
        chosen = order.indices(step)
        batch = augment(pad_to_32(images[chosen]), generator_for(seed, 1, step)).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.peak_rate, warmup, total - warmup, total)
        with autocast(device, dtype):
            logits = model(batch).float()
        loss = F.cross_entropy(logits, labels[chosen].to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        epoch, rest = divmod(step + 1, order.steps_per_epoch)
        if rest == 0:
            mean = sum(losses[-order.steps_per_epoch :]) / order.steps_per_epoch
            left = (time.monotonic() - started) / epoch * (epochs - epoch)
            print(f"epoch {epoch} of {epochs}: loss {mean:.4f} ({duration(left)} left)", flush=True)
    return model.cpu().eval()


@torch.no_grad()
def accuracy_on_test_images(model: nn.Module, root: str) -> float:
    """Return the share of the 10,000 test photographs that a classifier knows."""
    images, labels = fashion_mnist(root, train=False)
    seen = torch.cat([model(pad_to_32(batch)).argmax(1) for batch in images.split(TEST_BATCH_SIZE)])
    return float((seen == labels).double().mean())
