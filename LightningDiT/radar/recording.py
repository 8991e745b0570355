"""A recording: passes of one person, what disturbs them, and the windows that are cut out of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from LightningDiT.radar.population import Pass, pass_of, passes_of, person_of, rng
from LightningDiT.radar.scatterers import scatterers
from LightningDiT.radar.sensor import Complex, Sensor, echo, spectrogram, without_clutter

NOISE = 0.04  # mean square of one chirp's noise, in square metres as a cross section at the nearest range
CLUTTER, CLUTTER_DRIFT = 3.0, 0.002  # amplitude of the still surroundings, and its change per dB of the gain's drift
LOST = 0.01  # share of windows inside a pass that the recording lacks


@dataclass(frozen=True)
class Cutting:
    """How windows are cut out of a spectrogram."""

    columns: int = 57
    stride: int = 14  # neighbours share 43 of 57 columns, 75 %

    def total(self, windows: int) -> int:
        """Return the columns that `windows` windows cover."""
        return self.columns + (windows - 1) * self.stride


@dataclass(frozen=True)
class Window:
    """One window of a recording."""

    number: int  # runs through the recording, with gaps at turns
    pass_: int
    index: int  # within the pass


def windows_of(seed: int, person: int, condition: int, windows: int, cutting: Cutting) -> list[Window]:
    """Return the windows of a recording in the order of their numbers.

    The running number counts strides of the whole recording. A turn takes 0.7 to 2 s, and every window that touches it
    is missing; a few others are lost too.
    """
    draw = rng("windows", seed, person, condition)
    found, number = [], int(draw.integers(1, 6))
    for pass_, count in enumerate(passes_of(seed, person, condition, windows)):
        lost = draw.uniform(size=count) < LOST  # before a window
        indices = np.arange(count) + np.cumsum(lost) - int(lost[0])
        found += [Window(number + int(index), pass_, int(index)) for index in indices]
        number += int(indices[-1]) + 1
        number += (cutting.columns + int(draw.integers(28, 80))) // cutting.stride
    return found


def disturbed(walk: Pass, sensor: Sensor, signal: Complex) -> Complex:
    """Return a pass with drift of the gain, noise, standing clutter and, in some recordings, interference."""
    seed, person, condition, _ = walk.seeds
    recording = rng("interference", seed, person, condition)
    rate = recording.uniform(0.2, 0.8) if recording.uniform() < 0.35 else 0.0  # bursts a second
    draw = rng("noise", *walk.seeds)
    times = np.arange(len(signal)) * sensor.chirp
    drift = draw.normal(0, 1.0) * np.sin(2 * np.pi * (times / draw.uniform(5, 15) + draw.uniform()))
    whole = signal * (10 ** (drift / 20)).astype(np.float32)
    whole += CLUTTER * np.exp(2j * np.pi * draw.uniform()) * (1 + CLUTTER_DRIFT * drift)
    level = np.full(len(signal), np.sqrt(NOISE / 2) * 10 ** (walk.strengths["noise"] / 20), np.float32)
    for _ in range(draw.poisson(rate * times[-1])):
        start, length = draw.uniform(0, times[-1]), draw.uniform(0.004, 0.06)
        level[(times >= start) & (times < start + length)] *= 10 ** (draw.uniform(8, 22) / 20)
    noise = draw.standard_normal((2, len(signal)), dtype=np.float32) * level
    return without_clutter((whole + noise[0] + 1j * noise[1]).astype(np.complex64))


def pass_spectrogram(walk: Pass, sensor: Sensor, columns: int) -> NDArray[np.float32]:
    """Return the spectrogram (rows, columns) of a pass in dB over the mean noise."""
    chirps = sensor.chirps(columns)
    signal = disturbed(walk, sensor, echo(sensor, *scatterers(walk, sensor, chirps), chirps))
    signal = signal if walk.away else signal.conj()  # which turns the picture over
    return spectrogram(sensor, signal / np.float32(np.sqrt(NOISE)))


def recording(
    seed: int, person: int, condition: int, windows: int, sensor: Sensor, cutting: Cutting
) -> Iterator[tuple[Window, NDArray[np.float32]]]:
    """Yield the windows of a recording with their pictures (rows, columns) in dB over the mean noise."""
    walker = person_of(seed, person)
    found = windows_of(seed, person, condition, windows, cutting)
    for number in range(found[-1].pass_ + 1):
        own = [window for window in found if window.pass_ == number]
        walk = pass_of(seed, walker, condition, number)
        image = pass_spectrogram(walk, sensor, cutting.total(own[-1].index + 1))
        for window in own:
            first = window.index * cutting.stride
            yield window, image[:, first : first + cutting.columns]
