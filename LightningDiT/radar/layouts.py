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

from LightningDiT.data.image_files import PACKED, UNPACK, find_images
from LightningDiT.data.labels import natural_key
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_text
from LightningDiT.radar.arrays import ARRAYS, ArrayFile, open_arrays
from LightningDiT.radar.naming import WARNING, guess, one_person, part_of, told, without_part

LISTS = (".csv", ".tsv", ".txt")
NUMBER = r"-?\d{1,15}(\.0*)?"  # whole, as text
OTHER_SPLIT = "data_split.json"
OWN_FILES = (OTHER_SPLIT, "split.json", "manifest.json", "walkers.json")  # of this project and of others
GROUPS = {"person", "condition", "recording", "number", "part", "run"}
KNOWN = ("path", *sorted(GROUPS))  # columns of a list
DATA_FIX = "name the folder that holds ID_1, ID_2, ..."
LIST_FIX = "correct the list"
MOST_DIGITS = 15  # of the number in the name of a person
MOST_LETTERS = 4096  # of a path in a list, as systems have them; patterns take long for longer ones
DIGITS = "0123456789"
MISSING_TOLD = 10
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
        first = f", the first {told(damaged[0][0])}: {damaged[0][1]}" if damaged else ""
        raise LightningDiTError(
            f"{data} has no window that can be read ({len(damaged)} damaged files{first})", DATA_FIX
        )
    windows = _without_restarts(windows, not data.is_dir(), notes)
    notes += _one_person(windows)
    windows.sort(key=lambda window: (*map(natural_key, window.group), window.number, window.name))
    return Collected(root, windows, used, tuple(notes), tuple(damaged), _empty(data) if data.is_dir() else ())


