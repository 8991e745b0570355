"""Copies of training windows: shifted windows are found exactly, and rates follow from distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.metrics import copies
from LightningDiT.metrics.copies import CopyRates, copy_rates, nearest_under_shift, rates_of


def windows(count: int, width: int = 24, height: int = 40, seed: int = 0, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def smooth(pixels: Tensor) -> Tensor:
    """Return windows blurred over time, circularly, as generated ones are."""
    kernel = torch.tensor([0.25, 0.5, 0.25]).view(1, 1, 1, 3)
    return F.conv2d(F.pad(pixels, (1, 1, 0, 0), "circular"), kernel)


@pytest.mark.parametrize("width", [16, 24, 33, 64])  # an even width has a highest frequency of its own
def test_a_shifted_training_window_has_distance_0_and_its_shift(width: int) -> None:
    known = windows(9, width)
    shifts = torch.arange(9) * 5 % width
    images = torch.stack([known[8 - n].roll(int(shift), -1) for n, shift in enumerate(shifts)])
    distances, indices, found = nearest_under_shift(0.4 * images.double() + 0.3, known)  # another gain and contrast
    assert float(distances.max()) < 1e-12
    assert indices.tolist() == list(range(8, -1, -1))
    assert found.tolist() == shifts.tolist()


def brute_force(images: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `nearest_under_shift` does, from filtered windows in the time domain, every pair and shift."""

    def filtered(pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        rows = torch.arange(height).double() + 0.5
        pool = torch.stack([torch.exp(-0.5 * ((rows - (r + 0.5) * height / 32) * 32 / height) ** 2) for r in range(32)])
        spectra = torch.fft.fft((pool / pool.sum(1, keepdim=True)) @ pixels.double())
        frequencies = torch.fft.fftfreq(width, dtype=torch.float64) * width
        gain = torch.exp(-2 * (math.pi * frequencies / 32) ** 2) * (frequencies.abs().round() <= 16)
        gain[0] = 0
        course = torch.fft.ifft(spectra * gain).real.flatten(1, 2)
        return course / course.square().sum((1, 2), keepdim=True).sqrt()

    ours, theirs = filtered(images), filtered(known)
    width = images.shape[-1]
    shifted = torch.stack([theirs.roll(shift, -1) for shift in range(width)], 1)  # (M, W, rows, W)
    distances = (ours[:, None, None] - shifted[None]).square().sum((-1, -2)).sqrt().flatten(1)  # (N, M W)
    nearest = distances.min(1)
    return nearest.values, nearest.indices // width, nearest.indices % width


@pytest.mark.parametrize(("width", "height", "channels"), [(16, 40, 1), (21, 20, 2), (40, 32, 1)])
def test_the_search_agrees_with_every_pair_and_shift(
    width: int, height: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, known = windows(4, width, height, 1, channels), windows(5, width, height, 2, channels)
    monkeypatch.setattr(copies, "CHUNK_BYTES", 4 * width * 5 * 2)  # two images at once
    monkeypatch.setattr(copies, "CHUNK", 3)
    distances, indices, shifts = nearest_under_shift(images, known)
    wanted = brute_force(images, known)
    torch.testing.assert_close(distances, wanted[0], rtol=0, atol=1e-9)
    assert indices.tolist() == wanted[1].tolist()
    assert shifts.tolist() == wanted[2].tolist()


def test_a_window_that_is_constant_over_time_is_a_copy_of_nothing() -> None:
    flat = torch.linspace(-1, 1, 40).view(1, 1, 40, 1).expand(1, 1, 40, 24)
    distances, *_ = nearest_under_shift(torch.cat([flat, windows(1)]), windows(1))
    assert distances.tolist() == pytest.approx([1.0, 0.0], abs=1e-12)  # from a window of length 1 to nothing


def test_shares_at_the_5_percent_of_the_held_out_windows() -> None:
    held_out = torch.arange(1, 41).double()  # the nearest 5 % of 40 are 2
    rates = rates_of(torch.tensor([0.5, 2.0, 2.1, 9.0]).double(), held_out.flip(0))
    assert rates == CopyRates(samples=0.5, held_out=0.05, threshold=2.0)
    assert rates_of(held_out, held_out[:20]).threshold == 1.0
    assert rates_of(held_out, held_out[:21]).threshold == 2.0  # 5 % of 21 are more than one


def test_few_held_out_windows_count_by_a_normal_distribution() -> None:
    rates = rates_of(torch.tensor([5.0, 6.72, 6.8]).double(), torch.tensor([8.0, 12.0]).double())
    assert rates.threshold == pytest.approx(10 - 1.6449 * 2)  # mean 10, standard deviation 2
    assert (rates.samples, rates.held_out) == (pytest.approx(1 / 3), 0.0)
    assert rates.allowed == pytest.approx(0.1)  # a held-out rate of 0 of two windows counts as 5 %
    assert not rates.passes


@pytest.mark.parametrize(
    ("samples", "held_out", "passes"), [(0.10, 0.05, True), (0.11, 0.05, False), (0.11, 0.06, True), (0.10, 0.0, True)]
)
def test_samples_may_be_copies_twice_as_often_as_held_out_windows(
    samples: float, held_out: float, passes: bool
) -> None:
    assert CopyRates(samples, held_out, 0.3).passes is passes


def test_smooth_copies_are_found_and_smooth_other_windows_are_not() -> None:
    training, held_out = windows(30, seed=3), windows(30, seed=4)
    assert copy_rates(smooth(training.roll(5, -1)), held_out, training).samples == 1.0
    other = copy_rates(smooth(held_out), held_out, training)
    assert other.held_out == pytest.approx(2 / 30)
    assert other.samples < 0.2


def test_rates_need_windows_on_each_side() -> None:
    with pytest.raises(ValueError, match="0 samples and 1 held-out windows"):
        rates_of(torch.zeros(0), torch.zeros(1))
