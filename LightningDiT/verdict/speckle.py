"""Speckle that a tokenizer smooths away, measured on training windows and put back into generated ones.

A tokenizer's reconstructions lack what varies from pixel to pixel, and what is generated comes from the same decoder.
What is put back is a Gaussian field that has at each frequency the power that reconstructions of training windows lack.
Its standard deviation follows the level, as the difference of windows and reconstructions does. The whole difference
would be too much: a part of it is texture that the decoder invents in another place. The phases are random, so nothing
of a training window is copied.
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
LEAST = 1e-9  # power below which nothing was lost
SPECKLE_STREAM = 6105


@dataclass(frozen=True)
class Speckle:
    """What reconstructions lack.

    Attributes:
        levels: (B,) of reconstructions in [-1, 1], ascending.
        deviations: (B,) standard deviations of the difference at these levels, between which it is interpolated.
        gains: (H, W) of each frequency of `fft2`: the root of the power that is lacking over that of white noise with
            these deviations.
    """

    levels: Floats
    deviations: Floats
    gains: Tensor

    def deviation(self, pixels: Tensor) -> Tensor:
        """Return the standard deviation (N, 1, H, W) at each pixel, which has the nearest level's beyond the ends."""
        return torch.from_numpy(np.interp(pixels.double().numpy(), self.levels, self.deviations))


def fit_speckle(real: Tensor, reconstructions: Tensor) -> Speckle:
    """Return the model of the texture that reconstructions (N, 1, H, W) lost from windows of that shape, in [-1, 1]."""
    smooth = reconstructions.double()
    lost, flat = (real.double() - smooth).flatten(), smooth.flatten()
    parts = [part for part in flat.argsort().tensor_split(BINS) if len(part)]
    levels = np.array([float(flat[part].mean()) for part in parts])
    deviations = np.array([float(lost[part].square().mean().sqrt()) for part in parts])
    powers = [torch.fft.fft2(part).abs().square().mean((0, 1)) for part in (real.double(), smooth)]  # (H, W) each
    of_noise = float(lost.square().mean()) * powers[0].numel()
    gains = ((powers[0] - powers[1]).clamp(min=0) / max(of_noise, LEAST)).sqrt()
    return Speckle(levels, deviations, gains)


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
