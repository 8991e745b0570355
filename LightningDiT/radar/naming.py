"""How folders and files are called: words for people, passes and parts, and the layout that fits a data set best."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from LightningDiT.console import printable
from LightningDiT.data.image_files import shown
from LightningDiT.data.labels import natural_key

#: Words for the parts of a split, alone or with one of `FILLERS`.
PARTS = {
    **dict.fromkeys(("train", "training", "trn", "训练", "訓練"), "training"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "验证", "驗證", "校验", "开发"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout"), "test"),
    **dict.fromkeys(("测试", "測試", "评估", "評估", "评测"), "test"),
}
FILLERS = (
    *("dataset", "datasets", "data", "set", "split", "subset", "images", "image", "imgs", "files", "samples"),
    *("windows", "spectrograms", "数据集", "數據集", "样本集", "图像集", "数据", "數據", "样本", "图像", "图片"),
    *("部分", "集", "组"),
)
_WORDS = "id|person|subject|subj|sub|user|walker|people|participant|volunteer"
_RUNS = "pass|run|trial|take|walk|walking|seq|sequence|rec|recording|session|sess|s|p|t|r"
_STEMS = "甲乙丙丁戊己庚辛壬癸"
_CHINESE = "用户|人员|行人|受试者|被试者|被试|志愿者|参与者|实验者|测试者|对象|人"
#: Names that say that they are of a person: ID_7, user3, person_A; 用户1, 受试者甲; 第1人, 3号.
NAMED = (
    rf"(?P<person>(?i:{_WORDS})(?:[_\- ]?\d+|[_\- ][A-Za-z](?![A-Za-z])))",
    rf"(?P<person>(?:{_CHINESE})[_\- ]?(?:\d+|[A-Za-z{_STEMS}]))",
    rf"(?P<person>第\d+[号位名个]?(?:{_CHINESE})|第?\d+号(?:{_CHINESE})?)",
)
NUMBER = r"(?P<person>(?i:[sp][_\- ]?)?\d+)"  # of a person, or of a session or pass
ANY = r"(?P<person>[^/]+)"
#: A folder of a session or pass; below a person it is a part of the recording's name.
RUN = (
    rf"(?P<run>(?i:(?:{_RUNS})[_\- ]?)?\d+"
    r"|第?\d+(?:次|趟|遍|组|段)|(?:趟|次|段|会话|录制)\d+)/"
)
ABOVE = r"(?:(?P<condition>.+)/)?"
PASSED = "(?:[^/]+/){1,3}"  # folders above the people that count for nothing
BELOW = r"(?P<condition>.+)/"
#: Words of conditions; a level of folders with such names holds no people.
CONDITIONS = re.compile(
    r"(?i:normal|back ?pack|bag|phone|line|free|slow|fast|walk|carry|coat|cloth)"
    r"|正常|背包|提包|手机|直线|自由|步行|行走|跑步"
)
#: A day, as 20230501, 2023-05-01 or 2023年5月1日; a level of folders with such names holds no people.
DATE = re.compile(r"(?:19|20)\d{6}|(?:19|20)\d\d[-_.年]\d{1,2}[-_.月]\d{1,2}日?")
_ID = r"(?:(?i:id)[_-]?\d+[_-])?"
MOST_TAILS = 5  # numbers in a file's name after the running number
_WHOLE = r"(?<!\d)(?<!\d\.)(?P<number>\d+)(?!\.\d)"  # and no part of a decimal number, such as seconds
FILES = tuple(
    rf"{_ID}(?P<recording>[^/]*?)[_\- ]?[A-Za-z]*(?: ?[(（])?{_WHOLE}{tail}[^\d/]*\.\w+$"
    for tail in ("", *(rf"(?:[^\d/]+\d+){{{count}}}" for count in range(1, MOST_TAILS + 1)))
)
UNNUMBERED = r"(?P<recording>)[^/]+$"
WHOLE = r"\.\w+$"  # of a file that holds a person
ENOUGH = 0.9  # share of the files that a layout must fit
MANY = 0.8  # share of the names of a level that have a condition's word, from which on it holds conditions
PATTERN = "--pattern states another reading"
WARNING = "warning: "  # begins a note that asks for a look
LINE_ENDS = "[\t\n\r\u2028\u2029]"  # and tabs, which `printable` leaves
MOST_TOLD = 160  # letters of a name in a message


def told(name: str | Path, most: int = MOST_TOLD) -> str:
    """Return a name as a message shows it: in one line, and a long one without its middle."""
    text = re.sub(LINE_ENDS, "?", printable(shown(name)))
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


@dataclass(frozen=True)
class Reading:
    """A layout of folders with the people that it finds.

    Attributes:
        folders: a regular expression without that of the file's name.
        people: their names, sorted.
        owners: the person of each path that it fits.
        runs: folders that count as recordings.
        passed: folders above the people that count for nothing.
        is_twofold: whether a level of the folders above has a name for each person too.
    """

    folders: str
    people: tuple[str, ...]
    owners: tuple[str, ...]
    runs: frozenset[str]
    passed: frozenset[str]
    is_twofold: bool


@functools.cache
def part_of(name: str) -> str:
    """Return the part of a split that a name stands for, such as train_set, testdata or 训练集; empty for none."""
    text = re.sub(r"[_\W]+", " ", unicodedata.normalize("NFKC", name).lower()).strip()
    if text in PARTS:
        return PARTS[text]
    for filler in FILLERS:
        bare = text.removesuffix(filler).strip() if text.endswith(filler) else text.removeprefix(filler).strip()
        if bare != text and (part := part_of(bare)):
            return part
    return ""


def without_part(path: str) -> tuple[str, str]:
    """Return a path without its folders train, validation and test, and the part that they name."""
    *folders, name = path.split("/")
    parts = [part for part in map(part_of, folders) if part]
    return "/".join([folder for folder in folders if not part_of(folder)] + [name]), parts[-1] if parts else ""


def guess(paths: Sequence[str], named: bool) -> tuple[re.Pattern[str] | None, list[str]]:
    """Return the regular expression that reads paths, None if no layout fits, and notes on what was assumed.

    Args:
        paths: below the data's folder, without those of parts.
        named: whether people are known, so that numbers alone are looked for.
    """
    reading, notes = _best(paths)
    if reading is None:
        return (_numbered("^(?:.*/)?", paths)[0], []) if named else (None, [])
    if reading.folders.endswith(WHOLE):
        return re.compile(reading.folders), notes
    expression, note = _numbered(reading.folders, paths)
    return expression, note if named else [*notes, *note]


def _readings(layouts: Sequence[str], paths: Sequence[str]) -> list[Reading]:
    """Return the layouts that fit `ENOUGH` of the paths."""
    found = []
    for folders in layouts:
        expression = re.compile(folders if folders.endswith("$") else f"{folders}[^/]+$")
        matches = [match for match in map(expression.search, paths) if match]
        if len(matches) < ENOUGH * len(paths):
            continue
        said = [match.groupdict() for match in matches]
        people, runs = ({one[key] for one in said if one.get(key)} for key in ("person", "run"))
        outer = {match.string[: match.start("person")] for match in matches if PASSED in folders}
        names = tuple(sorted(people, key=natural_key))
        owners = tuple(one["person"] for one in said)
        is_twofold = _has_level(owners, [(one.get("condition") or "").split("/") for one in said])
        found.append(Reading(folders, names, owners, frozenset(runs), frozenset(outer), is_twofold))
    return found


def _has_level(owners: Sequence[str], folders: Sequence[Sequence[str]]) -> bool:
    """Return whether some level of the windows' folders has one name for each owner."""
    for level in zip(*folders, strict=False):
        pairs = {*zip(owners, level, strict=True)}
        if 1 < len({*owners}) == len({*level}) == len(pairs):
            return True
    return False


