"""Real and generated images together with what the judge sees in them, and the figures that follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT.console import Progress
from LightningDiT.data.fashion_mnist import BORDER, FASHION_MNIST_CLASSES, fashion_mnist, padded
from LightningDiT.images import as_images
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.judge import Judge, judge_images, load_judge
from LightningDiT.sampling.pipeline import LightningDiTPipeline, PipelineOutput
from LightningDiT.seeds import generator_for
from studies.pages import CLASSES

BATCH_SIZE = 100
CHUNK = 1000  # images converted at once: the training set as floats would take 0.7 GB
JUDGE_NAME = "judge.safetensors"


@dataclass(frozen=True)
class ImageSet:
    """Images, their classes, and what the judge makes of them.

    Attributes:
        pixels: (N, 32, 32, 3) uint8, as a picture file holds them.
        labels: (N,) int64, real or asked for.
        features: (N, F), the judge's penultimate layer.
        seen: (N,) int64, the class that the judge sees.
    """

    pixels: Tensor
    labels: Tensor
    features: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> ImageSet:
        return ImageSet(self.pixels[chosen], self.labels[chosen], self.features[chosen], self.seen[chosen])


def without_border(images: Tensor) -> Tensor:
    """Return the photograph (..., 28, 28) inside padded images (..., 32, 32)."""
    return images[..., BORDER:-BORDER, BORDER:-BORDER]


def photographs(images: ImageSet) -> Tensor:
    """Return the grey photographs (N, 28, 28) in [-1, 1] in which distances are measured."""
    return torch.cat([without_border(as_images(batch).mean(1)) for batch in images.pixels.split(CHUNK)])


def judge_of(folder: str | Path) -> Judge:
    """Return the judge in a model's folder."""
    return load_judge(Path(folder) / JUDGE_NAME)


def judged(judge: Judge, images: Tensor | np.ndarray, labels: Tensor) -> ImageSet:
    """Return pixels (N, 32, 32, 3) uint8 and labels (N,) together with what the judge sees in them."""
    pixels = torch.as_tensor(images)
    views = [judge_images(judge, as_images(batch)) for batch in pixels.split(CHUNK)]
    features, seen = (torch.cat(parts) for parts in zip(*views, strict=True))
    return ImageSet(pixels, labels, features, seen)


def real_images(judge: Judge, root: str, train: bool) -> ImageSet:
    """Return the real training or test photographs, padded to 32x32."""
    images, labels = fashion_mnist(root, train)
    return judged(judge, padded(images).unsqueeze(3).expand(-1, -1, -1, 3), labels)  # without a copy


def some_of_each_class(images: ImageSet, each: int, seed: int) -> ImageSet:
    """Return `each` images of every class, drawn by `seed`, ordered by class."""
    order = torch.randperm(len(images), generator=generator_for(seed))
    labels = images.labels[order]
    return images[torch.cat([order[labels == label][:each] for label in range(CLASSES)])]


def equal_labels(count: int) -> Tensor:
    """Return `count` classes (N,) in order, equally many of each."""
    return torch.arange(CLASSES).repeat_interleave(count // CLASSES)


def sample_images(pipe: LightningDiTPipeline, labels: Tensor, seed: int, output_type: str = "np") -> PipelineOutput:
    """Return images of classes (N,), image k of the noise (seed, k), in batches of `BATCH_SIZE`; shows progress.

    Args:
        output_type: `np` for pixels, `latent` for latents.
    """
    print(f"Sampling {len(labels)} images", flush=True)
    steps = len(labels.split(BATCH_SIZE)) * pipe.solver(pipe.config.sample).steps
    progress = Progress(steps, "step")
    output = pipe(
        labels.tolist(),
        seed=seed,
        output_type=output_type,
        batch_size=BATCH_SIZE,
        callback=lambda step, t, state: progress.update(),
    )
    progress.close()
    return output


def generated(pipe: LightningDiTPipeline, judge: Judge, count: int, seed: int) -> ImageSet:
    """Return `count` generated images, ordered by class."""
    labels = equal_labels(count)
    return judged(judge, sample_images(pipe, labels, seed).images, labels)


def recognised(images: ImageSet) -> dict[str, Any]:
    """Return the share of images that the judge sees as their class, overall and by class."""
    right = (images.seen == images.labels).double()
    shares = {name: float(right[images.labels == label].mean()) for label, name in enumerate(FASHION_MNIST_CLASSES)}
    return {"accuracy": float(right.mean()), "by_class": shares}


def distance_and_accuracy(images: ImageSet, real: ImageSet) -> dict[str, float]:
    """Return the Frechet distance to real images in the judge's features, and the share seen as their class."""
    return {
        "frechet": frechet_distance(images.features, real.features),
        "accuracy": recognised(images)["accuracy"],
    }


def diversity(images: ImageSet, real: ImageSet) -> dict[str, Any]:
    """Return the mean pairwise distance within each class of `images` over that of `real`, and the mean ratio."""
    pictures = [(photographs(one), one.labels) for one in (images, real)]
    ratios = {}
    for label, name in enumerate(FASHION_MNIST_CLASSES):
        ours, theirs = (torch.pdist(points[labels == label].double().flatten(1)) for points, labels in pictures)
        ratios[name] = float(ours.mean() / theirs.mean())
    return {"mean": sum(ratios.values()) / CLASSES, "by_class": ratios}
