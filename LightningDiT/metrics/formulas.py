"""Measures of images and features as pure functions: PSNR, Frechet distance, uniformity, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

VALUE_RANGE = 2.0  # images lie in [-1, 1]
UNIFORMITY_T = 2.0  # t of the paper


def squared_error(images: Tensor, references: Tensor) -> Tensor:
    """Return the mean squared error of each image (N,) in float64.

    Args:
        images, references: (N, ...), of one shape.
    """
    return (images.double() - references.double()).square().flatten(1).mean(1)


def psnr(error: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB for mean squared errors of images in [-1, 1]; infinite for 0.

    Papers on tokenizers state the mean of the ratios of all images. The ratio of the mean error is never above it
    (Jensen), and below it if some images are much worse than others.
    """
    return 10.0 * torch.log10(VALUE_RANGE**2 / error)


def ridge_error(windows: Tensor, references: Tensor) -> Tensor:
    """Return how far the ridge of spectrograms moved: mean over columns of the distance of its rows, (N,) float64.

    The ridge is the strongest row of each column, in most of them that of the trunk.

    Args:
        windows, references: (N, 1, H, W), Doppler down and time across.
    """
    rows = windows.argmax(2), references.argmax(2)  # (N, 1, W)
    return (rows[0] - rows[1]).abs().double().flatten(1).mean(1)


def frechet_distance(features: Tensor, references: Tensor) -> float:
    """Return the Frechet distance between normal distributions fitted to features (N, F) and references (M, F).

    Both sets have two rows at least; see `FrechetDistance`.
    """
    return FrechetDistance(*moments(features))(*moments(references))


class FrechetDistance:
    """The Frechet distance from one normal distribution to others.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))` (Dowson and Landau, 1982; as FID: Heusel et al., arXiv 1706.08500), in
    float64. The trace of the root is that of the symmetric `(R C2 R)^(1/2)` with `R = C1^(1/2)`, whose eigenvalues are
    real. torch-fidelity has the distance as one call; here the root of the reference is taken once for all resamples.

    Rounding moves each eigenvalue of `R C2 R` by about `d = F eps |C1| |C2|` (spectral norms), and so its root by at
    most `sqrt(d)`. The distance is therefore accurate to `2 F sqrt(d)`, which is below `F sqrt(F eps) tr(C1 + C2)`, and
    to `F d / sqrt(e)` if the smallest eigenvalue e of `C1 C2` is well above d.

    Args:
        mean: (F,) float64.
        covariance: (F, F) float64.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        values, vectors = torch.linalg.eigh(covariance)
        self._mean, self._trace = mean, covariance.trace()
        self._root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # (F, F)

    def __call__(self, mean: Tensor, covariance: Tensor) -> float:
        """Return the distance to the normal distribution with mean (F,) and covariance (F, F)."""
        mixed = torch.linalg.eigvalsh(self._root @ covariance @ self._root)  # (F,)
        traces = self._trace + covariance.trace() - 2.0 * mixed.clamp_min(0).sqrt().sum()
        return max(float((self._mean - mean).square().sum() + traces), 0.0)  # NaN stays NaN


def moments(features: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean (F,) and covariance (F, F) of features (N, F), in float64.

    Args:
        weights: (N,) integers, how often each row counts; default: once.
    """
    wide = features.double()
    if weights is None:
        return wide.mean(0), torch.cov(wide.T)
    return weights.double() @ wide / weights.sum(), torch.cov(wide.T, fweights=weights)


def uniformity(points: Tensor) -> float:
    """Return `log E exp(-2 |x - y|^2)` over all pairs of points (N, D), each scaled to length 1; N is 2 at least.

    L_uniform of Wang and Isola, arXiv 2005.10242: 0 if all points coincide; the lower, the more evenly they lie. It
    replaces the density of a t-SNE picture in the VA-VAE paper, which depends on the settings of t-SNE. Memory grows
    with N^2.
    """
    distances = torch.pdist(F.normalize(points.double(), dim=1))  # (N (N - 1) / 2,)
    return float(torch.logsumexp(-UNIFORMITY_T * distances.square(), 0)) - math.log(len(distances))


def nearest_neighbours(
    queries: Tensor,
    references: Tensor,
    batch_size: int = 250,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the Euclidean distance (N,) float64 and the index (N,) of each query's nearest reference.

    The search runs in float32; the distance to its result is then computed from the differences in float64, so that an
    exact copy has distance 0, which `torch.cdist` by matrix products does not give.

    Args:
        queries: (N, ...).
        references: (M, ...).
        batch_size: queries compared at once, each with 4 M bytes of memory.
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