def _levels(*people: str) -> tuple[str, ...]:
    """Return the layouts in which a folder called as one of `people` holds a person's windows, the likeliest first."""
    forms = ("^{0}/{2}{3}", "^{0}/{3}{2}", "^{1}{0}/{3}", "^{1}{0}/", "^{3}{0}/{2}", "^{0}/{2}", "^{4}{0}/{2}")
    return tuple(form.format(person, ABOVE, BELOW, RUN, PASSED) for form in forms for person in people)


def _best(paths: Sequence[str]) -> tuple[Reading | None, list[str]]:
    """Return the layout that tells people apart, and notes on the others that fit.

    A level whose folders say that they are people's comes first, then numbers, then any names. Where the last level of
    numbers may be passes too, the level with more names is that of the people.
    """
    in_file = [f"^{ABOVE}{person}{end}" for end in (r"[_\- ]", WHOLE) for person in NAMED]
    stated = _most(_readings(_levels(*NAMED), paths))
    if stated is None or len(stated.people) == 1:
        files = [one for one in _readings(in_file, paths) if not one.is_twofold]
        stated = _most([*([stated] if stated else []), *files])
    if stated:
        return stated, [*_noted_folders(stated)]
    numbers = _readings(_levels(NUMBER), paths)
    any_names = (f"^{ANY}/{BELOW}{RUN}", f"^{ABOVE}{ANY}/{RUN}", f"^{ANY}/(?:{BELOW})?", f"^{BELOW}{ANY}/")
    named = _readings(any_names, paths)
    like_people = [one for one in named if not _are_conditions(one.people) and not _are_dates(one.people)]
    numbers = [one for one in numbers if not _are_dates(one.people)] or numbers
    best, rivals = _most(numbers), numbers
    if best is None:
        files = _readings((f"^{ABOVE}{NUMBER}[_\\- ]",), paths)
        best, rivals = _first(like_people or named), [*like_people, *files]
        if files and (best is None or len(best.people) == 1 or not like_people):
            best = _most(files)
    elif len(best.people) == 1:
        rivals = [*numbers, *like_people]
    elif best.folders == f"^{ABOVE}{NUMBER}/":  # numbers of people, or of passes of people with names
        rivals = [*(one for one in like_people if one.runs), *numbers]
        best = _most(rivals)
    return best, [*_noted_rival(best, rivals), *_noted_folders(best)] if best else []


