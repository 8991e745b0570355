"""What neighbouring windows share, measured from their pixels, and where a walking pass ends."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from LightningDiT.radar.arrays import Levels
from LightningDiT.radar.layouts import Window

Curve = NDArray[np.float64]
ROWS = 64  # of a window that are compared
PAIRS = 24  # of windows, for each distance in number
FARTHEST = 12  # steps of the running number at which windows are compared
SHORTEST = 0.125  # of a window: the part that two windows must share to be compared
#: Share of a window that two windows may have in common and count as apart; the ends of both hold it.
TOUCHING = 0.04
#: What the correlation of neighbours must exceed, itself and above that of windows of different recordings.
CLEAR, ABOVE = 0.2, 0.1

Read = Callable[[Window], "Levels | None"]


@dataclass(frozen=True)
class Overlap:
    """How the windows of a recording follow one another.

    Attributes:
        length: of a window, in pixels of the time axis.
        unit: the step of the running numbers.
        stride: pixels between windows whose numbers are one unit apart; None if their pixels show no overlap.
        backwards: whether time runs to the left.
        correlations: by distance in units, of high-passed windows at the shift that belongs to it.
        control: largest mean correlation of windows of different recordings, at any shift.
        threshold: correlation of a single pair from which on it shows an overlap.
    """

    length: int
    unit: int
    stride: float | None = None
    backwards: bool = False
    correlations: Mapping[int, float] = field(default_factory=dict)
    control: float = 0.0
    threshold: float = 1.0

    @property
    def reach(self) -> int:
        """The largest distance in units at which two windows share pixels; 0 if neighbours share none."""
        if self.stride is None:
            return 0
        return max(0, math.ceil((1 - TOUCHING) * self.length / self.stride) - 1)

    def shares(self, first: int, second: int) -> bool:
        """Return whether windows with these running numbers of one recording share pixels."""
        return abs(first - second) <= self.reach * self.unit


def high_passed(levels: Levels) -> NDArray[np.float32]:
    """Return levels without what changes slowly, the mean over a sixteenth of each side; at most 2 `ROWS` rows."""
    return (levels - _box(_box(levels, 0), 1))[:: max(1, len(levels) // ROWS)]


def _box(levels: Levels, axis: int) -> NDArray[np.float32]:
    half = max(1, levels.shape[axis] // 32)
    pad = [(half + 1, half) if at == axis else (0, 0) for at in (0, 1)]
    sums = np.cumsum(np.pad(levels, pad, mode="edge"), axis=axis, dtype=np.float64)
    size, length = 2 * half + 1, levels.shape[axis]
    upper, lower = (np.take(sums, range(start, start + length), axis) for start in (size, 0))
    return ((upper - lower) / size).astype(np.float32)


def shift_curve(first: NDArray[np.float32], second: NDArray[np.float32]) -> Curve:
    """Return the correlation of `first` from column s on with the begin of `second`, for each shift s.

    Both are high-passed, (H, W). The curve ends where they share `SHORTEST` of a window.
    """
    width = first.shape[1]
    size = 2 ** math.ceil(math.log2(2 * width))
    spectrum = np.fft.rfft(first, size) * np.fft.rfft(second, size).conj()
    products = np.fft.irfft(spectrum.sum(0), size)[:width]
    energy_first = np.cumsum((first**2).sum(0)[::-1])[::-1]  # from column s to the end
    energy_second = np.cumsum((second**2).sum(0))[::-1]  # of the first W - s columns
    curve = products / np.sqrt(np.maximum(energy_first * energy_second, 1e-12))
    return curve[: width - max(1, int(SHORTEST * width))]


def number_unit(groups: Mapping[object, Sequence[Window]]) -> int:
    """Return the greatest step that all running numbers within recordings are multiples of."""
    steps = {b.number - a.number for members in groups.values() for a, b in itertools.pairwise(members)}
    return math.gcd(*steps) or 1


def grouped(windows: Sequence[Window]) -> dict[object, list[Window]]:
    """Return windows by recording, sorted by number."""
    groups: dict[object, list[Window]] = defaultdict(list)
    for window in windows:
        groups[window.group].append(window)
    for members in groups.values():
        members.sort(key=lambda window: window.number)
    return dict(groups)


def measure(windows: Sequence[Window], length: int, read: Read, seed: int = 0) -> Overlap:
    """Return how windows overlap, measured from at most `PAIRS` pairs at each distance.

    Args:
        windows: of one size.
        length: of that size, the pixels of the time axis.
        read: returns the levels of a window, None if it cannot be read.
    """
    rng = np.random.default_rng(seed)
    groups = grouped(windows)
    unit = number_unit(groups)
    curves = _curves(groups, unit, read, rng)
    control = _control(groups, read, rng)
    highest = float(control.mean(0).max()) if len(control) else 0.0
    best = (-1.0, 0.0, False)
    for backwards in (False, True):
        means = {distance: pairs[int(backwards)].mean(0) for distance, pairs in curves.items()}
        weights = {distance: len(pairs[0]) for distance, pairs in curves.items()}
        for stride in np.arange(1.0, (1 - SHORTEST) * length, 0.25):
            score = _joint(means, weights, stride)
            best = max(best, (score, float(stride), backwards))
    score, stride, backwards = best
    if score < max(CLEAR, highest + ABOVE):
        return Overlap(length, unit, control=highest)
    pairs = {distance: found[int(backwards)] for distance, found in curves.items()}
    known = {at: float(found.mean(0)[_place(at, stride)]) for at, found in pairs.items() if _fits(at, stride, found)}
    beyond = {at: float(found.mean(0).max()) for at, found in pairs.items() if not _fits(at, stride, found)}
    singles = [row[_place(at, stride)] for at in known for row in pairs[at]]
    # a pair of unknown distance is compared at all shifts, as those of different recordings are
    chance = float(np.quantile(control.max(1), 0.95)) if len(control) else 0.0
    threshold = (float(np.median(singles)) + chance) / 2
    nearest_beyond = {at: beyond[at] for at in sorted(beyond)[:1]}
    return Overlap(length, unit, stride, backwards, known | nearest_beyond, highest, max(threshold, chance))


def _place(distance: int, stride: float) -> int:
    return round(distance * stride)


def _fits(distance: int, stride: float, curves: Curve) -> bool:
    return _place(distance, stride) < curves.shape[1]


def _joint(means: Mapping[int, Curve], weights: Mapping[int, int], stride: float) -> float:
    """Return the mean correlation of all distances at the shifts that belong to a stride."""
    sums, count = 0.0, 0
    for distance, curve in means.items():
        place = round(distance * stride)
        if place < len(curve):
            sums, count = sums + weights[distance] * curve[place], count + weights[distance]
    return sums / count if count else -1.0


def _curves(
    groups: Mapping[object, Sequence[Window]], unit: int, read: Read, rng: np.random.Generator
) -> dict[int, tuple[Curve, Curve]]:
    """Return shift curves, forwards and backwards, of pairs at each distance in units."""
    candidates: dict[int, list[tuple[Window, Window]]] = defaultdict(list)
    for members in groups.values():
        for at, first in enumerate(members):
            for second in members[at + 1 : at + 1 + FARTHEST]:
                distance = (second.number - first.number) // unit
                if 0 < distance <= FARTHEST:
                    candidates[distance].append((first, second))
    found = {}
    for distance in sorted(candidates):
        pairs = candidates[distance]
        chosen = [pairs[at] for at in rng.permutation(len(pairs))[:PAIRS]]
        read_pairs = [(a, b) for a, b in ((read(x), read(y)) for x, y in chosen) if a is not None and b is not None]
        if read_pairs:
            passed = [(high_passed(a), high_passed(b)) for a, b in read_pairs]
            forwards = np.array([shift_curve(a, b) for a, b in passed])
            found[distance] = forwards, np.array([shift_curve(b, a) for a, b in passed])
    return found


def _control(groups: Mapping[object, Sequence[Window]], read: Read, rng: np.random.Generator) -> Curve:
    """Return shift curves (N, S) of windows of different recordings, or, in a single one, far from each other."""
    members = list(groups.values())
    curves = []
    for _ in range(PAIRS):
        if len(members) > 1:
            first, second = (members[at][rng.integers(len(members[at]))] for at in rng.choice(len(members), 2, False))
        elif len(members[0]) > 4 * FARTHEST:
            start = int(rng.integers(len(members[0]) - 3 * FARTHEST))
            first, second = members[0][start], members[0][start + 3 * FARTHEST - 1]
        else:
            break
        levels = read(first), read(second)
        if levels[0] is not None and levels[1] is not None:
            curves.append(shift_curve(high_passed(levels[0]), high_passed(levels[1])))
    return np.array(curves)


@dataclass(frozen=True)
class Passes:
    """The walking passes of a data set.

    Attributes:
        numbers: pass of each window, by its name; counted from 1 for each person.
        joined: gaps in the running numbers across which the pixels overlap all the same.
        small: gaps in the running numbers that windows reach over.
    """

    numbers: dict[str, int]
    joined: int
    small: int


def find_passes(windows: Sequence[Window], overlap: Overlap, read: Read) -> Passes:
    """Return the passes: a recording is cut where the number jumps further than windows reach.

    Windows on both sides of such a gap are compared too; where they share pixels it is no boundary.
    """
    numbers: dict[str, int] = {}
    counts: dict[str, int] = defaultdict(int)
    joined = small = 0
    for members in grouped(windows).values():
        counts[members[0].person] += 1
        numbers[members[0].name] = counts[members[0].person]
        for before, window in itertools.pairwise(members):
            steps = (window.number - before.number) // overlap.unit
            if steps > max(1, overlap.reach):
                if overlap.stride is not None and _overlapping(before, window, overlap, read):
                    joined += 1
                else:
                    counts[window.person] += 1
            elif steps > 1:
                small += 1
            numbers[window.name] = counts[window.person]
    return Passes(numbers, joined, small)


def _overlapping(before: Window, window: Window, overlap: Overlap, read: Read) -> bool:
    first, second = read(before), read(window)
    if first is None or second is None or first.shape != second.shape:
        return False
    pair = (second, first) if overlap.backwards else (first, second)
    curve = shift_curve(high_passed(pair[0]), high_passed(pair[1]))
    return bool(curve[: round(0.75 * first.shape[1])].max() > overlap.threshold)


# ---- splits


def leaked(parts: Sequence[str], windows: Sequence[Window], overlap: Overlap) -> tuple[int, int]:
    """Return how many test windows share pixels with a training window, and how many test windows there are.

    Args:
        parts: training, validation, test or another text, of each window.
    """
    training: dict[object, list[int]] = defaultdict(list)
    for part, window in zip(parts, windows, strict=True):
        if part == "training":
            training[window.group].append(window.number)
    ordered = {group: np.sort(numbers) for group, numbers in training.items()}
    tested = [window for part, window in zip(parts, windows, strict=True) if part == "test"]
    reach, count = overlap.reach * overlap.unit, 0
    for window in tested:
        numbers = ordered.get(window.group, np.empty(0))
        at = int(np.searchsorted(numbers, window.number - reach))
        count += at < len(numbers) and numbers[at] <= window.number + reach
    return count, len(tested)


def random_leak(windows: Sequence[Window], overlap: Overlap, share: float, seed: int = 0, draws: int = 10) -> float:
    """Return the mean share of test windows that share pixels with a training window if windows are drawn at random.

    Args:
        share: of the windows that are for training.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        order = rng.permutation(len(windows))
        parts = np.full(len(windows), "test", dtype=object)
        parts[order[: round(share * len(windows))]] = "training"
        count, total = leaked(list(parts), windows, overlap)
        found.append(count / max(total, 1))
    return float(np.mean(found))
