"""Further draws of a window of levels: shifted in time, louder or softer, noisier, faster or slower. Never a mirror.

A mirrored window shows a walk that goes backwards in time, or away from the radar, so there is none here. Draw 0 of a
window is the window itself. Each draw has a vector that tells a network what was done (non-leaking augmentation, Karras
et al., arXiv 2006.06676 and 2206.00364, appendix F.2): all zeros for draw 0, so that samples are asked for without any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.arrays import Levels

#: The values of the vector: sin and 1 - cos of the shift as an angle, the others as shares of their limits.
NAMES = ("shift_sin", "shift_1-cos", "gain", "noise", "doppler")
KINDS = ("shift", "gain", "noise", "doppler")
ASSUMED_SPAN = 45.0  # dB from level 0 to 1 where the range of the levels is unknown
FLOOR = 20.0  # percentile of a window that counts as its noise floor
MOST_DB, MOST_SCALE = 40.0, 0.5  # limits of the limits
FIX = "python -m LightningDiT.extract_features --help"
EXAMPLE = "shift,gain=6,noise=6,doppler=0.05"

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Augmentation:
    """What draws may change, and by how much at most.

    Attributes:
        shift: circular, by any whole number of columns.
        gain: dB up or down; 0: off. Up at most as far as the largest value stays in the range; down, values end at
            the low end of the range as they do in the window itself.
        noise: dB by which the noise floor rises; 0: off.
        doppler: share by which velocities become larger or smaller; 0: off.
        zero_doppler: row of velocity zero, from 0; None: the middle.
    """

    shift: bool = True
    gain: float = 6.0
    noise: float = 6.0
    doppler: float = 0.05
    zero_doppler: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As plain values, for a manifest."""
        return asdict(self)

    @property
    def text(self) -> str:
        """In words."""
        words = ["circular shift in time"] if self.shift else []
        words += [f"gain up to {self.gain:g} dB"] if self.gain else []
        words += [f"noise floor up to {self.noise:g} dB higher"] if self.noise else []
        words += [f"velocities up to {100 * self.doppler:g} % other"] if self.doppler else []
        return ", ".join(words)


def parsed(text: str, zero_doppler: float | None = None) -> Augmentation:
    """Return the augmentation of a text such as `EXAMPLE`; kinds that it does not name are off.

    Raises:
        LightningDiTError: another text.
    """
    usual = asdict(Augmentation())
    chosen: dict[str, Any] = {"shift": False, "gain": 0.0, "noise": 0.0, "doppler": 0.0}
    for part in text.split(","):
        kind, _, amount = part.strip().partition("=")
        if kind not in KINDS or (kind == "shift" and amount):
            raise LightningDiTError(f"{part.strip()!r} is no kind of augmentation; {EXAMPLE} names all", FIX)
        limit = MOST_SCALE if kind == "doppler" else MOST_DB
        try:
            value = float(amount or usual[kind])
        except ValueError:
            value = math.nan
        if not 0 < value <= limit:
            raise LightningDiTError(
                f"{part.strip()} is given; a number above 0 and up to {limit:g} is expected, as in {EXAMPLE}", FIX
            )
        chosen[kind] = True if kind == "shift" else value
    return Augmentation(**chosen, zero_doppler=zero_doppler)


def augmented(
    levels: Levels, settings: Augmentation, span: float, seed: int, window: int, draw: int
) -> tuple[Levels, Vector]:
    """Return draw `draw` of a window and the vector that tells it, from (seed, window, draw) alone.

    Args:
        levels: (H, W) in 0 to 1, Doppler down and time across.
        span: dB from level 0 to level 1.
        window: its row in the split.
    """
    if draw == 0:
        return levels, np.zeros(len(NAMES), np.float32)
    rng = np.random.default_rng([seed, window, draw])
    columns, (up, rise, faster) = int(rng.integers(levels.shape[1])), rng.random(3)
    grains = rng.exponential(size=levels.shape)  # power of complex Gaussian noise of mean 1
    columns *= settings.shift
    scale = (1 + settings.doppler) ** (2 * faster - 1)
    changed = shifted(scaled(levels, scale, settings.zero_doppler), columns)
    rise *= settings.noise
    if rise:
        floor = float(np.percentile(changed, FLOOR)) * span  # dB above the low end
        changed = with_noise(changed, grains * 10 ** (floor / 10) * (10 ** (rise / 10) - 1), span)
    highest = min(settings.gain, span * (1 - float(changed.max()))) if settings.gain else 0.0
    gain = up * (highest + settings.gain) - settings.gain
    return amplified(changed, gain, span), vector(settings, columns / levels.shape[1], gain, rise, scale)


def vector(settings: Augmentation, shift: float, gain: float, noise: float, scale: float) -> Vector:
    """Return the values (A,) of `NAMES`.

    Args:
        shift: share of the window; gain and noise: dB; scale: factor on velocities.
    """
    angle = 2 * math.pi * shift
    values = (
        math.sin(angle),
        1 - math.cos(angle),
        gain / settings.gain if settings.gain else 0.0,
        noise / settings.noise if settings.noise else 0.0,
        math.log(scale) / math.log1p(settings.doppler) if settings.doppler else 0.0,
    )
    return np.array(values, np.float32)


def shifted(levels: Levels, columns: int) -> Levels:
    """Return levels moved to the right by `columns`; those that leave come in again on the left."""
    return np.roll(levels, columns, axis=1)


def amplified(levels: Levels, gain: float, span: float) -> Levels:
    """Return levels with `gain` dB more."""
    return np.clip(levels + np.float32(gain / span), 0, 1)


def with_noise(levels: Levels, power: NDArray[np.float64], span: float) -> Levels:
    """Return levels to whose linear power `power` is added, in units of the power at level 0; not limited to 1."""
    whole = 10 ** (levels.astype(np.float64) * span / 10) + power
    return (10 * np.log10(whole) / span).astype(np.float32)


def scaled(levels: Levels, scale: float, zero_doppler: float | None = None) -> Levels:
    """Return levels whose velocities are `scale` times as high: row r comes from row z + (r - z) / scale.

    Between rows by cubic convolution (Keys 1981, a = -1/2), which keeps more of the grain than straight lines do. The
    outermost rows stand for those beyond.
    """
    if scale == 1:
        return levels
    height = len(levels)
    zero = (height - 1) / 2 if zero_doppler is None else zero_doppler
    source = np.clip(zero + (np.arange(height) - zero) / scale, 0, height - 1)
    below = np.floor(source).astype(np.intp)
    rows = [np.clip(below + at, 0, height - 1) for at in (-1, 0, 1, 2)]
    weights = _keys((source - below).astype(np.float32))
    total = sum(weight[:, None] * levels[row] for weight, row in zip(weights, rows, strict=True))
    return np.clip(total, levels.min(), levels.max())


def _keys(share: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
    """Return the weights of the four rows around a place that lies `share` after the second."""
    square, cube = share**2, share**3
    return (
        (-share + 2 * square - cube) / 2,
        (2 - 5 * square + 3 * cube) / 2,
        (share + 4 * square - 3 * cube) / 2,
        (cube - square) / 2,
    )
