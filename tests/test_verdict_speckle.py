"""Speckle that is put back: variance by level and spectrum of a field that is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.vavae import load_autoencoder
from LightningDiT.verdict.speckle import fit_speckle, put_back, reconstructed
from tests.conftest import PROJECT

SIDE = 16


def ramp(count: int) -> Tensor:
    """Return windows whose level rises with the row from -0.5 to 0.5."""
    return torch.linspace(-0.5, 0.5, SIDE, dtype=torch.float64)[:, None].expand(count, 1, SIDE, SIDE).clone()


def smoothed(noise: Tensor) -> Tensor:
    """Return circular means over two columns of white noise: variance 1 / 2, correlation 1 / 2 with the neighbour."""
    return (noise + noise.roll(1, -1)) / 2


def test_a_draw_has_the_variance_at_each_level_and_the_correlations_of_what_was_lost() -> None:
    """Lost is (0.1 + 0.1 level) times a field of variance 1 whose neighbours in time correlate by 1 / 2."""
    smooth, generator = ramp(300), torch.Generator().manual_seed(0)
    field = smoothed(torch.randn(300, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)) * 2**0.5
    real = smooth + (0.1 + 0.1 * smooth) * field
    speckle = fit_speckle(real, smooth)
    assert speckle.deviations == pytest.approx(0.1 + 0.1 * speckle.levels, rel=0.05)
    angle = 2 * np.pi * np.arange(SIDE) / SIDE  # the spectrum is 1 + cos(frequency), one for all rows
    spectrum = speckle.gains.square().mean(0).numpy()
    assert spectrum[1:] == pytest.approx((1 + np.cos(angle))[1:], abs=0.06)  # at 0 the ramp is much stronger
    drawn = put_back(speckle, ramp(400), 5) - ramp(400)
    by_row = drawn.square().mean((0, 1, 3)).sqrt()
    assert by_row.numpy() == pytest.approx((0.1 + 0.1 * ramp(1))[0, 0, :, 0].numpy(), rel=0.06)
    unit = drawn / by_row[:, None]
    assert float((unit * unit.roll(1, -1)).mean()) == pytest.approx(0.5, abs=0.04)
    assert float((unit * unit.roll(2, -1)).mean()) == pytest.approx(0, abs=0.04)
    assert float((unit * unit.roll(1, -2)).mean()) == pytest.approx(0, abs=0.04)
    assert abs(float((drawn[:300] * (real - smooth)).mean())) < 3e-4  # nothing of a training window is in it


def test_texture_that_a_decoder_invents_is_not_added_again() -> None:
    """Windows have white noise of 0.2; reconstructions have noise of their own of 0.1, so that 0.2^2 - 0.1^2 lacks."""
    generator = torch.Generator().manual_seed(3)
    real, made = (
        deviation * torch.randn(200, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
        for deviation in (0.2, 0.1)
    )
    speckle = fit_speckle(real, made)
    assert speckle.deviations == pytest.approx((0.2**2 + speckle.levels**2) ** 0.5, rel=0.05)
    fresh = 0.1 * torch.randn(200, 1, SIDE, SIDE, generator=generator, dtype=torch.float64)
    assert float(put_back(speckle, fresh, 0).std()) == pytest.approx(0.2, rel=0.03)


def test_a_draw_depends_on_seed_and_place_and_stays_in_the_range() -> None:
    generator = torch.Generator().manual_seed(1)
    smooth = ramp(20)
    speckle = fit_speckle(smooth + 0.8 * torch.randn(smooth.shape, generator=generator), smooth)
    first, again, other = (put_back(speckle, smooth.float(), seed) for seed in (0, 0, 1))
    assert first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(put_back(speckle, smooth.float()[:3], 0), first[:3])
    assert not torch.equal(first[0] - smooth[0], first[1] - smooth[1])
    assert float(first.abs().max()) == 1


def test_where_nothing_was_lost_nothing_is_added() -> None:
    assert torch.equal(put_back(fit_speckle(ramp(4), ramp(4)), ramp(4), 0), ramp(4))


def test_reconstructions_are_those_of_the_tokenizer() -> None:
    folder = PROJECT / "models" / "fashion-mnist"
    config, weights = folder / "tokenizer.yaml", folder / "tokenizer.safetensors"
    pixels = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = load_autoencoder(load_tokenizer_config(config), weights)
    with torch.no_grad():
        colours = model.decode(model.encode(pixels.expand(3, 3, 32, 32)).mode())
    found = reconstructed(config, weights, pixels)
    torch.testing.assert_close(found, colours.mean(1, keepdim=True).clamp(-1, 1), atol=1e-4, rtol=0)
    assert float(found.std()) > 0.1
