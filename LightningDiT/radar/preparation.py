"""From files to a split: which windows are whole, in which colour map, how they overlap, and which part each is in."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from LightningDiT.console import Progress
from LightningDiT.data.labels import natural_key
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.radar.arrays import Columns, Levels, Raw, native_columns, open_arrays, read_raw
from LightningDiT.radar.colour_maps import FAR, GREY, NAMES, Inverter, distances
from LightningDiT.radar.layouts import OTHER_SPLIT, Collected, Window, collect, other_split
from LightningDiT.radar.naming import WARNING, told
from LightningDiT.radar.overlap import Overlap, Passes, Shared, find_passes, measure, shared_across
from LightningDiT.radar.split import FOLDS, Row, make_split

OWN_PARTS = "folders or list"
DB = "dB"  # in place of a colour map, of arrays
COLUMNS_SEEN = 8  # windows that native columns are looked for in
RANGE_SEEN = 400  # training windows that the dB range is taken from
TAILS = (0.1, 99.9)  # percent of their values, the ends of that range
SHARED = "is shared by several people:"  # begins the reason why such a window is left out
OTHER = 12.0  # distance to the map of the others from which on an image may be in a map of its own
SURE = 0.4  # correlation of neighbours in turned windows from which on time runs downwards
BLURRED = 1 / 16  # of a window: what the high pass removes; the rows of a person's torso agree at smaller shifts
KEPT = 512  # windows whose levels stay in memory


@dataclass(frozen=True)
class Scan:
    """What a window is made of, without its values.

    Attributes:
        size: height and width.
        digest: of the pixels.
        distances: to each colour map; empty for grey images and arrays.
        unit: of values, `DB` or `GREY`; empty for colours.
        zeros: values of minus infinity, which become the low end of the range.
        is_turned: see `arrays.Raw`.
    """

    size: tuple[int, int]
    digest: str
    distances: Mapping[str, float]
    unit: str
    zeros: int = 0
    is_turned: bool = False


@dataclass(frozen=True)
class Prepared:
    """A data set after the audit.

    Attributes:
        kept: the windows that the split has.
        left_out: names of the others with the reason.
        maps: colour map of each kept window, `DB` for arrays.
        residual: mean distance of the pixels to their maps, in steps of 8 bits.
        sizes: of the kept windows, (height, width) with counts.
        is_measured: whether `db_range` is that of the training windows of fold 0.
        shared: conditions, and recordings of one, between which windows of a person share pixels.
        splits_of_data: part of each window, by its name, in each split that the data has, by its origin.
        notes: lines about what was assumed.
    """

    collected: Collected
    kept: list[Window]
    left_out: dict[str, str]
    scans: dict[str, Scan]
    maps: dict[str, str]
    residual: float
    sizes: Counter[tuple[int, int]]
    overlap: Overlap
    passes: Passes
    columns: Columns | None
    rows: list[Row]
    db_range: tuple[float, float] | None
    is_measured: bool
    source: Source
    shared: list[Shared]
    splits_of_data: dict[str, dict[str, str]]
    notes: list[str]


def prepare(
    data: Path,
    pattern: str | None = None,
    colour_map: str | None = None,
    db_range: tuple[float, float] | None = None,
    folds: int = FOLDS,
    seed: int = 0,
) -> Prepared:
    """Return a data set with its audit and its split; nothing is written.

    Args:
        data, pattern: see `layouts.collect`.
        colour_map: of all images in colours; by default it is recognised.
        db_range: of arrays; by default `TAILS` of the training windows.

    Raises:
        LightningDiTError: nothing can be read, or the images are drawn in no known colour map.
    """
    open_arrays.cache_clear()  # of an earlier call, whose files may have changed
    collected = collect(data, pattern)
    scans, left_out = _scanned(collected)
    maps = _maps(scans, left_out, colour_map)
    _leave_out_equal(collected.windows, scans, left_out)
    kept = _used(collected, left_out)
    source = Source(collected.root, maps, db_range)
    sizes = Counter(scans[window.name].size for window in kept)
    usual = sizes.most_common(1)[0][0]
    alike = [window for window in kept if scans[window.name].size == usual]
    overlap = _overlap(alike, usual, source, seed)
    passes = find_passes(kept, overlap, source.levels)
    rows = make_split(kept, passes, overlap, {name: scan.digest for name, scan in scans.items()}, folds, seed)
    is_measured = db_range is None and any(scan.unit == DB for scan in scans.values())
    if is_measured:
        db_range = source.db_range = _range(rows, source)
    columns = _columns(alike, source) if maps[alike[0].name] != DB else None
    notes = [*collected.notes, *_turned(scans)]
    splits = _splits_of_data(collected, notes)
    return Prepared(
        collected,
        kept,
        left_out,
        scans,
        maps,
        source.residual,
        sizes,
        overlap,
        passes,
        columns,
        rows,
        db_range,
        is_measured,
        source,
        shared_across(alike, overlap, source.levels, seed),
        splits,
        notes,
    )


def _used(collected: Collected, left_out: Mapping[str, str]) -> list[Window]:
    """Return the windows that are not left out; raise LightningDiTError if none is there."""
    kept = [window for window in collected.windows if window.name not in left_out]
    if not kept:
        raise LightningDiTError(
            f"none of the {len(left_out)} windows can be used, the first because it {next(iter(left_out.values()))}",
            "name a folder of spectrograms",
        )
    return kept


def _overlap(alike: Sequence[Window], size: tuple[int, int], source: Source, seed: int) -> Overlap:
    """Return the overlap in time, which runs along the rows of a picture.

    Raises:
        LightningDiTError: windows overlap along their columns, so time runs downwards.
    """
    overlap = measure(alike, size[1], source.levels, seed)
    if overlap.stride is not None or not overlap.pairs:
        return overlap
    turned = measure(alike, size[0], source.turned, seed)
    if turned.stride is not None and turned.stride >= BLURRED * size[0] and max(turned.correlations.values()) > SURE:
        raise LightningDiTError(
            f"neighbouring windows share pixels from top to bottom (stride {turned.stride:g} of {size[0]} rows): time"
            " runs downwards, and was expected to run from left to right",
            "turn the windows by 90 degrees counterclockwise",
        )
    return overlap


def _columns(alike: Sequence[Window], source: Source) -> Columns | None:
    """Return the native time columns of images of one size, seen in `COLUMNS_SEEN` of them."""
    seen = [source.levels(alike[at]) for at in np.linspace(0, len(alike) - 1, COLUMNS_SEEN).astype(int)]
    return native_columns([levels for levels in seen if levels is not None])


def _scanned(collected: Collected) -> tuple[dict[str, Scan], dict[str, str]]:
    """Return what each window is made of, and the windows that cannot be used with the reason."""
    scans: dict[str, Scan] = {}
    left_out = {file: f"cannot be read: {reason}" for file, reason in collected.damaged}
    with Progress(len(collected.windows), "window", label="reading") as progress:
        for window in collected.windows:
            try:
                raw = read_raw(collected.root / window.file, window.index)
            except (MemoryError, LightningDiTError):
                raise
            except Exception as error:  # arbitrary bytes make readers fail in arbitrary ways
                left_out[window.name] = f"cannot be read: {first_line(error)}"
            else:
                problem, scans[window.name] = _scan(raw)
                if problem:
                    left_out[window.name] = problem
            progress.update()
    return scans, left_out


def _scan(raw: Raw) -> tuple[str, Scan]:
    if raw.pixels is not None:
        return "", Scan(raw.size, raw.digest, distances(raw.pixels), "", is_turned=raw.is_turned)
    assert raw.values is not None
    unit = DB if raw.in_db else GREY
    below = int(np.isneginf(raw.values).sum())
    wrong = int((~np.isfinite(raw.values)).sum()) - below
    scan = Scan(raw.size, raw.digest, {}, unit, below, raw.is_turned)
    if wrong:
        return f"has {wrong} values that are NaN or infinite", scan
    if below == raw.values.size:
        return "has no finite value", scan
    return "", scan


def _turned(scans: Mapping[str, Scan]) -> Iterator[str]:
    """Yield a warning for images that viewers show turned or mirrored.

    They are not turned here: programs that draw spectrograms write no orientation, so it says nothing about the axes.
    """
    if turned := [name for name, scan in scans.items() if scan.is_turned]:
        yield (
            f"{WARNING}{len(turned)} images such as {told(turned[0])} have an EXIF orientation other than 1, by which"
            " viewers turn or mirror them: their pixels are read as stored, time from left to right"
        )


def _maps(scans: Mapping[str, Scan], left_out: dict[str, str], named: str | None) -> dict[str, str]:
    """Return the colour map of each window; those that are in none are left out.

    All images together decide. One of them has another map only where it is clearly nearer to that.
    """
    coloured_ones = {name: scan.distances for name, scan in scans.items() if scan.distances}
    maps = {name: scan.unit for name, scan in scans.items() if scan.unit}
    if not coloured_ones:
        return maps
    medians = {map_: float(np.median([found[map_] for found in coloured_ones.values()])) for map_ in NAMES}
    main = named or min(medians, key=lambda map_: medians[map_])
    for name, found in coloured_ones.items():
        own = min(found, key=lambda map_: found[map_])
        other = found[main] > OTHER and found[own] < found[main] / 2
        maps[name] = main if named or not other else own
        if not named and found[maps[name]] > FAR:
            left_out[name] = f"is in no known colour map (nearest {own}, {found[own]:.0f} of 255 away)"
    return maps


def _leave_out_equal(windows: Sequence[Window], scans: Mapping[str, Scan], left_out: dict[str, str]) -> None:
    """Leave out all windows of equal pixels of several people, and of one person all but the first."""
    by_digest: dict[str, list[Window]] = defaultdict(list)
    for window in windows:
        if window.name not in left_out:
            by_digest[scans[window.name].digest].append(window)
    for equal in by_digest.values():
        people = sorted({window.person for window in equal}, key=natural_key)
        if len(people) > 1:
            for window in equal:
                left_out[window.name] = f"{SHARED} {', '.join(map(told, people))}"
        for window in equal[1:]:
            left_out.setdefault(window.name, f"has the pixels of {told(equal[0].name)}")


class Source:
    """Levels of windows, in 0 to 1 once the dB range is known.

    Attributes:
        db_range: of arrays; None: their values are returned as they are.
        residual: see `Prepared`.
    """

    def __init__(self, root: Path, maps: Mapping[str, str], db_range: tuple[float, float] | None) -> None:
        self.db_range = db_range
        self._root, self._maps = root, maps
        self._inverters: dict[str, Inverter] = {}
        self._distances: list[float] = []
        self.levels = functools.lru_cache(maxsize=KEPT)(self._levels)

    @property
    def residual(self) -> float:
        return float(np.mean(self._distances)) if self._distances else 0.0

    def turned(self, window: Window) -> Levels | None:
        """Return the levels with columns as rows."""
        levels = self.levels(window)
        return None if levels is None else np.ascontiguousarray(levels.T)

    def _levels(self, window: Window) -> Levels | None:
        """Return the levels (H, W) of a window, None if its file has gone."""
        try:
            raw = read_raw(self._root / window.file, window.index)
        except (OSError, ValueError):
            return None
        if raw.pixels is not None:
            name = self._maps[window.name]
            if name not in self._inverters:
                self._inverters[name] = Inverter(name)
            levels, distance = self._inverters[name].levels(raw.pixels)
            self._distances.append(distance)
            return levels
        assert raw.values is not None
        if not raw.in_db:
            return raw.values
        finite = np.isfinite(raw.values)
        values = np.where(finite, raw.values, raw.values[finite].min() if finite.any() else 0.0)
        if self.db_range is None:
            return values
        low, high = self.db_range
        return np.clip((values - low) / (high - low), 0, 1).astype(np.float32)


def _range(rows: Sequence[Row], source: Source) -> tuple[float, float]:
    """Return the dB range of the training windows of fold 0, without `TAILS`."""
    training = [row for row in rows if row.part == "training"]
    chosen = [training[at] for at in np.linspace(0, len(training) - 1, min(RANGE_SEEN, len(training))).astype(int)]
    windows = [Window(row.file, row.index, row.person, row.condition, row.recording, row.number) for row in chosen]
    ends = [np.percentile(levels, TAILS) for levels in map(source.levels, windows) if levels is not None]
    low, high = (round(float(value), 2) for value in np.median(ends, 0))
    source.levels.cache_clear()
    if not high > low:
        raise LightningDiTError(
            f"the values of the training windows reach from {low} to {high} dB", "give --db-range LOW HIGH"
        )
    return low, high


def _splits_of_data(collected: Collected, notes: list[str]) -> dict[str, dict[str, str]]:
    """Return the splits that the data has, by their origin: of its folders or list, and of data_split.json."""
    own = {window.name: window.part for window in collected.windows if window.part}
    listed, note = other_split(collected.root, collected.windows)
    notes += [note] if note else []
    return {where: parts for where, parts in ((OWN_PARTS, own), (OTHER_SPLIT, listed)) if parts}
