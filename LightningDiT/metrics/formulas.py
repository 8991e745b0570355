"""Figures of image quality as pure functions: PSNR, Frechet distance, diversity, accuracy, neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

VALUE_RANGE = 2.0  # images lie in [-1, 1]


def psnr_per_image(images: Tensor, references: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of every image in dB, (N,) float64; infinite where equal.

    Args:
        images: (N, ...) in [-1, 1].
        references: of the same shape.
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)  # (N,)
    return 10.0 * torch.log10(VALUE_RANGE**2 / error)


def mean_psnr(images: Tensor, references: Tensor) -> float:
    """Return the mean over images of each one's PSNR in dB: what papers on tokenizers state."""
    return float(psnr_per_image(images, references).mean())


def pooled_psnr(images: Tensor, references: Tensor) -> float:
    """Return the PSNR in dB of the mean squared error over all images together.

    Never above `mean_psnr` (Jensen), and below it where some images are much worse than others.
    """
    error = (images.double() - references.double()).square().mean()
    return float(10.0 * torch.log10(VALUE_RANGE**2 / error))


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Return the Frechet distance between normal distributions fitted to two sets of features; see `FrechetDistance`.

    Args:
        features: (N, F), N at least 2.
        references: (M, F), M at least 2.
    """
    return FrechetDistance(*moments(features))(*moments(references))


class FrechetDistance:
    """The Frechet distance from one normal distribution to others.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and Landau, 1982; as FID: Heusel et al.,
    arXiv 1706.08500), in float64. The trace of the root is that of the symmetric `(R C2 R)^(1/2)` with
    `R = C1^(1/2)`, whose eigenvalues are real, so that nothing imaginary has to be thrown away.

    Args:
        mean: (F,) float64.
        covariance: (F, F) float64, whose root is taken once for all distances.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        values, vectors = torch.linalg.eigh(covariance)
        self._mean, self._trace = mean, covariance.trace()
        self._root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # (F, F)

    def __call__(self, mean: Tensor, covariance: Tensor) -> float:
        """Return the distance to the normal distribution of this mean (F,) and covariance (F, F)."""
        mixed = torch.linalg.eigvalsh(self._root @ covariance @ self._root)  # (F,)
        traces = self._trace + covariance.trace() - 2.0 * mixed.clamp_min(0).sqrt().sum()
        return max(float((self._mean - mean).square().sum() + traces), 0.0)  # NaN stays NaN


def moments(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean (F,) and covariance (F, F) of features (N, F), in float64.

    Args:
        weights: (N,) integers, how often each row counts; once where left out.
    """
    wide = features.double()
    if weights is None:
        return wide.mean(0), torch.cov(wide.T)
    return weights.double() @ wide / weights.sum(), torch.cov(wide.T, fweights=weights)


def mean_pairwise_distance(points: Tensor) -> float:
    """Return the mean Euclidean distance over all N (N - 1) / 2 pairs of points (N, ...).

    Squared distances are `|a|^2 + |b|^2 - 2 a.b` from the Gram matrix in float64.
    """
    flat = points.double().flatten(1)  # (N, D)
    flat = flat - flat.mean(0)  # distances stay, and the differences below lose fewer digits
    gram = flat @ flat.T  # (N, N)
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2.0 * gram).clamp_min(0).sqrt()  # (N, N)
    above = torch.ones_like(distances).triu(1).bool()
    return float(distances[above].mean())


def class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> tuple[float, list[float]]:
    """Return the share of predictions (N,) equal to labels (N,), overall and for every class.

    A class without labels has the share NaN.
    """
    right = (predictions == labels).double()
    totals = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels, weights=right, minlength=classes)
    shares = [float(hit / total) if total else math.nan for hit, total in zip(hits, totals, strict=True)]
    return float(right.mean()), shares


def nearest_neighbours(
    queries: Tensor,
    references: Tensor,
    batch_size: int = 250,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance (N,) float64 and the number (N,) of every query's nearest reference.

    The search runs in float32; the distance to what it found is then computed from the differences in
    float64, so that an exact copy has the distance 0.

    Args:
        queries: (N, ...).
        references: (M, ...).
        batch_size: queries compared at a time, which takes 4 M bytes each.
        progress: called with the number of queries after each batch.
    """
    wanted, known = queries.float().flatten(1), references.float().flatten(1)
    squares = known.square().sum(1)  # (M,)
    found = []
    for batch in wanted.split(batch_size):
        found.append(torch.addmm(squares, batch, known.T, alpha=-2.0).argmin(1))  # |b|^2 - 2 a.b
        if progress:
            progress(len(batch))
    indices = torch.cat(found)  # (N,)
    distances = (wanted.double() - known[indices].double()).square().sum(1).sqrt()
    return distances, indices