def _one_person(windows: Iterable[Window]) -> Iterator[str]:
    """Yield a warning for names that may be those of one person, who would be several classes."""
    for names in one_person(sorted({window.person for window in windows}, key=natural_key)).values():
        yield (
            f"{WARNING}{', '.join(map(told, names))} may be one person and count as {len(names)}: if so, rename the"
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
    for name, count in Counter(reader.fieldnames).items():
        if count > 1 and name in KNOWN:
            raise LightningDiTError(f"the list {listing} has {count} columns {name}, one is expected", LIST_FIX)
    rows, lines = [], {}
    try:
        for row in reader:
            kept = {key: (row[key] or "").strip() for key in KNOWN if isinstance(row.get(key), str)}
            if length := len(kept.get("path", "")):
                if length > MOST_LETTERS:
                    raise LightningDiTError(
                        f"line {reader.line_num} of the list {listing} has a path of {length} characters, at most"
                        f" {MOST_LETTERS} are expected",
                        LIST_FIX,
                    )
                path = PureWindowsPath(kept["path"]).as_posix() if "\\" in kept["path"] else kept["path"]
                rows.append(kept | {"path": path, "line": f"line {reader.line_num}"})
                if (first := lines.setdefault(path, reader.line_num)) != reader.line_num:
                    raise LightningDiTError(
                        f"lines {first} and {reader.line_num} of the list {listing} both name {told(path)}", LIST_FIX
                    )
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
        found += _array_rows(row, opened)
    return found, damaged


def _array_rows(row: dict[str, str], opened: ArrayFile) -> Iterator[dict[str, str]]:
    """Yield a row for each window of an array; a list may name one array once for all of its windows.

    Raises:
        LightningDiTError: the list says something else of a window than the array does, or one number for several.
    """
    count, stem = len(opened.windows), PurePosixPath(row["path"]).stem
    if row.get("number") and count > 1:
        raise LightningDiTError(
            f"{row['line']} gives the running number {told(row['number'])} to the {count} windows of"
            f" {told(row['path'])}, whose array `number` would have one for each",
            LIST_FIX,
        )
    listed = {key: value for key, value in row.items() if value}
    for index in range(count):
        own = {key: column[index] for key, column in opened.columns.items() if column[index]}
        for key, value in own.items():
            if key in listed and _meaning(key, value) != _meaning(key, listed[key]):
                raise LightningDiTError(
                    f"{row['line']} says {key} {told(listed[key])}, and window {index} of {told(row['path'])} itself"
                    f" says {told(value)}",
                    LIST_FIX,
                )
        place = {"number": str(index), "recording": stem, "index": str(index)} if not opened.single else {}
        yield row | place | listed | own


def _meaning(key: str, text: str) -> str | float:
    """Return a value of a list or an array as it counts: 7.0 is the number 7, and train is training."""
    if key == "number" and re.fullmatch(NUMBER, text):
        return float(text)
    return (part_of(text) or text) if key == "part" else text


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
        example = told(next(iter(paths)))
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
        raise LightningDiTError(f"the pattern fits none of {len(odd)} files, such as {told(odd[0])}", NAME_FIX)
    strangers = [row["path"] for row in complete if _names_another(row)]
    if strangers:
        notes.append(f"{len(strangers)} files have another person's number in their name: {told(strangers[0])}")
    if odd:
        some = ", ".join(map(told, odd[:3]))
        notes.append(f"passed over {len(odd)} files whose names the pattern does not fit: {some}")
    return complete, chosen.pattern


def _names_another(row: Mapping[str, str]) -> bool:
    """Return whether a file is called ID8_... and lies with the windows of another person."""
    named = re.match(r"(?i:id)[_-]?([0-9]+)[_-]", PurePosixPath(row["path"]).name)
    own = _trailing_digits(row["person"])
    return bool(named and own and named[1].lstrip("0") != own.lstrip("0"))  # Python makes no integers of long texts


def _trailing_digits(name: str) -> str:
    return name[len(name.rstrip(DIGITS)) :]


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
        if not re.fullmatch(NUMBER, number):
            raise LightningDiTError(
                f"{told(row['path'])}{', ' + row['line'] if 'line' in row else ''} has the running number"
                f" {number[:40]!r}, a whole number was expected",
                NAME_FIX,
            )
        if not row.get("person"):
            where = row.get("line", "")
            raise LightningDiTError(f"{told(row['path'])} has no person {where}".rstrip(), NAME_FIX)
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


def missing_people(people: Sequence[str], count: int | None = None) -> tuple[list[str], int]:
    """Return the first names that a row of numbered people lacks, at most `MISSING_TOLD`, and how many it lacks.

    Args:
        count: the number that the row goes up to; by default the highest one, unless that is of a register, which no
            row has in full.
    """
    digits = [_trailing_digits(name) for name in people]
    prefixes = {name[: len(name) - len(own)] for name, own in zip(people, digits, strict=True)}
    if len(prefixes) != 1 or not all(0 < len(own) <= MOST_DIGITS for own in digits):
        return [], 0
    [prefix], width, have = prefixes, min(map(len, digits)), {*map(int, digits)}
    last = count or max(have)
    if count is None and last > 10 * len(have) + 100:
        return [], 0
    missing = (number for number in range(min(1, *have), last + 1) if number not in have)
    names = [f"{prefix}{number:0{width}d}" for number in itertools.islice(missing, MISSING_TOLD)]
    return names, last + 1 - min(1, *have) - sum(number <= last for number in have)


def other_split(root: Path, windows: Sequence[Window]) -> tuple[dict[str, str], str]:
    """Return the part of each window, by its name, that `data_split.json` gives it, and a note.

    The file has lists of paths or names of files under keys such as train and test, at any depth; a person's name
    stands for all of the person's windows.
    """
    file = root / OTHER_SPLIT
    if not file.is_file():
        return {}, ""
    try:
        leaves = list(_leaves(json.loads(read_text(file)), ""))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{OTHER_SPLIT} cannot be read ({first_line(error)})"
    by_text: dict[str, list[Window]] = defaultdict(list)
    for window in windows:
        path = PurePosixPath(window.file)
        for text in {window.file, path.name, path.stem, window.person}:
            by_text[text].append(window)
    deepest = max((text.count("/") for text in by_text), default=0)
    said: dict[str, str] = {}  # by the text of windows, the last entry last
    unknown = 0
    for text, part in leaves:
        known = next((tail for tail in _tails(text, deepest) if tail in by_text), None)
        unknown += known is None
        if known is not None:
            said.pop(known, None)
            said[known] = part
    parts = {window.name: part for known, part in said.items() for window in by_text[known]}
    note = f"{unknown} of {len(leaves)} entries of {OTHER_SPLIT} name no window that is there" if unknown else ""
    if not leaves:
        note = f"{OTHER_SPLIT} has no lists of files under train, validation or test: it was not compared"
    return parts, note


def _tails(text: str, deepest: int) -> Iterator[str]:
    """Yield the ends of a path that have at most `deepest` slashes, the longest first."""
    posix = PureWindowsPath(text).as_posix() if "\\" in text else text
    names = posix.rsplit("/", deepest + 1)
    yield from ("/".join(names[at:]) for at in range(max(0, len(names) - deepest - 1), len(names)))


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
