"""Copies of training windows under any shift in time, and how often real windows that are held out look like copies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

QUANTILE = 0.05  # of the held-out windows' distances: what lies nearer counts as a copy
NORMAL_QUANTILE = -1.6449  # of the standard normal distribution, at QUANTILE
FEWEST = math.ceil(1 / QUANTILE)  # held-out windows from which their own quantile is taken
MOST_TIMES = 2.0  # the held-out rate that samples may have
ROWS, FREQUENCIES = 32, 16  # of a window's course; the smoothing leaves 0.7 % of the amplitude at the 16th frequency
FLAT = 1e-6  # amplitude, in levels, below which a window counts as constant over time
CHUNK, CHUNK_BYTES = 250, 2**26  # windows transformed at once; bytes of correlations at once


@dataclass(frozen=True)
class CopyRates:
    """Shares of windows that lie at most `threshold` from a training window.

    Attributes:
        samples, held_out: of the generated windows and of real ones that were not trained on.
        threshold: distance.
    """

    samples: float
    held_out: float
    threshold: float

    @property
    def allowed(self) -> float:
        """The most that the samples may have: twice the held-out rate, which counts as 5 % at least."""
        return MOST_TIMES * max(self.held_out, QUANTILE)

    @property
    def passes(self) -> bool:
        return self.samples <= self.allowed


def nearest_under_shift(images: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return distance, index and shift of the known window nearest to each image under all circular time shifts.

    Windows are compared by their `courses`, scaled to length 1, so that another gain or contrast changes nothing. The
    distance is `sqrt(2 - 2 r)` with the correlation r: 0 for a copy, sqrt(2) for unrelated windows. The correlations
    of all shifts are one product of Fourier transforms along time. The distance of the nearest pair is computed again
    from the differences in float64, since rounding would leave 1e-3 in place of 0.

    Args:
        images: (N, C, H, W), the last axis is time.
        known: (M, C, H, W), M is 1 at least.

    Returns:
        distances (N,) float64, indices (N,) of the known windows and shifts (N,) in columns, from 0 to W - 1, all on
        the CPU: image n is nearest to `known[indices[n]].roll(shifts[n], -1)`.
    """
    width = images.shape[-1]
    wanted, others = courses(images), courses(known)  # (N, C R, F), (M, C R, F)
    weights = _weights(width, wanted.shape[-1]).to(wanted)  # (F,)
    columns = others.to(torch.complex64).permute(2, 1, 0).conj()  # (F, C R, M)
    padding = width // 2 - wanted.shape[-1]  # frequencies above, which the courses lack
    found = []
    for part in wanted.split(max(1, CHUNK_BYTES // (4 * width * len(others)))):
        products = (part.to(torch.complex64).permute(2, 0, 1) @ columns).permute(1, 2, 0)  # (n, M, F)
        correlations = torch.fft.irfft(F.pad(products, (1, padding)), n=width)  # (n, M, W), by the known one's shift
        found.append(correlations.flatten(1).argmax(1))
    best = torch.cat(found)
    indices, shifts = best // width, best % width
    turns = torch.arange(1, wanted.shape[-1] + 1, device=shifts.device) * shifts.double()[:, None] / width  # (N, F)
    shifted = others[indices] * torch.exp(-2j * math.pi * turns)[:, None]  # (N, C R, F)
    squares = ((wanted - shifted).abs().square() * weights.real).sum((1, 2))
    return squares.sqrt().cpu(), indices.cpu(), shifts.cpu()


def courses(windows: Tensor) -> Tensor:
    """Return what identifies windows (N, C, H, W): Fourier coefficients (N, C * ROWS, F) complex128 along time.

    Doppler is averaged to `ROWS` rows and time is smoothed, each by a Gaussian of 1/32 of its extent. Generated windows
    have less speckle than real ones, and would otherwise be nearer to all of them. The frequency 0 is left out: it is
    the mean spectrum, in which all windows of a walker are alike. The squares of a window's coefficients, each counted
    for its negative frequency too, sum to 1, or to 0 for a window that is constant over time.
    """
    height, width = windows.shape[-2:]
    centres = (torch.arange(ROWS, dtype=torch.float64) + 0.5) * height / ROWS - 0.5
    pool = torch.exp(-0.5 * ((torch.arange(height) - centres[:, None]) * ROWS / height).square())  # (ROWS, H)
    pool = (pool / pool.sum(1, keepdim=True)).to(windows.device)
    count = min(FREQUENCIES, width // 2)
    frequencies = torch.arange(1, count + 1, dtype=torch.float64, device=pool.device)
    decay = torch.exp(-0.5 * (2 * math.pi * frequencies / ROWS).square())
    parts = []
    for part in windows.split(CHUNK):
        spectra = torch.fft.rfft(pool @ part.double())[..., 1 : count + 1] * decay  # (n, C, ROWS, F)
        parts.append(spectra.flatten(1, 2))
    found = torch.cat(parts)
    squares = found.abs().square() * _weights(width, count).to(found).real
    length = squares.sum((1, 2), keepdim=True).sqrt()
    return torch.where(length > FLAT * width, found / length, 0)


def _weights(width: int, count: int) -> Tensor:
    """Return how often each of the frequencies 1 to `count` counts (count,): once if it is the highest, else twice."""
    return torch.where(2 * torch.arange(1, count + 1) == width, 1.0, 2.0).double()


def copy_rates(samples: Tensor, held_out: Tensor, training: Tensor) -> CopyRates:
    """Return which share of generated and of held-out windows are as near to a training window as a copy.

    A window counts if it is at most as far from its nearest training window, under any shift in time, as the nearest
    5 % of the held-out ones. Below 20 held-out windows there are no 5 %, and the threshold is that quantile of a normal
    distribution with their mean and standard deviation; the held-out rate is counted in either case.

    Args:
        samples, held_out, training: (N, C, H, W); held-out windows share no pixels with training windows.

    Raises:
        ValueError: one of the three has no window.
    """
    held_out_distances, *_ = nearest_under_shift(held_out, training)
    return rates_of(nearest_under_shift(samples, training)[0], held_out_distances)


def rates_of(samples: Tensor, held_out: Tensor) -> CopyRates:
    """Return the rates for the distances of samples (N,) and of held-out windows (M,)."""
    if not len(samples) or not len(held_out):
        raise ValueError(f"{len(samples)} samples and {len(held_out)} held-out windows; one of each at least is needed")
    if len(held_out) < FEWEST:
        threshold = held_out.mean() + NORMAL_QUANTILE * held_out.std(correction=0)
    else:
        threshold = held_out.sort().values[math.ceil(QUANTILE * len(held_out)) - 1]
    shares = [float((distances <= threshold).double().mean()) for distances in (samples, held_out)]
    return CopyRates(shares[0], shares[1], float(threshold))
