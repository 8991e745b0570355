"""How well a plain classifier tells walkers apart, with windows split at random and by pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from LightningDiT.radar.pictures import SHOWN

Array = NDArray[np.float64]
ROWS, COLUMNS = 32, 8  # of a window as the classifier sees it
PENALTY, STEPS = 1e-3, 300  # weight decay and steps of gradient descent


def features(pictures: NDArray[np.float32]) -> Array:
    """Return (N, ROWS * COLUMNS) means of blocks of pictures (N, rows, columns) as `picture` shows them, in dB."""
    count, rows, columns = pictures.shape
    pools = []
    for blocks, pixels in ((ROWS, rows), (COLUMNS, columns)):
        block = np.arange(pixels) * blocks // pixels
        pools.append(np.eye(blocks)[block] / np.bincount(block))
    shown = np.clip(pictures - pictures.max((1, 2), keepdims=True), -SHOWN, 0)
    small = np.einsum("nrc,ri,cj->nij", shown, *pools, optimize=True)
    return small.reshape(count, -1)


def accuracy(train: Array, train_labels: Array, test: Array, test_labels: Array) -> float:
    """Return the share of test rows that multinomial logistic regression labels rightly; see `predictions`.

    Args:
        test_labels: (M,) whole numbers from 0.
    """
    return float((predictions(train, train_labels, test) == test_labels).mean())


def predictions(train: Array, train_labels: Array, test: Array) -> NDArray[np.int64]:
    """Return the labels (M,) that multinomial logistic regression gives to test rows.

    Args:
        train, test: (N, F) and (M, F) features, which are standardised by the training rows.
        train_labels: (N,) whole numbers from 0.
    """
    mean, std = train.mean(0), train.std(0) + 1e-6
    inputs, targets = (train - mean) / std, np.eye(int(train_labels.max()) + 1)[train_labels]
    rate = 2.0 / (np.linalg.norm(inputs, 2) ** 2 / len(inputs) / 2 + PENALTY)
    weights = np.zeros((inputs.shape[1] + 1, targets.shape[1]))
    previous = weights
    inputs = np.c_[inputs, np.ones(len(inputs))]
    for step in range(STEPS):  # Nesterov's accelerated gradient
        ahead = weights + step / (step + 3) * (weights - previous)
        scores = inputs @ ahead
        scores = np.exp(scores - scores.max(1, keepdims=True))
        slope = inputs.T @ (scores / scores.sum(1, keepdims=True) - targets) / len(inputs) + PENALTY * ahead
        previous, weights = weights, ahead - rate / 2 * slope
    return (np.c_[(test - mean) / std, np.ones(len(test))] @ weights).argmax(1)


def two_splits(inputs: Array, labels: Array, passes: Array, seed: int) -> tuple[float, float]:
    """Return the accuracies with a random half of the windows as test, and with half of each person's passes as test.

    Args:
        inputs: (N, F) features.
        labels, passes: (N,) the person, from 0, and the pass of each window.
    """
    draw = np.random.default_rng(seed)
    at_random, by_pass = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for person in range(int(labels.max()) + 1):
        own = np.flatnonzero(labels == person)
        at_random[draw.permutation(own)[: len(own) // 2]] = True
        order = draw.permutation(np.unique(passes[own]))
        by_pass[own[np.isin(passes[own], order[: len(order) // 2])]] = True
    first, second = (
        accuracy(inputs[~test], labels[~test], inputs[test], labels[test]) for test in (at_random, by_pass)
    )
    return first, second
