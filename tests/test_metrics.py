"""Figures of image quality against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from LightningDiT.metrics.formulas import (
    FrechetDistance,
    class_accuracy,
    frechet_distance,
    mean_pairwise_distance,
    mean_psnr,
    moments,
    nearest_neighbours,
    pooled_psnr,
    psnr_per_image,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def standardised(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return points whose sample mean is 0 and sample covariance the identity, exactly (float64)."""
    points = randn(count, width, seed=seed).double()
    points = points - points.mean(0)
    factor = torch.linalg.cholesky(torch.cov(points.T))
    return torch.linalg.solve_triangular(factor, points.T, upper=False).T


def test_psnr_of_a_constant_error() -> None:
    references = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    # 10 log10(2^2 / e^2) = 20 dB for e = 0.2 and 40 dB for e = 0.02
    assert psnr_per_image(images, references).tolist() == pytest.approx([20.0, 40.0], abs=1e-5)
    assert mean_psnr(images, references) == pytest.approx(30.0, abs=1e-5)
    pooled = 10 * math.log10(4 / ((0.2**2 + 0.02**2) / 2))
    assert pooled_psnr(images, references) == pytest.approx(pooled, abs=1e-5)
    assert pooled < 30


def test_psnr_of_equal_images_is_infinite() -> None:
    images = randn(1, 3, 4, 4)
    assert psnr_per_image(images, images).item() == math.inf


def test_frechet_distance_to_itself_is_zero() -> None:
    features = randn(50, 6)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-10)


def test_frechet_distance_of_a_shift_is_its_squared_length() -> None:
    features = randn(50, 6).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0, 3.0]).double()
    assert frechet_distance(features, features + shift) == pytest.approx(float(shift.square().sum()), abs=1e-9)


def test_frechet_distance_of_diagonal_covariances() -> None:
    # commuting covariances: sum over axes of (m1 - m2)^2 + (s1 - s2)^2
    scales1, scales2 = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.5]).double()
    mean = torch.tensor([0.0, 1.0, -1.0]).double()
    first = standardised(200, 3, seed=1) * scales1
    second = standardised(300, 3, seed=2) * scales2 + mean
    expected = float(((scales1 - scales2).square() + mean.square()).sum())
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-9)


def test_frechet_distance_of_general_covariances_meets_the_eigenvalue_formula() -> None:
    # independent route: tr (C1 C2)^(1/2) is the sum of roots of the eigenvalues of the unsymmetric product
    first = randn(80, 5, seed=3).double() @ randn(5, 5, seed=4).double()
    second = randn(90, 5, seed=5).double() @ randn(5, 5, seed=6).double()
    covariance1, covariance2 = torch.cov(first.T), torch.cov(second.T)
    eigenvalues = torch.linalg.eigvals(covariance1 @ covariance2).real
    means = (first.mean(0) - second.mean(0)).square().sum()
    expected = means + covariance1.trace() + covariance2.trace() - 2 * eigenvalues.sqrt().sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_is_that_of_scipys_matrix_root() -> None:
    # the route of FID's first code: sqrtm of the unsymmetric product, here by SciPy
    first = (randn(80, 6, seed=3) @ randn(6, 6, seed=4)).double()
    second = (randn(90, 6, seed=5) @ randn(6, 6, seed=6)).double() + 1.0
    (mean1, covariance1), (mean2, covariance2) = ((x.mean(0), np.cov(x.T)) for x in (first.numpy(), second.numpy()))
    traces = np.trace(covariance1 + covariance2 - 2 * sqrtm(covariance1 @ covariance2).real)
    expected = np.square(mean1 - mean2).sum() + traces
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    distance = FrechetDistance(*moments(second))
    assert distance(*moments(first)) == pytest.approx(expected, rel=1e-9)
    assert distance(*moments(second)) == pytest.approx(0.0, abs=1e-9)


def test_weights_count_rows_as_often_as_they_say() -> None:
    features, weights = randn(6, 3), torch.tensor([2, 0, 1, 3, 0, 1])
    repeated = np.repeat(features.double().numpy(), weights.numpy(), axis=0)
    mean, covariance = moments(features, weights)
    np.testing.assert_allclose(mean.numpy(), repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(repeated.T), rtol=1e-12)


def test_frechet_distance_of_features_that_never_fire() -> None:
    # a judge's feature may be 0 for every image: the covariance is singular, the distance is not
    features = torch.cat([standardised(100, 2), torch.zeros(100, 3)], dim=1)
    assert frechet_distance(features, 3 * features) == pytest.approx(2 * (3 - 1) ** 2, abs=1e-9)


def test_mean_pairwise_distance_of_a_square() -> None:
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    # four sides of 1, two diagonals of sqrt(2)
    assert mean_pairwise_distance(square) == pytest.approx((4 + 2 * math.sqrt(2)) / 6, abs=1e-12)


def test_mean_pairwise_distance_far_from_the_origin() -> None:
    points = randn(40, 3, 4, 4)
    expected = torch.pdist(points.double().flatten(1)).mean().item()
    assert mean_pairwise_distance(points) == pytest.approx(expected, rel=1e-12)
    assert mean_pairwise_distance(points.double() + 1e4) == pytest.approx(expected, rel=1e-9)


def test_class_accuracy() -> None:
    predictions, labels = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    overall, shares = class_accuracy(predictions, labels, 4)
    assert overall == pytest.approx(3 / 5)
    assert shares[:3] == pytest.approx([1 / 2, 1 / 2, 1.0])
    assert math.isnan(shares[3])


def test_nearest_neighbours_meets_brute_force_in_any_batch_size() -> None:
    queries, references = randn(23, 2, 5), randn(31, 2, 5, seed=1)
    expected, indices = torch.cdist(queries.double().flatten(1), references.double().flatten(1)).min(1)
    for batch_size in (1, 7, 100):
        distances, found = nearest_neighbours(queries, references, batch_size)
        assert torch.equal(found, indices)
        torch.testing.assert_close(distances, expected, rtol=1e-12, atol=1e-12)


def test_nearest_neighbours_finds_an_exact_copy_at_distance_zero() -> None:
    references = 5 + randn(50, 28, 28)
    counted: list[int] = []
    distances, found = nearest_neighbours(references[[17, 3, 40]], references, 2, counted.append)
    assert found.tolist() == [17, 3, 40]
    assert distances.tolist() == [0.0, 0.0, 0.0]
    assert counted == [2, 1]
