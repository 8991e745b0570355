"""Speckle that a tokenizer smooths away, measured on training windows and put back into generated ones.

A tokenizer's reconstructions lack what varies from pixel to pixel, and what is generated comes from the same decoder.
The difference of real training windows and their own reconstructions is modelled as a Gaussian field: its standard
deviation depends on the level that was reconstructed, its spectrum is one for all. A draw of it has the variance and
the correlations of what was lost, and none of its phases, so nothing of a training window is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.vavae import VA_VAE

Floats = NDArray[np.float64]
BINS = 16  # of levels, with as many pixels each
LEAST = 1e-6  # standard deviation, of levels in [-1, 1], below which nothing was lost
SPECKLE_STREAM = 6105


@dataclass(frozen=True)
class Speckle:
    """What reconstructions lack.

    Attributes:
        levels: (B,) of reconstructions in [-1, 1], ascending.
        deviations: (B,) standard deviations of what they lack at these levels, between which it is interpolated.
        gains: (H, W) of each frequency of `fft2`, by which white noise gets the spectrum; their mean square is 1.
    """

    levels: Floats
    deviations: Floats
    gains: Tensor

    def deviation(self, pixels: Tensor) -> Tensor:
        """Return the standard deviation (N, 1, H, W) at each pixel, which has the nearest level's beyond the ends."""
        return torch.from_numpy(np.interp(pixels.double().numpy(), self.levels, self.deviations))


def fit_speckle(real: Tensor, reconstructions: Tensor) -> Speckle:
    """Return the model of what reconstructions (N, 1, H, W) lack of windows of the same shape; both in [-1, 1]."""
    lost = real.double() - reconstructions.double()
    order = reconstructions.double().flatten().argsort()
    parts = [part for part in order.tensor_split(BINS) if len(part)]
    levels = np.array([float(reconstructions.double().flatten()[part].mean()) for part in parts])
    deviations = np.array([float(lost.flatten()[part].square().mean().sqrt()) for part in parts])
    shape = Speckle(levels, np.maximum(deviations, LEAST), torch.ones(real.shape[2:], dtype=torch.float64))
    power = torch.fft.fft2(lost / shape.deviation(reconstructions)).abs().square().mean((0, 1))  # (H, W)
    return Speckle(levels, deviations, (power / power.mean().clamp(min=LEAST)).sqrt())


def put_back(speckle: Speckle, generated: Tensor, seed: int) -> Tensor:
    """Return windows (N, 1, H, W) in [-1, 1] with a draw of the speckle, which depends on seed and place alone."""
    noise = torch.stack(
        [
            torch.randn(generated.shape[1:], generator=generator_for(SPECKLE_STREAM, seed, at), dtype=torch.float64)
            for at in range(len(generated))
        ]
    )
    field = torch.fft.ifft2(torch.fft.fft2(noise) * speckle.gains).real
    return (generated + speckle.deviation(generated) * field).clamp(-1, 1).to(generated.dtype)


def reconstructed(config: Path, weights: Path, pixels: Tensor) -> Tensor:
    """Return the reconstructions of windows (N, 1, H, W) by a tokenizer, on the CPU.

    Args:
        config: YAML file of the tokenizer.

    Raises:
        LightningDiTError: either file is missing or damaged.
    """
    tokenizer = VA_VAE(config, ckpt_path=weights)
    found = tokenizer.decode_latents(tokenizer.encode_images(pixels.to(tokenizer.device), sample=False))
    return found.float().cpu().mean(1, keepdim=True).clamp(-1, 1)  # a tokenizer of colours gives three channels
