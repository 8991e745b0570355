"""The radar against 2 v / wavelength, Parseval's theorem and cross sections known in closed form."""

from __future__ import annotations

import numpy as np
import pytest

from LightningDiT.radar.scatterers import ellipsoid_section
from LightningDiT.radar.sensor import (
    Sensor,
    blackman,
    echo,
    path_times,
    range_gate,
    spectrogram,
    stft_power,
    without_clutter,
)

SENSOR = Sensor()


def test_wavelength_cells_and_speeds_are_those_of_the_sensor() -> None:
    assert SENSOR.wavelength == pytest.approx(3.8683e-3, abs=1e-7)
    assert SENSOR.range_cell == pytest.approx(0.07495, abs=1e-5)
    assert SENSOR.speed_step * SENSOR.window / 2 == pytest.approx(10.18, abs=0.01)  # half a turn a chirp
    assert SENSOR.column_seconds == pytest.approx(0.025, abs=5e-5)
    assert SENSOR.row_of(1.39) == pytest.approx(163, abs=0.1)  # where the trunk lies in real recordings


@pytest.mark.parametrize("speed", [-4.0, -1.4, 0.5, 1.39, 4.9])
def test_a_point_lies_at_two_speeds_over_the_wavelength(speed: float) -> None:
    chirps = SENSOR.chirps(20)
    ranges = 5.0 + speed * path_times(SENSOR, chirps)[None]
    signal = echo(SENSOR, ranges, np.ones((1, ranges.shape[1] - 1), np.complex64), chirps)
    turns = np.diff(np.unwrap(np.angle(signal.astype(complex)))) / (2 * np.pi * SENSOR.chirp)
    np.testing.assert_allclose(turns, -2 * speed / SENSOR.wavelength, atol=2)  # Hz
    peaks = spectrogram(SENSOR, signal).argmax(0)
    assert np.abs(peaks - SENSOR.row_of(speed)).max() <= 0.51


def test_the_echo_is_the_sum_of_its_points() -> None:
    chirps = SENSOR.chirps(3)
    times, every = path_times(SENSOR, chirps), np.arange(chirps) * SENSOR.chirp
    paths = [lambda t: 4 + 1.2 * t, lambda t: 4.3 + 0.9 * t + 2 * t**2]
    amplitudes = np.array([[1.0], [0.5j]], np.complex64).repeat(len(times) - 1, 1)
    found = echo(SENSOR, np.stack([path(times) for path in paths]), amplitudes, chirps)
    phasors = [np.exp(-4j * np.pi * path(every) / SENSOR.wavelength) for path in paths]
    exact = phasors[0] + 0.5j * phasors[1]
    np.testing.assert_allclose(found, exact, atol=2e-3)


def test_a_column_has_the_energy_of_its_chirps() -> None:
    """Parseval: the sum of |X|^2 is the window's length times the sum of |w x|^2."""
    draw = np.random.default_rng(0)
    signal = (draw.normal(size=(2, SENSOR.chirps(6))) * [[1], [1j]]).sum(0).astype(np.complex64)
    power, taper = stft_power(SENSOR, signal), blackman(SENSOR.window)
    for column in range(6):
        chunk = signal[column * SENSOR.hop : column * SENSOR.hop + SENSOR.window]
        energy = (np.abs(taper * chunk) ** 2).sum()
        assert power[:, column].sum() == pytest.approx(SENSOR.window * energy / (taper**2).sum(), rel=1e-4)


def test_noise_of_variance_one_lies_at_0_db() -> None:
    draw = np.random.default_rng(1)
    noise = (draw.normal(size=(2, SENSOR.chirps(400))) * [[1], [1j]]).sum(0) / np.sqrt(2)
    decibels = spectrogram(SENSOR, noise.astype(np.complex64))
    assert decibels.shape == (256, 400)
    assert 10 * np.log10((10 ** (decibels / 10)).mean()) == pytest.approx(0, abs=0.1)


def test_what_stands_still_is_removed() -> None:
    moving = np.exp(2j * np.pi * np.arange(1000) / 10)
    np.testing.assert_allclose(without_clutter(moving + 30 - 4j), moving, atol=1e-9)


def test_the_gate_takes_the_middle_and_nothing_farther_than_its_cells() -> None:
    offsets = np.array([-0.6, 0.0, 0.15, 0.41, 0.6])
    found = range_gate(SENSOR, offsets)
    assert found[1] == pytest.approx(
        np.sqrt(1 + 2 * (0.25 / 0.42) ** 2 + 2 * (0.04 / 0.42) ** 2)
    )  # Blackman's main lobe
    assert found[1] > found[2] > found[3]
    assert found[[0, 4]].max() < 1e-6


def test_cross_sections_of_ellipsoids() -> None:
    """A sphere has pi r^2 from all sides; an ellipsoid pi a^4 / c^2 at its tip and pi c^2 at its side."""
    cosine = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(ellipsoid_section(0.3, np.full(9, 0.3), cosine), np.pi * 0.09)
    tip, side = ellipsoid_section(0.1, np.array([0.4, 0.4]), np.array([1.0, 0.0]))
    assert (tip, side) == (pytest.approx(np.pi * 0.1**4 / 0.4**2), pytest.approx(np.pi * 0.4**2))
