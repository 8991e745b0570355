"""Which window is whose: person, condition, recording and running number, from names of folders and files or a list."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from LightningDiT.data.image_files import PACKED, UNPACK, find_images, shown
from LightningDiT.data.labels import natural_key
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_text
from LightningDiT.radar.arrays import ARRAYS, open_arrays
from LightningDiT.radar.naming import WARNING, guess, one_person, part_of, without_part

LISTS = (".csv", ".tsv", ".txt")
OTHER_SPLIT = "data_split.json"
OWN_FILES = (OTHER_SPLIT, "split.json", "manifest.json", "walkers.json")  # of this project and of others
GROUPS = {"person", "condition", "recording", "number", "part", "run"}
DATA_FIX = "name the folder that holds ID_1, ID_2, ..."
NAME_FIX = r"give --pattern '(?P<person>ID_\d+)/.*?(?P<number>\d+)\.jpg' as your files are called"


@dataclass(frozen=True)
class Window:
    """One spectrogram.

    Attributes:
        file: path below the data's folder, with / between folders.
        index: which of an array's windows; None for a file that holds one.
        person, condition, recording: as they are called; empty where there is none.
        number: the running number; windows of one recording follow one another by it.
        part: training, validation or test of a split that the data has; empty where there is none.
    """

    file: str
    index: int | None
    person: str
    condition: str
    recording: str
    number: int
    part: str = ""

    @property
    def name(self) -> str:
        return self.file if self.index is None else f"{self.file}[{self.index}]"

    @property
    def group(self) -> tuple[str, str, str]:
        """The recording that its number counts in."""
        return self.person, self.condition, self.recording


@dataclass(frozen=True)
class Collected:
    """The windows of a data set.

    Attributes:
        root: the folder that `Window.file` starts from.
        windows: sorted by person, condition, recording and number.
        pattern: the regular expression that read the names; empty where a list or an array has all columns.
        notes: a line for each thing that was assumed or passed over.
        damaged: files that could not be opened, with the reason.
        empty: folders without any file.
    """

    root: Path
    windows: list[Window]
    pattern: str
    notes: tuple[str, ...]
    damaged: tuple[tuple[str, str], ...]
    empty: tuple[str, ...]

    @property
    def people(self) -> list[str]:
        return sorted({window.person for window in self.windows}, key=natural_key)


def collect(data: Path, pattern: str | None = None) -> Collected:
    """Return the windows of a folder, a list file (.csv, .tsv, .txt with a header) or an array file.

    Args:
        pattern: a regular expression with the groups person and number, and condition, recording, run (a folder that
            is a part of the recording's name) and part where the names have them; it is searched in the path below
            the folder. By default that of the layout that fits best, see `naming.guess`.

    Raises:
        LightningDiTError: nothing is there, no pattern fits, or the list is wrong.
    """
    expression = _compiled(pattern) if pattern else None
    root = data if data.is_dir() else data.parent
    notes: list[str] = []
    if data.suffix.lower() in LISTS and not data.is_dir():
        rows = _listed(data)
    elif data.is_dir():
        found = find_images(data, OWN_FILES, ARRAYS)
        rows = [{"path": path.relative_to(data).as_posix()} for path in found.files]
        notes += found.notes
    elif data.suffix.lower() in ARRAYS and data.is_file():
        rows = [{"path": data.name}]
    else:
        raise LightningDiTError(
            f"{data} is no folder, list ({', '.join(LISTS)}) or array ({', '.join(ARRAYS)}) that is there",
            UNPACK if data.suffix.lower() in PACKED and data.is_file() else DATA_FIX,
        )
    rows, damaged = _with_arrays(root, rows)
    rows, used = _with_names(rows, expression, notes)
    windows = _numbered(rows, notes)
    if not windows:
        raise LightningDiTError(f"{data} has no window that can be read ({len(damaged)} damaged files)", DATA_FIX)
    windows = _without_restarts(windows, not data.is_dir(), notes)
    notes += _one_person(windows)
    windows.sort(key=lambda window: (*map(natural_key, window.group), window.number, window.name))
    return Collected(root, windows, used, tuple(notes), tuple(damaged), _empty(data) if data.is_dir() else ())


def _one_person(windows: Iterable[Window]) -> Iterator[str]:
    """Yield a warning for names that may be those of one person, who would be several classes."""
    for names in one_person(sorted({window.person for window in windows}, key=natural_key)).values():
        yield (
            f"{WARNING}{', '.join(map(shown, names))} may be one person and count as {len(names)}: if so, rename the"
            " folders, or state people by --pattern or a list"
        )


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise LightningDiTError(f"--pattern {pattern!r} is no regular expression ({error})", NAME_FIX) from error
    groups = set(expression.groupindex)
    if "person" not in groups or groups - GROUPS:
        raise LightningDiTError(
            f"--pattern has the groups {', '.join(sorted(groups)) or 'none'}; person is needed, and of"
            f" {', '.join(sorted(GROUPS))} those that the names have",
            NAME_FIX,
        )
    return expression


def _listed(listing: Path) -> list[dict[str, str]]:
    """Return the rows of a list file by the names in its header."""
    try:
        text = read_text(listing, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = f"the list {listing} cannot be read ({first_line(error)})"
        raise LightningDiTError(reason, "name a text file in UTF-8") from error
    header, _, _ = text.partition("\n")
    delimiter = next((sign for sign in "\t;," if sign in header), ",")
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    names = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    if "path" not in names:
        raise LightningDiTError(
            f"the list {listing} begins with {header[:80]!r}; a header with path, person, condition, recording, number"
            " is expected",
            "begin it with `path,person,number`",
        )
    reader.fieldnames = ["part" if name == "split" else name for name in names]
    rows = []
    try:
        for row in reader:
            kept = {key: (row[key] or "").strip() for key in ("path", *GROUPS) if isinstance(row.get(key), str)}
            if kept.get("path"):
                kept["path"] = PureWindowsPath(kept["path"]).as_posix() if "\\" in kept["path"] else kept["path"]
                rows.append(kept | {"line": f"line {reader.line_num}"})
    except csv.Error as error:
        raise LightningDiTError(
            f"the list {listing} is no table ({error})", "begin it with `path,person,number`"
        ) from error
    return rows


def _with_arrays(root: Path, rows: Iterable[dict[str, str]]) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """Return a row for each window of the arrays among the files, and the arrays that cannot be opened."""
    found, damaged = [], []
    for row in rows:
        if PurePosixPath(row["path"]).suffix.lower() not in ARRAYS:
            found.append(row)
            continue
        try:
            opened = open_arrays(root / row["path"])
        except (OSError, ValueError) as error:
            damaged.append((row["path"], first_line(error)))
            continue
        if opened.single:
            found.append(row | {key: column[0] for key, column in opened.columns.items()})
            continue
        for index in range(len(opened.windows)):
            own = {key: column[index] for key, column in opened.columns.items()}
            # a list may name one array once for all of its windows
            found.append(
                {"number": str(index), "recording": PurePosixPath(row["path"]).stem}
                | {key: value for key, value in row.items() if key != "number"}
                | own
                | {"index": str(index)}
            )
    return found, damaged


def _with_names(
    rows: list[dict[str, str]], expression: re.Pattern[str] | None, notes: list[str]
) -> tuple[list[dict[str, str]], str]:
    """Return the rows with what their paths say about them, and the pattern that read it."""
    bare = [row for row in rows if "person" not in row or "number" not in row]
    if not bare:
        return rows, ""
    paths = {row["path"]: row["path"] if expression else without_part(row["path"])[0] for row in bare}
    named = all("person" in row for row in bare)
    chosen, assumed = (expression, []) if expression else guess(list(paths.values()), named)
    notes += assumed
    if chosen is None:
        if named:  # a list without numbers
            return rows, ""
        example = shown(next(iter(paths)))
        raise LightningDiTError(f"no known pattern fits the names of the files, such as {example}", NAME_FIX)
    complete, odd = [], []
    for row in rows:
        match = chosen.search(paths[row["path"]]) if row["path"] in paths else None
        if match is None and "person" not in row:
            odd.append(row["path"])
            continue
        said = {key: value for key, value in match.groupdict().items() if value is not None} if match else {}
        names = [said.pop(key).strip() for key in ("run", "recording") if key in said]
        complete.append(said | {"recording": "/".join(filter(None, names))} | row)
    if not complete:
        raise LightningDiTError(f"the pattern fits none of {len(odd)} files, such as {shown(odd[0])}", NAME_FIX)
    strangers = [row["path"] for row in complete if _names_another(row)]
    if strangers:
        notes.append(f"{len(strangers)} files have another person's number in their name: {shown(strangers[0])}")
    if odd:
        some = ", ".join(map(shown, odd[:3]))
        notes.append(f"passed over {len(odd)} files whose names the pattern does not fit: {some}")
    return complete, chosen.pattern


def _names_another(row: Mapping[str, str]) -> bool:
    """Return whether a file is called ID8_... and lies with the windows of another person."""
    named = re.match(r"(?i:id)[_-]?(\d+)[_-]", PurePosixPath(row["path"]).name)
    own = re.search(r"(\d+)$", row["person"])
    return bool(named and own and int(named[1]) != int(own[1]))


def _numbered(rows: Sequence[dict[str, str]], notes: list[str]) -> list[Window]:
    """Return the rows as windows; those without a number count in the natural order of their names."""
    counted: Counter[tuple[str, ...]] = Counter()
    order = sorted(range(len(rows)), key=lambda at: natural_key(rows[at]["path"]))
    missing = [at for at in order if not rows[at].get("number")]
    own: dict[int, int] = {}
    for at in missing:
        group = tuple(rows[at].get(key, "") for key in ("person", "condition", "recording"))
        own[at], counted[group] = counted[group], counted[group] + 1
    if missing:
        notes.append(f"{len(missing)} windows have no running number and count in the order of their names")
    windows = []
    for at, row in enumerate(rows):
        number = row.get("number") or str(own[at])
        if not re.fullmatch(r"-?\d{1,15}(\.0*)?", number):
            raise LightningDiTError(
                f"{shown(row['path'])}{', ' + row['line'] if 'line' in row else ''} has the running number"
                f" {number[:40]!r}, a whole number was expected",
                NAME_FIX,
            )
        if not row.get("person"):
            where = row.get("line", "")
            raise LightningDiTError(f"{shown(row['path'])} has no person {where}".rstrip(), NAME_FIX)
        given = row.get("part", "")
        part = part_of(given) or given or without_part(row["path"])[1]
        condition, recording = row.get("condition", ""), row.get("recording", "")
        index = int(row["index"]) if "index" in row else None
        windows.append(Window(row["path"], index, row["person"], condition, recording, int(float(number)), part))
    return windows


def _without_restarts(windows: list[Window], listed: bool, notes: list[str]) -> list[Window]:
    """Return the windows with a recording of its own for each run of numbers that starts again.

    Numbers that occur twice in a recording belong to different runs where the files lie in different folders, or where
    a list or an array has its windows in order. Otherwise they stay together, as if they overlapped.
    """
    groups: dict[tuple[str, str, str], list[Window]] = defaultdict(list)
    for window in windows:
        groups[window.group].append(window)
    found: list[Window] = []
    restarted, tied = 0, 0
    for members in groups.values():
        if len({window.number for window in members}) == len(members):
            found += members
            continue
        folders = defaultdict(list)
        for window in members:
            folders[without_part(window.file)[0].rpartition("/")[0]].append(window)
        in_order = listed or all(window.index is not None for window in members)
        runs = list(folders.values()) if len(folders) > 1 else _runs(members) if in_order else [members]
        if all(len({window.number for window in run}) == len(run) for run in runs):
            restarted += len(runs) - 1
            for count, run in enumerate(runs, 1):
                found += [replace(window, recording=f"{window.recording}#{count}") for window in run]
        else:
            tied += len(members) - len({window.number for window in members})
            found += members
    if restarted:
        notes.append(f"running numbers start again {restarted} times within a recording: each run counts as its own")
    if tied:
        notes.append(
            f"{tied} windows have the running number of another window of the same recording: they stay in one part;"
            " if they are of different recordings, name these by --pattern"
        )
    return found


def _runs(windows: Sequence[Window]) -> list[list[Window]]:
    """Return windows in their given order, cut where the number falls."""
    runs = [[windows[0]]]
    for before, window in itertools.pairwise(windows):
        if window.number <= before.number:
            runs.append([])
        runs[-1].append(window)
    return runs


def _empty(folder: Path) -> tuple[str, ...]:
    """Return the folders at any depth in which, and below which, there is no file."""
    found: list[str] = []
    full: set[str] = set()
    for path, folders, names in os.walk(folder, topdown=False):
        if names or any(os.path.join(path, name) in full for name in folders):  # noqa: PTH118 - names as os.walk has them
            full.add(path)
        elif path != str(folder) and not Path(path).name.startswith("."):
            found.append(Path(path).relative_to(folder).as_posix())
    return tuple(sorted(found, key=natural_key))


def missing_people(people: Sequence[str], count: int | None = None) -> list[str]:
    """Return the names that a row of numbered people lacks, up to `count` or the highest number."""
    numbered = [re.fullmatch(r"(.*?)(\d+)", name) for name in people]
    if not people or not all(numbered) or len({match[1] for match in numbered if match}) != 1:
        return []
    prefix, width = numbered[0][1], min(len(match[2]) for match in numbered)
    have = {int(match[2]) for match in numbered}
    last = count or max(have)
    if last > 10 * len(have) + 100:  # numbers of a register, which no row has in full
        return []
    first = min(1, min(have))
    return [f"{prefix}{number:0{width}d}" for number in range(first, last + 1) if number not in have]


def other_split(root: Path, windows: Sequence[Window]) -> tuple[dict[str, str], str]:
    """Return the part of each window, by its name, that `data_split.json` gives it, and a note.

    The file has lists of paths or names of files under keys such as train and test, at any depth; a person's name
    stands for all of the person's windows.
    """
    file = root / OTHER_SPLIT
    if not file.is_file():
        return {}, ""
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{OTHER_SPLIT} cannot be read ({first_line(error)})"
    leaves = list(_leaves(content, ""))
    by_text: dict[str, list[Window]] = defaultdict(list)
    for window in windows:
        path = PurePosixPath(window.file)
        for text in {window.file, path.name, path.stem, window.person}:
            by_text[text].append(window)
    parts, unknown = {}, 0
    for text, part in leaves:
        posix = PureWindowsPath(text).as_posix() if "\\" in text else text
        tails = [posix, *(posix.split("/", cut)[-1] for cut in range(1, posix.count("/") + 1))]
        hits = next((by_text[tail] for tail in tails if tail in by_text), [])
        unknown += not hits
        parts |= {window.name: part for window in hits}
    note = f"{unknown} of {len(leaves)} entries of {OTHER_SPLIT} name no window that is there" if unknown else ""
    if not leaves:
        note = f"{OTHER_SPLIT} has no lists of files under train, validation or test: it was not compared"
    return parts, note


def _leaves(content: object, part: str) -> Iterable[tuple[str, str]]:
    """Yield each text of a JSON content with the part that a key around it names."""
    if isinstance(content, dict):
        for key, value in content.items():
            first = re.split(r"[_\W]", str(key))[0]
            yield from _leaves(value, part_of(str(key)) or part_of(first) or part)
    elif isinstance(content, list):
        for value in content:
            yield from _leaves(value, part)
    elif isinstance(content, str) and part:
        yield content, part
