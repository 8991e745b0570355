"""What neighbouring windows share, measured from their pixels, and where a walking pass ends."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from LightningDiT.data.labels import natural_key
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
ACROSS, OFTEN = 12, 0.25  # pairs of two conditions that are compared, and the share of them that tells of one recording

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
        pairs: that were compared; 0 if no two windows of a recording follow one another.
    """

    length: int
    unit: int
    stride: float | None = None
    backwards: bool = False
    correlations: Mapping[int, float] = field(default_factory=dict)
    control: float = 0.0
    threshold: float = 1.0
    pairs: int = 0

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
    count = sum(len(pairs[0]) for pairs in curves.values())
    if score < max(CLEAR, highest + ABOVE):
        return Overlap(length, unit, control=highest, pairs=count)
    pairs = {distance: found[int(backwards)] for distance, found in curves.items()}
    known = {at: float(found.mean(0)[_place(at, stride)]) for at, found in pairs.items() if _fits(at, stride, found)}
    beyond = {at: float(found.mean(0).max()) for at, found in pairs.items() if not _fits(at, stride, found)}
    singles = [row[_place(at, stride)] for at in known for row in pairs[at]]
    # a pair of unknown distance is compared at all shifts, as those of different recordings are
    chance = float(np.quantile(control.max(1), 0.95)) if len(control) else 0.0
    threshold = (float(np.median(singles)) + chance) / 2
    nearest_beyond = {at: beyond[at] for at in sorted(beyond)[:1]}
    return Overlap(length, unit, stride, backwards, known | nearest_beyond, highest, max(threshold, chance), count)


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
    pair = (window, before) if overlap.backwards else (before, window)
    return _peak(*pair, read) > overlap.threshold


def _peak(first: Window, second: Window, read: Read) -> float:
    """Return the largest correlation of `first` with a later `second` that share a quarter at least, -1 if unknown."""
    one, other = read(first), read(second)
    if one is None or other is None or one.shape != other.shape:
        return -1.0
    return float(shift_curve(high_passed(one), high_passed(other))[: round(0.75 * one.shape[1])].max())


def places(numbers: Sequence[int], passes: Sequence[object], overlap: Overlap) -> list[int]:
    """Return where windows of a recording stand: their running numbers without the gaps that pixels bridge.

    Such a gap is larger than windows reach and lies within a pass, see `find_passes`. How far its sides are apart is
    unknown, so they count as neighbours.

    Args:
        numbers: sorted.
        passes: of the windows.
    """
    found, closed = list(numbers[:1]), 0
    for at in range(1, len(numbers)):
        if passes[at] == passes[at - 1] and not overlap.shares(numbers[at - 1], numbers[at]):
            closed += numbers[at] - numbers[at - 1] - overlap.unit
        found.append(numbers[at] - closed)
    return found


# ---- recordings and conditions that are none


@dataclass(frozen=True)
class Shared:
    """Two conditions, or the recordings of one, between which windows of a person share pixels.

    Attributes:
        conditions: the two; the same one twice for its recordings.
        found, compared: pairs of windows.
        first, second: names of such a pair.
    """

    conditions: tuple[str, str]
    found: int
    compared: int
    first: str
    second: str


def shared_across(windows: Sequence[Window], overlap: Overlap, read: Read, seed: int = 0) -> list[Shared]:
    """Return where windows share pixels whose conditions or recordings say that they do not.

    A folder of a random split that is taken for a condition, a number in the name that is taken for a recording, and
    copies of windows in other colours show here. The next windows on both sides are compared.
    """
    rng = np.random.default_rng(seed)
    candidates = _across(windows, overlap)
    if not candidates:
        return []
    bound = max(2 * CLEAR, overlap.threshold if overlap.stride is not None else 0.0, _chance(windows, read, rng))
    shared = []
    for conditions, pairs in candidates.items():
        chosen = [pairs[at] for at in rng.permutation(len(pairs))[:ACROSS]]
        found = [(a, b) for a, b in chosen if max(_peak(a, b, read), _peak(b, a, read)) > bound]
        if len(found) > 1 and len(found) >= OFTEN * len(chosen):
            shared.append(Shared(conditions, len(found), len(chosen), found[0][0].name, found[0][1].name))
    return shared


