"""The judge of windows: it learns who walks whatever the time shift, always alike, and disturbs no other generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from LightningDiT.metrics.window_judge import augmented, predicted, quick_accuracy, share_right, train_judge
from LightningDiT.radar.pictures import SHOWN
from LightningDiT.radar.separability import accuracy, features


def walkers(each: int, seed: int, classes: int = 3, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return windows (N, 1, size, size) of walkers with a ridge at a place of their own, and labels (N,)."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    phases = 2 * torch.pi * torch.rand(len(labels), 1, generator=draw)
    swing = 2 * torch.sin(2 * torch.pi * 2 * torch.arange(size) / size + phases)  # (N, W)
    ridge = size * (0.35 + 0.15 * labels[:, None]) + swing
    distance = (torch.arange(size)[None, :, None] - ridge[:, None, :]) / 3  # (N, H, W)
    noise = 0.3 * torch.randn(distance.shape, generator=draw)
    return (2 * torch.exp(-distance.square()) - 1 + noise).clamp(-1, 1)[:, None], labels


def test_the_judge_learns_who_walks_and_is_the_same_for_its_seed() -> None:
    pixels, labels = walkers(8, 0)
    before = torch.get_rng_state()
    judge, again, other = (train_judge(pixels, labels, 4, steps=25, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    unseen, theirs = walkers(20, 5)
    assert share_right(judge, unseen, theirs) > 0.95  # chance is 1/3
    assert share_right(judge, unseen.roll(9, -1), theirs) > 0.95
    assert share_right(judge, unseen, (theirs + 1) % 3) < 0.05
    weights = [torch.cat([value.flatten() for value in one.state_dict().values()]) for one in (judge, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not judge.training
    assert judge(pixels).shape == (24, 4)  # a class without windows has a logit too


def test_the_judge_takes_windows_that_are_not_square() -> None:
    pixels, labels = walkers(4, 0, size=40)
    judge = train_judge(pixels[..., :24], labels, 3, steps=1)
    assert predicted(judge, pixels[..., :24]).shape == (12,)


def test_the_judge_has_about_100_000_weights() -> None:
    pixels, labels = walkers(1, 0)
    judge = train_judge(pixels, labels, 31, steps=0)
    assert 80_000 < sum(value.numel() for value in judge.parameters()) < 100_000


def test_augmentation_shifts_each_window_in_time_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GAIN", "NOISE"):
        monkeypatch.setattr(f"LightningDiT.metrics.window_judge.{name}", 0.0)
    pixels = torch.arange(3 * 2 * 8).view(3, 1, 2, 8).float()
    found = augmented(pixels.expand(3, 1, 2, 8), torch.Generator().manual_seed(3))
    rolls = [
        [shift for shift in range(8) if torch.equal(new, old.roll(shift, -1))]
        for new, old in zip(found, pixels, strict=True)
    ]
    assert [len(shifts) for shifts in rolls] == [1, 1, 1]
    assert len({shifts[0] for shifts in rolls}) > 1


def test_the_quick_classifier_is_that_of_separability() -> None:
    train, labels = walkers(10, 0)
    test, theirs = walkers(10, 1)
    decibels = [((pixels[:, 0] + 1) / 2 * SHOWN).numpy().astype(np.float32) for pixels in (train, test)]
    pools = [features(values) for values in decibels]
    wanted = accuracy(pools[0], labels.numpy(), pools[1], theirs.numpy())
    assert quick_accuracy(train, labels, test, theirs) == wanted > 0.9
    assert quick_accuracy(train, labels, test, (theirs + 1) % 3) < 0.1


def test_windows_smaller_than_the_pool_are_enlarged() -> None:
    train, labels = walkers(10, 0)
    test, theirs = walkers(10, 1)
    small = [pixels[:, :, ::2, ::8] for pixels in (train, test)]  # 16 rows, 4 columns
    assert quick_accuracy(small[0], labels, small[1], theirs) > 0.9