def _most(readings: Sequence[Reading]) -> Reading | None:
    """Return the first of the readings with most people."""
    return max(readings, key=lambda one: len(one.people), default=None)


def _first(readings: Sequence[Reading]) -> Reading | None:
    """Return the first of the readings with several people: of names that say nothing, those of the upper level."""
    return next((one for one in readings if len(one.people) > 1), next(iter(readings), None))


def _are_dates(names: Sequence[str]) -> bool:
    return all(DATE.fullmatch(name) for name in names)


def _are_conditions(names: Sequence[str]) -> bool:
    return sum(bool(CONDITIONS.search(name)) for name in names) >= MANY * len(names)


def _noted_rival(best: Reading, rivals: Sequence[Reading]) -> Iterator[str]:
    """Yield a line about another level that might hold the people; a warning where it has as many names."""
    other = _most([one for one in rivals if one.owners != best.owners])
    if other is None or len(other.people) < 2:
        return
    sure = len(best.people) > len(other.people)
    are_runs = {*other.people} <= best.runs  # of which there is a note of their own
    if not (are_runs and (sure or not any(name.isdecimal() for name in other.people))):
        yield (
            f"{'' if sure else WARNING}names such as {told(best.people[0])} ({len(best.people)} of them) are taken"
            f" for people, and not those such as {told(other.people[0])} ({len(other.people)}); {PATTERN}"
        )


def _noted_folders(best: Reading) -> Iterator[str]:
    """Yield lines about folders that are no people, conditions or parts."""
    if best.runs:
        run = min(best.runs, key=natural_key)
        yield f"a folder of a person such as {told(run)} counts as a recording, not as a condition; {PATTERN}"
    if len(best.passed) > 1:
        some = ", ".join(told(name) for name in sorted(best.passed)[:3])
        yield f"{WARNING}folders above those of the people count for nothing: {some}; {PATTERN}"


def _numbered(folders: str, paths: Sequence[str]) -> tuple[re.Pattern[str] | None, list[str]]:
    """Return the expression for folders and files, and a note if not the last number of the files' names counts.

    The last one counts unless windows would stand alone by it, and another one makes longer runs.
    """
    fitting: list[tuple[int, re.Match[str], re.Pattern[str]]] = []
    for file in FILES:
        expression = re.compile(folders + file)
        matches = [match for match in map(expression.search, paths) if match]
        if len(matches) >= ENOUGH * len(paths):
            fitting.append((_neighbours(matches), matches[0], expression))
    if not fitting:
        expression = re.compile(folders + UNNUMBERED)
        return (expression if any(map(expression.search, paths)) else None), []
    last = fitting[0]
    best = max(fitting, key=lambda one: one[0])
    if 2 * last[0] >= best[0] or _is_called_a_window(last[1]):
        return last[2], []
    name = last[1].string.rpartition("/")[2]
    number, by_last = best[2].search(last[1].string), last[1]["number"]
    said = number["number"] if number else "another"
    return best[2], [
        f"in names such as {told(name)} the running number is {said}, not {by_last}, by which nearly every window"
        f" would be a recording of its own; {PATTERN}"
    ]


def _is_called_a_window(match: re.Match[str]) -> bool:
    """Return whether a word for no person, pass or condition stands right before the number, as in Doppler12."""
    word = re.search(r"[A-Za-z]{2,}$", match.string[: match.start("number")])
    return bool(word) and not re.fullmatch(rf"(?i:{_WORDS}|{_RUNS}|case|cond|condition)", word[0])


def _neighbours(matches: Sequence[re.Match[str]]) -> int:
    """Return how many windows follow another one in their recording."""
    groups: dict[tuple[str | None, ...], set[str]] = defaultdict(set)
    for match in matches:
        said = match.groupdict()
        groups[tuple(said.get(key) for key in ("person", "condition", "run", "recording"))].add(said["number"])
    return sum(len(numbers) - 1 for numbers in groups.values())


def one_person(people: Sequence[str]) -> Mapping[str, list[str]]:
    """Return names that may be one person's, by what they have in common: the number, or the letters in any case."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in people:
        text = unicodedata.normalize("NFKC", name).casefold().strip()
        stated = any(re.fullmatch(known, text) for known in (*NAMED, NUMBER))
        digits = re.search(r"\d+", text) if stated else None
        key = digits[0].lstrip("0") or "0" if digits else re.sub(r"[\W_]+", "", text) or text
        found[key].append(name)
    return {key: names for key, names in found.items() if len(names) > 1}