def _chance(windows: Sequence[Window], read: Read, rng: np.random.Generator) -> float:
    """Return what the correlation of a pair must exceed: `ABOVE` that of any `PAIRS` pairs of different people."""
    people: dict[str, list[Window]] = defaultdict(list)
    for window in windows:
        people[window.person].append(window)
    if len(people) < 2:
        return 0.0
    members = list(people.values())
    drawn = (rng.choice(len(members), 2, False) for _ in range(PAIRS))
    pairs = [tuple(members[at][rng.integers(len(members[at]))] for at in two) for two in drawn]
    return max(_peak(first, second, read) for first, second in pairs) + ABOVE


def _across(windows: Sequence[Window], overlap: Overlap) -> dict[tuple[str, str], list[tuple[Window, Window]]]:
    """Return pairs of windows that would be neighbours if conditions, or recordings, were no others."""
    recordings: dict[tuple[str, str], dict[str, list[Window]]] = defaultdict(dict)
    for members in grouped(windows).values():
        recordings[members[0].person, members[0].condition][members[0].recording] = members
    found: dict[tuple[str, str], list[tuple[Window, Window]]] = defaultdict(list)
    conditions: dict[str, list[str]] = defaultdict(list)
    for (person, condition), own in recordings.items():
        conditions[person].append(condition)
        for before, after in itertools.pairwise(sorted(own, key=natural_key)):
            found[condition, condition] += {
                (own[before][-1], own[after][0]),
                *_nearest(own[before], own[after], overlap)[:1],
            }
    for person, names in conditions.items():
        for one, other in itertools.combinations(sorted(names), 2):
            first, second = recordings[person, one], recordings[person, other]
            for name in first.keys() & second.keys():
                found[one, other] += _nearest(first[name], second[name], overlap)
    return {key: pairs for key, pairs in found.items() if pairs}


def _nearest(ours: Sequence[Window], theirs: Sequence[Window], overlap: Overlap) -> list[tuple[Window, Window]]:
    """Return pairs of windows of two recordings whose numbers are near, the nearest first."""
    numbers = np.array([window.number for window in theirs])
    pairs = [(window, theirs[int(np.abs(numbers - window.number).argmin())]) for window in ours]
    near = [pair for pair in pairs if abs(pair[0].number - pair[1].number) <= FARTHEST * overlap.unit]
    return sorted(near, key=lambda pair: abs(pair[0].number - pair[1].number))


# ---- splits


def leaked(
    parts: Sequence[str], windows: Sequence[Window], overlap: Overlap, passes: Passes | None = None
) -> tuple[int, int]:
    """Return how many test windows share pixels with a training window, and how many test windows there are.

    Args:
        parts: training, validation, test or another text, of each window.
        passes: by which gaps in the running numbers count that pixels bridge.
    """
    groups: dict[object, list[tuple[int, str, str]]] = defaultdict(list)
    for part, window in zip(parts, windows, strict=True):
        groups[window.group].append((window.number, window.name, part))
    reach, count, total = overlap.reach * overlap.unit, 0, 0
    for members in groups.values():
        members.sort()
        numbers = [number for number, _, _ in members]
        if passes:  # a copy that was left out is in the pass of the window before it
            own = itertools.accumulate((passes.numbers.get(name, 0) for _, name, _ in members), lambda a, b: b or a)
            numbers = places(numbers, list(own), overlap)
        training, tested = (
            np.array([at for at, (_, _, one) in zip(numbers, members, strict=True) if one == part], np.int64)
            for part in ("training", "test")
        )
        next_one = np.append(training, np.iinfo(np.int64).max)[np.searchsorted(training, tested - reach)]
        count, total = count + int((next_one <= tested + reach).sum()), total + len(tested)
    return count, total


def random_leak(
    windows: Sequence[Window],
    overlap: Overlap,
    share: float,
    seed: int = 0,
    draws: int = 10,
    passes: Passes | None = None,
) -> float:
    """Return the mean share of test windows that share pixels with a training window if windows are drawn at random.

    Args:
        share: of the windows that are for training.
        passes: see `leaked`.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        order = rng.permutation(len(windows))
        parts = np.full(len(windows), "test", dtype=object)
        parts[order[: round(share * len(windows))]] = "training"
        count, total = leaked(list(parts), windows, overlap, passes)
        found.append(count / max(total, 1))
    return float(np.mean(found))
