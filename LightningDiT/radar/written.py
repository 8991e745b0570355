"""What step 5 says and writes: the audit, the split, lists for later commands, and levels in one channel."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from LightningDiT.console import Progress
from LightningDiT.data.image_files import shown
from LightningDiT.data.labels import natural_key
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_target, held_folder, kind_of, read_json, read_text, write_text
from LightningDiT.radar.arrays import fitted, grey_levels, sample_columns, save_levels, save_view
from LightningDiT.radar.colour_maps import GREY, NAMES, coloured
from LightningDiT.radar.layouts import missing_people
from LightningDiT.radar.naming import WARNING, told
from LightningDiT.radar.overlap import leaked, random_leak
from LightningDiT.radar.preparation import DB, SHARED, Prepared
from LightningDiT.radar.split import Row, is_split, rows_digest, save_split

SPLIT, MANIFEST = "split.json", "manifest.json"
FORMAT = "levels of spectrograms, 1"
MEASURED = "training windows of fold 0"  # in the manifest: where the dB range comes from, unless it was given
LISTED = ("training", "validation", "test")
HEADER = "path,label,pass_of_person"
VIEWED_IN = "jet"  # where the data has no colour map
MOST_ROWS = 40  # of the table of people
SHOWN = 3  # examples in a line
MOST_LETTERS = 60  # of a person's name in that of a folder: 240 bytes at most
FORMER = "former"  # in the manifest of an unfinished folder: files of the run before, which are to be removed
OWN_NAME = r"[\w-]+/pass\d+_-?\d+(_\d+)?\.png"  # of a file of levels, see `_file_names`
RANDOM = (0.8, 0.5)  # shares of training windows in random splits

# ---- the report


def report(prepared: Prepared, people: int | None = None) -> Iterator[str]:
    """Yield the lines of the audit.

    Args:
        people: how many there should be; by default up to the highest number.
    """
    collected, kept = prepared.collected, prepared.kept
    count = len({(window.person, prepared.passes.numbers[window.name]) for window in kept})
    yield f"data           {len(collected.people)} people, {len(collected.windows)} windows, {count} passes"
    if collected.pattern:
        yield f"pattern        {collected.pattern}"
    yield from (note if note.startswith(WARNING) else f"note           {note}" for note in prepared.notes)
    yield from _missing(prepared, people)
    yield from _left_out(prepared)
    yield from _values(prepared)
    yield from _counts(prepared)
    yield from _overlap(prepared)
    yield from _shared(prepared)
    yield from _leaks(prepared)
    yield from _people(prepared)


def _missing(prepared: Prepared, people: int | None) -> Iterator[str]:
    there = prepared.collected.people
    missing, count = missing_people(there, people)
    if missing:
        more = f" and {count - len(missing)} more" if count > len(missing) else ""
        yield f"missing        {', '.join(map(told, missing))}{more} ({count} in all)"
    elif people and people != len(there):
        yield f"warning: --people says {people}, and {len(there)} are there"
    if prepared.collected.empty:
        yield f"warning: empty folders ({len(prepared.collected.empty)}): {_some(prepared.collected.empty)}"
    lost = [person for person in there if person not in {row.person for row in prepared.rows}]
    if lost:
        yield f"warning: people without a window that can be used ({len(lost)}): {_some(lost)}"


def _left_out(prepared: Prepared) -> Iterator[str]:
    """Yield a line for each kind of reason, with the first of the windows that have it."""
    kinds: dict[str, list[str]] = defaultdict(list)
    person_of = {window.name: window.person for window in prepared.collected.windows}
    several = [name for name, reason in prepared.left_out.items() if reason.startswith(SHARED)]
    if several:
        counts = Counter(person_of[name] for name in several)
        people = _some([f"{person} {counts[person]}" for person in sorted(counts, key=natural_key)], 10)
        yield f"{WARNING}{len(several)} windows are left out, since several people have the same pixels: {people}"
        yield f"               such as {told(several[0])}, which {prepared.left_out[several[0]]}"
    for name, reason in prepared.left_out.items():
        if not reason.startswith(SHARED):
            kinds[" ".join(reason.split()[:3])].append(name)
    for names in kinds.values():
        more = f", and {len(names) - 1} more for such a reason" if len(names) > 1 else ""
        yield f"warning: left out: {told(names[0])} {prepared.left_out[names[0]]}{more}"


def _values(prepared: Prepared) -> Iterator[str]:
    sizes = ", ".join(f"{width}x{height} {number}" for (height, width), number in prepared.sizes.most_common(5))
    maps = Counter(prepared.maps[window.name] for window in prepared.kept)
    yield f"windows        width x height {sizes}" if len(prepared.sizes) > 1 else f"windows        {sizes.split()[0]}"
    if len(prepared.sizes) > 1:
        yield f"warning: windows have {len(prepared.sizes)} sizes; the overlap is measured on the most frequent one"
    main = maps.most_common(1)[0][0]
    if main == DB:
        low, high = prepared.db_range or (0, 0)
        zeros = sum(scan.zeros for scan in prepared.scans.values())
        lowest = f"; {zeros} values of minus infinity count as the low end" if zeros else ""
        yield f"values         dB, {low:g} to {high:g} become the levels 0 to 1{lowest}"
    else:
        known = "{:g} to {:g}".format(*prepared.db_range) if prepared.db_range else "unknown, --db-range states it"
        far = f"; pixels are {prepared.residual:.1f} of 255 away from it" if main != GREY else ""
        yield f"colour map     {main}{far}; dB range {known}"
        if (nearer := _nearer_map(prepared, main)) != main:
            yield f"warning: the pixels are much nearer to {nearer} than to {main}: omit --colour-map to take that map"
    if len(maps) > 1:
        yield f"warning: colour maps are mixed: {', '.join(f'{name} {number}' for name, number in maps.most_common())}"
    if prepared.columns:
        columns = prepared.columns
        yield f"native columns {columns.count} of time, enlarged to the width of the pixels ({columns.way})"
    elif main != DB:
        yield "native columns none found: the windows were not enlarged in time, or not by a known way"


def _counts(prepared: Prepared) -> Iterator[str]:
    for label, key in (("conditions", "condition"), ("recordings", "recording")):
        found = Counter(getattr(window, key) for window in prepared.kept)
        if len(found) > 1:
            rows = [f"{told(name) or '(none)'} {number}" for name, number in sorted(found.items())]
            yield f"{label:<15}{_some(rows, 10)}"


def _overlap(prepared: Prepared) -> Iterator[str]:
    overlap, passes = prepared.overlap, prepared.passes
    step = f" (running numbers go in steps of {overlap.unit})" if overlap.unit > 1 else ""
    if overlap.stride is None and not overlap.pairs:
        yield (
            f"{WARNING}the overlap could not be measured: no two windows of a recording have neighbouring numbers, so"
            " they count as apart; if the running number is another one in the names, give --pattern"
        )
    elif overlap.stride is None:
        yield (
            f"overlap        none found in the pixels of {overlap.pairs} pairs of neighbours: windows count as"
            f" apart{step}; if they were cut with overlap, check that the numbers follow the time"
        )
    else:
        share = max(0.0, 1 - overlap.stride / overlap.length)
        measured = ", ".join(f"{at}: {value:.2f}" for at, value in sorted(overlap.correlations.items()))
        yield (
            f"overlap        neighbours share {100 * share:.0f} %: window {overlap.length}, stride {overlap.stride:g}"
            f" columns of pixels{step}{', time runs to the left' if overlap.backwards else ''}"
        )
        yield f"               correlation by distance {measured}; of different recordings {overlap.control:.2f}"
        yield f"               windows share pixels up to a distance of {overlap.reach * overlap.unit}"
    if passes.small:
        yield f"               {passes.small} smaller gaps in the numbers are bridged by windows: no boundary of a pass"
    if passes.joined:
        yield f"               {passes.joined} larger gaps have the same pixels on both sides: no boundary of a pass"


def _shared(prepared: Prepared) -> Iterator[str]:
    """Yield a warning for conditions and recordings whose windows are of one walk."""
    for one in prepared.shared:
        first, second = map(told, one.conditions)
        what = f"the conditions {first or '(none)'} and {second or '(none)'}"
        if first == second:
            what = f"different recordings{f' under {first}' if first else ''}"
        yield (
            f"{WARNING}windows of {what} share pixels ({one.found} of {one.compared} pairs, such as"
            f" {told(one.first)} and {told(one.second)}): these are of one walk, and would be in training and test;"
            " state condition, recording and number by --pattern"
        )


def _leaks(prepared: Prepared) -> Iterator[str]:
    if prepared.overlap.stride is None and not prepared.overlap.pairs:
        return  # a share of 0 % would be no finding
    windows = [window for window in prepared.collected.windows if window.name in prepared.scans]  # copies too
    for where, parts in prepared.splits_of_data.items():
        own = [parts.get(window.name, "") for window in windows]
        shared, total = leaked(own, windows, prepared.overlap, prepared.passes)
        if total:
            warning = "warning: " if shared else ""
            yield (
                f"{warning}split of its {where}: {shared} of {total} test windows ({100 * shared / total:.1f} %) share"
                " pixels with a training window"
            )
        else:
            yield f"split of its {where}: no test windows"
    for share in RANDOM:
        found = random_leak(prepared.kept, prepared.overlap, share, passes=prepared.passes)
        parts = f"{100 * share:.0f}/{100 - 100 * share:.0f}"
        yield f"random {parts}   {100 * found:.1f} % of the test windows would share pixels with a training window"


def _nearer_map(prepared: Prepared, name: str) -> str:
    """Return the map to which the windows in colours are less than half as far as to the map `name`, or that name."""
    seen = [scan.distances for scan in prepared.scans.values() if scan.distances]
    means = {other: fmean(one[other] for one in seen) for other in NAMES} if seen else {}
    best = min(means, key=lambda other: means[other], default=name)
    return best if best in means and 2 * means[best] < means.get(name, 0.0) else name


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _people(prepared: Prepared) -> Iterator[str]:
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in prepared.rows:
        rows[row.person].append(row)
    names = {person: told(person, MOST_LETTERS) for person in rows}
    width = max(6, *map(_cells, names.values()))
    yield f"{'person':<{width}} windows passes training validation   test"
    for person, own in list(rows.items())[:MOST_ROWS]:
        parts = Counter(row.part for row in own)
        passes = len({row.pass_number for row in own})
        counts = f"{parts['training']:>8} {parts['validation']:>10} {parts['test']:>6}"
        name = names[person] + " " * (width - _cells(names[person]))
        yield f"{name} {len(own):>7} {passes:>6} {counts}"
    if len(rows) > MOST_ROWS:
        yield f"... and {len(rows) - MOST_ROWS} people more, all in {SPLIT}"
    single = [person for person, own in rows.items() if own[0].fold is None]
    if single:
        yield f"warning: people with one pass train only and are in no verdict ({len(single)}): {_some(single)}"
    if len(single) == len(rows):
        yield "warning: nobody has two passes, so no split by pass is possible: nothing can be tested"


def _some(names: Sequence[str], count: int = SHOWN) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(told(name) for name in names[:count]) + more


# ---- files


def settings_of(prepared: Prepared, seed: int) -> dict[str, Any]:
    """Return what the split says beside its windows."""
    overlap = prepared.overlap
    return {
        "seed": seed,
        "pattern": prepared.collected.pattern,
        "window": overlap.length,
        "stride": overlap.stride,
        "number_unit": overlap.unit,
        "shares_up_to": overlap.reach * overlap.unit,
        "colour_maps": dict(Counter(prepared.maps[window.name] for window in prepared.kept)),
        "residual": round(prepared.residual, 2),
        "native_columns": prepared.columns.count if prepared.columns else None,
        "db_range": prepared.db_range,
        "left_out": dict(prepared.left_out),
    }


def write_split(prepared: Prepared, data: Path, folder: Path, seed: int, images: Mapping[str, str]) -> list[Path]:
    """Write the split and, for commands that take lists, the images of its parts; return the files.

    Args:
        images: an image for each window, by its name; none of an array that was not written as images.
    """
    lists = {part: folder / f"{part}.csv" for part in LISTED}
    check_target(folder / SPLIT, is_split)
    for path in lists.values():
        check_target(path, _is_list)
    save_split(folder / SPLIT, data, prepared.collected.root, prepared.rows, settings_of(prepared, seed))
    written = [folder / SPLIT]
    for part, path in lists.items():
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        chosen = [row for row in prepared.rows if row.part == part and row.name in images]
        table.writerows([images[row.name], row.person, row.pass_number] for row in chosen)
        if chosen or path.exists():  # an old list would belong to another split
            write_text(path, f"{HEADER}\n{text.getvalue()}", ours=_is_list)
        written += [path] if chosen else []
    return written


def _is_list(path: Path) -> bool:
    return read_text(path, errors="replace").startswith(HEADER)


def images_of(prepared: Prepared) -> dict[str, str]:
    """Return the file of each window that is an image of its own."""
    root = prepared.collected.root.resolve()
    return {row.name: str(root / row.file) for row in prepared.rows if prepared.maps[row.name] != DB}


def write_levels(
    prepared: Prepared, folder: Path, size: tuple[int, int] | None, fit: str, native: bool, views: str | None
) -> tuple[dict[str, str], int]:
    """Write each window as a grey PNG of 16 bits and, in a colour map, as a view.

    Level 0 is 0 and level 1 is 65535. Colours are inverted before any change of size. What an earlier run wrote of
    windows that are no longer there is removed.

    Returns:
        The view's file by the window's name, and the number of windows whose files were removed.

    Args:
        size: height and width; by default those of the window, its native columns if `native`.
        fit: see `arrays.fitted`.
        views: colour map of the views; by default that of the data.
    """
    if size is None and len(prepared.sizes) > 1:
        raise LightningDiTError(f"the windows have {len(prepared.sizes)} sizes, written ones have one", "give --size")
    map_ = views or next((name for name in prepared.maps.values() if name != DB), VIEWED_IN)
    names = _file_names(prepared.rows)
    windows = {window.name: window for window in prepared.kept}
    with held_folder(folder, "preparation"), Progress(len(names), "window", label="writing") as progress:
        manifest = _manifest(prepared, size, fit, native, map_, names)
        former = sorted(_written_before(folder) - {*names.values()})
        unfinished = manifest | {FORMER: former}  # without digests
        write_text(folder / MANIFEST, json.dumps(unfinished, indent=1, ensure_ascii=False))
        removed = _remove(folder, former)
        digests = {}
        for name, file in names.items():
            levels = prepared.source.levels(windows[name])
            if levels is None:
                raise LightningDiTError(f"{told(name)} cannot be read any more", "put the file back")
            if native and prepared.columns and prepared.columns.count < levels.shape[1]:
                levels = sample_columns(levels, prepared.columns.count, prepared.columns.way)
            levels = fitted(levels, size, fit) if size else levels
            digests[name], pixels = levels_digest(grey_levels(levels)), levels.shape
            save_levels(levels, folder / "levels" / file)
            save_view(coloured(levels, map_), folder / "views" / file)
            progress.update()
        manifest |= {"pixels": pixels, "digests": digests}
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    return {name: str((folder / "views" / file).resolve()) for name, file in names.items()}, removed


def _written_before(folder: Path) -> set[str]:
    """Return the files that the manifest of an earlier run names, as `_file_names` names them."""
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return set()
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return set()
    files, former = content.get("files"), content.get(FORMER)
    found = [*(files.values() if isinstance(files, dict) else ()), *(former if isinstance(former, list) else ())]
    return {file for file in found if isinstance(file, str) and re.fullmatch(OWN_NAME, file)}


def _remove(folder: Path, files: Sequence[str]) -> int:
    """Remove the levels and views of these names, and folders that get empty; return how many were there."""
    removed = 0
    for file in files:
        paths = [folder / kind / file for kind in ("levels", "views")]
        own = [path for path in paths if kind_of(path) == "file" and kind_of(path.parent) == "folder"]
        for path in own:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
        removed += bool(own)
    return removed


def levels_digest(grey: NDArray[Any]) -> str:
    """Return a hash of the levels (H, W) of a file, whole numbers up to 65535."""
    found = hashlib.sha256(str(grey.shape).encode())
    found.update(np.ascontiguousarray(grey, np.dtype("<u2")).tobytes())
    return found.hexdigest()[:16]


def _file_names(rows: Sequence[Row]) -> dict[str, str]:
    """Return a path for each window: a folder for each person, pass and running number in the name."""
    folders = _folders(sorted({row.person for row in rows}, key=natural_key))
    taken: set[str] = set()
    names = {}
    for row in rows:
        stem = f"{folders[row.person]}/pass{row.pass_number}_{row.number}"
        stem = stem if stem not in taken else f"{stem}_{len(taken)}"
        taken.add(stem)
        names[row.name] = f"{stem}.png"
    return names


def _folders(people: Sequence[str]) -> dict[str, str]:
    """Return a folder of its own for each person, also where systems ignore case or forms of a letter.

    The end of a name that was taken depends on the person alone, so that a rerun without others keeps it.
    """
    folders: dict[str, str] = {}
    taken: set[str] = set()
    for person in people:
        name = re.sub(r"[^\w-]", "_", shown(person)[:MOST_LETTERS]) or "_"
        while (key := unicodedata.normalize("NFKC", name).casefold()) in taken:
            name += f"_{hashlib.sha256(person.encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"
        taken.add(key)
        folders[person] = name
    return folders


def _manifest(
    prepared: Prepared, size: tuple[int, int] | None, fit: str, native: bool, map_: str, names: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "split": rows_digest(prepared.rows),
        "levels": "grey of 16 bits, 0 is level 0 and 65535 level 1",
        "db_range": prepared.db_range,
        "db_range_of": MEASURED if prepared.is_measured else None,
        "size": size,
        "fit": fit if size else None,
        "native_columns": prepared.columns.count if native and prepared.columns else None,
        "views": map_,
        "files": dict(names),
    }


def require_own_folder(folder: Path, data: Path) -> None:
    """Raise LightningDiTError unless `write_levels` may write into a folder: a new one, or one of its own.

    Args:
        data: what is read; a folder within it would be read by the next run.
    """
    if data.is_dir() and folder.is_relative_to(data):
        raise LightningDiTError(f"{folder} lies within the data {data}", "name another folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        content = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise LightningDiTError(f"{folder} has files of other programs", "name another folder")
