"""The radar: a chirp sequence at 77.5 GHz, its phase history of moving points, and the spectrogram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[np.float64]
Complex = NDArray[np.complex64]
LIGHT = 299_792_458.0  # m/s
HELD = 8  # chirps between two points of a path; the phase between them is linear


@dataclass(frozen=True)
class Sensor:
    """A frequency-modulated continuous-wave radar and its short-time Fourier transform (STFT)."""

    carrier: float = 77.5e9  # Hz
    bandwidth: float = 2e9  # Hz
    chirp: float = 95e-6  # seconds from one chirp to the next
    window: int = 512  # chirps of the STFT's Blackman window
    hop: int = 263  # chirps from column to column: one frame of 25 ms
    rows: int = 256  # the middle ones of `window` that are kept
    cells: int = 5  # range cells that are summed, around the trunk's

    @property
    def wavelength(self) -> float:
        return LIGHT / self.carrier

    @property
    def range_cell(self) -> float:
        """Return the depth of a range cell in metres."""
        return LIGHT / (2 * self.bandwidth)

    @property
    def speed_step(self) -> float:
        """Return the difference in radial speed of two rows in m/s."""
        return self.wavelength / (2 * self.chirp * self.window)

    @property
    def column_seconds(self) -> float:
        return self.hop * self.chirp

    def chirps(self, columns: int) -> int:
        """Return the number of chirps that `columns` columns need."""
        return self.window + (columns - 1) * self.hop

    def row_of(self, speed: float) -> float:
        """Return the row of a radial speed in m/s: row `rows / 2` is none, rows below it are positive ones."""
        return self.rows / 2 + speed / self.speed_step


def path_times(sensor: Sensor, chirps: int) -> Array:
    """Return the times (K,) in seconds at which `echo` needs the ranges: every eighth chirp."""
    return np.arange(-(-chirps // HELD) + 1) * HELD * sensor.chirp


def echo(sensor: Sensor, ranges: Array, amplitudes: Complex, chirps: int) -> Complex:
    """Return the sum of the echoes of P points in one range gate, a complex number a chirp.

    A point at the range R has the phase -4 pi R / wavelength. Its motion during a chirp (2 mm at most) is left out.

    Args:
        ranges: (P, K) metres at `path_times`.
        amplitudes: (P, K - 1) for the eight chirps from each of these times on.
    """
    whole = np.zeros((ranges.shape[1] - 1, HELD), np.complex64)
    part = np.arange(HELD) / HELD
    for path, amplitude in zip(-2 * ranges / sensor.wavelength, amplitudes, strict=True):
        cycles = path[:-1, None] + np.diff(path)[:, None] * part
        angle = (2 * np.pi * (cycles - np.round(cycles))).astype(np.float32)
        whole.real += amplitude.real[:, None] * np.cos(angle) - amplitude.imag[:, None] * np.sin(angle)
        whole.imag += amplitude.real[:, None] * np.sin(angle) + amplitude.imag[:, None] * np.cos(angle)
    return whole.reshape(-1)[:chirps]


def range_gate(sensor: Sensor, offsets: Array) -> Array:
    """Return the amplitude at which points count that lie `offsets` metres behind the middle of the summed cells.

    The response of one cell is that of a Blackman window over the chirp's samples, up to its first zeros.
    """
    at = np.linspace(-4 - sensor.cells / 2, 4 + sensor.cells / 2, 64 * (8 + sensor.cells) + 1)  # cells
    x = at[:, None] - (np.arange(sensor.cells) - (sensor.cells - 1) / 2)
    response = 0.42 * np.sinc(x) + 0.25 * (np.sinc(x - 1) + np.sinc(x + 1)) + 0.04 * (np.sinc(x - 2) + np.sinc(x + 2))
    power = (np.where(np.abs(x) < 3, response / 0.42, 0.0) ** 2).sum(1)
    return np.interp(offsets / sensor.range_cell, at, np.sqrt(power))


def without_clutter(signal: Complex) -> Complex:
    """Return a signal without what stands still: its mean over all chirps."""
    return signal - signal.mean()


def blackman(length: int) -> Array:
    """Return the periodic Blackman window."""
    turn = 2 * np.pi * np.arange(length) / length
    return 0.42 - 0.5 * np.cos(turn) + 0.08 * np.cos(2 * turn)


def stft_power(sensor: Sensor, signal: Complex) -> NDArray[np.float32]:
    """Return the power (window, T) of the STFT of all chirps; row `window / 2` has no Doppler shift.

    White noise of variance 1 has the mean 1: the sum over a column is the energy of the windowed chirps, times the
    window's length, over the window's energy (Parseval).
    """
    taper = blackman(sensor.window)
    frames = sliding_window_view(signal, sensor.window)[:: sensor.hop] * taper.astype(np.float32)
    spectrum = np.fft.fftshift(np.fft.fft(frames, axis=1), axes=1)
    return (np.abs(spectrum) ** 2 / (taper**2).sum()).T.astype(np.float32)


def spectrogram(sensor: Sensor, signal: Complex) -> NDArray[np.float32]:
    """Return the middle rows (rows, T) of `stft_power` in dB over noise of variance 1, receding speeds at the bottom.

    An echo that recedes has a falling phase, so the transform's rows are turned over.
    """
    power = np.roll(stft_power(sensor, signal)[::-1], 1, axis=0)
    first = (sensor.window - sensor.rows) // 2
    return 10 * np.log10(np.maximum(power[first : first + sensor.rows], 1e-12))
