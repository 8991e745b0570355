"""Measures of images and features against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from LightningDiT.metrics.formulas import (
    FrechetDistance,
    frechet_distance,
    moments,
    nearest_neighbours,
    psnr,
    squared_error,
    uniformity,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def standardised(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return points whose sample mean is 0 and sample covariance the identity, exactly (float64)."""
    points = randn(count, width, seed=seed).double()
    points = points - points.mean(0)
    factor = torch.linalg.cholesky(torch.cov(points.T))
    return torch.linalg.solve_triangular(factor, points.T, upper=False).T


def distance_by_scipy(features: torch.Tensor, references: torch.Tensor) -> float:
    """Return the Frechet distance as FID's first code does: by SciPy's root of the unsymmetric product."""
    sides = (features.double().numpy(), references.double().numpy())
    (mean1, covariance1), (mean2, covariance2) = ((x.mean(0), np.cov(x.T)) for x in sides)
    traces = np.trace(covariance1 + covariance2 - 2 * sqrtm(covariance1 @ covariance2).real)
    return float(np.square(mean1 - mean2).sum() + traces)


def rounding(covariance1: torch.Tensor, covariance2: torch.Tensor) -> float:
    """Return the accuracy of a distance, as `FrechetDistance` states it: the smaller of its two bounds."""
    width, norms = len(covariance1), [torch.linalg.matrix_norm(one, 2) for one in (covariance1, covariance2)]
    moved = float(width * torch.finfo(torch.float64).eps * norms[0] * norms[1])
    smallest = float(torch.linalg.eigvals(covariance1 @ covariance2).real.min())
    always = 2 * width * math.sqrt(moved)
    return min(always, width * moved / math.sqrt(smallest)) if smallest > moved else always


def test_psnr_of_a_constant_error() -> None:
    references = torch.zeros(2, 3, 4, 4)
    images = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    errors = squared_error(images, references)
    # 10 log10(2^2 / e^2) = 20 dB for e = 0.2 and 40 dB for e = 0.02
    assert psnr(errors).tolist() == pytest.approx([20.0, 40.0], abs=1e-5)
    pooled = 10 * math.log10(4 / ((0.2**2 + 0.02**2) / 2))
    assert float(psnr(errors.mean())) == pytest.approx(pooled, abs=1e-5)
    assert pooled < 30


def test_psnr_of_equal_images_is_infinite() -> None:
    images = randn(1, 3, 4, 4)
    assert psnr(squared_error(images, images)).item() == math.inf


@pytest.mark.parametrize("count", [3, 50])
def test_frechet_distance_to_itself_is_zero(count: int) -> None:
    """With 3 images the covariance is singular: the roots of four eigenvalues are rounding alone."""
    for seed in range(20):
        mean, covariance = moments(randn(count, 6, seed=seed))
        distance = FrechetDistance(mean, covariance)(mean, covariance)
        assert distance <= rounding(covariance, covariance), seed


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
    first = (randn(80, 6, seed=3) @ randn(6, 6, seed=4)).double()
    second = (randn(90, 6, seed=5) @ randn(6, 6, seed=6)).double() + 1.0
    expected = distance_by_scipy(first, second)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    mean, covariance = moments(second)
    distance = FrechetDistance(mean, covariance)
    assert distance(*moments(first)) == pytest.approx(expected, rel=1e-9)
    assert distance(mean, covariance) <= rounding(covariance, covariance)


def test_weights_count_rows_as_often_as_they_say() -> None:
    features, weights = randn(6, 3), torch.tensor([2, 0, 1, 3, 0, 1])
    repeated = np.repeat(features.double().numpy(), weights.numpy(), axis=0)
    mean, covariance = moments(features, weights)
    np.testing.assert_allclose(mean.numpy(), repeated.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance.numpy(), np.cov(repeated.T), rtol=1e-12)


def test_frechet_distance_of_features_that_never_fire() -> None:
    # a network's feature may be 0 for every image: the covariance is singular, the distance is defined
    features = torch.cat([standardised(100, 2), torch.zeros(100, 3)], dim=1)
    assert frechet_distance(features, 3 * features) == pytest.approx(2 * (3 - 1) ** 2, abs=1e-9)


def test_uniformity_has_its_closed_forms() -> None:
    assert uniformity(torch.tensor([[1.0, 0.0], [5.0, 0.0]])) == 0.0  # one direction
    assert math.isclose(uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), -8.0)  # |x - y|^2 = 4
    assert math.isclose(uniformity(torch.eye(5)), -4.0)  # every pair at right angles: 2
    points = randn(20, 3).numpy().astype(np.float64)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(20) for j in range(i)]
    assert math.isclose(uniformity(torch.from_numpy(points)), math.log(np.mean(pairs)), rel_tol=1e-9)


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
