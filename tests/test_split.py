"""The split by pass: its rules, folds, guards, and the file that later steps read."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.layouts import Window
from LightningDiT.radar.overlap import Overlap, Passes
from LightningDiT.radar.split import (
    PARENT,
    Row,
    Split,
    load_split,
    make_split,
    overlapping_pair,
    restricted,
    rows_digest,
    save_restricted,
    save_split,
)

OVERLAP = Overlap(256, 1, 63.0)
FOLDS = 5


def rows_of(people: dict[str, list[int]], seed: int = 0) -> list[Row]:
    """Return the split of people whose passes have these numbers of windows."""
    windows, numbers = [], {}
    for person, counts in people.items():
        number = 0
        for pass_number, count in enumerate(counts, 1):
            for _ in range(count):
                window = Window(f"{person}/{number}.png", None, person, "", "", number)
                windows.append(window)
                numbers[window.name] = pass_number
                number += 1
            number += 3  # the next number is 4 away
    digests = {window.name: window.name for window in windows}
    return make_split(windows, Passes(numbers, 0, 0), OVERLAP, digests, FOLDS, seed)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rng = np.random.default_rng(1)
    people = {f"ID_{at}": [int(n) for n in rng.integers(1, 40, at % 12)] for at in range(1, 32) if at % 12}
    return rows_of(people)


def test_each_pass_is_tested_once_and_parts_never_cut_a_pass_but_for_a_block(rows: list[Row]) -> None:
    people: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        people[row.person][row.pass_number].append(row)
    for passes in people.values():
        for members in passes.values():
            tested = [fold for fold in range(FOLDS) if {row.parts[fold] for row in members} == {"test"}]
            assert tested == ([members[0].fold] if len(passes) > 1 else [])
            assert all(("test" in row.parts) == (len(passes) > 1) for row in members)
            kinds = [{row.parts[fold] for row in members} for fold in range(FOLDS)]
            assert all(len(kind) == 1 for kind in kinds) or len(passes) == 2


def test_fold_0_has_every_part_of_everybody_whose_passes_allow_it(rows: list[Row]) -> None:
    parts: dict[str, set[str]] = defaultdict(set)
    passes: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        parts[row.person].add(row.part)
        passes[row.person].add(row.pass_number)
    for person, found in parts.items():
        if len(passes[person]) >= 3:
            assert found == {"training", "validation", "test"}
        elif len(passes[person]) == 2:
            assert {"training", "test"} <= found
        else:
            assert found == {"training"}


def test_no_pair_of_parts_shares_pixels_in_any_fold(rows: list[Row]) -> None:
    """By brute force, against the stride and not against the code: 63 n < 256 columns are shared."""
    for fold in range(FOLDS):
        used = [row for row in rows if row.parts[fold] != "guard"]
        for person in {row.person for row in used}:
            own = [row for row in used if row.person == person]
            places = np.array([row.number for row in own])
            near = np.abs(places[:, None] - places) * 63 < 252
            kinds = np.array([row.parts[fold] for row in own])
            assert not (near & (kinds[:, None] != kinds)).any()
        assert overlapping_pair(rows, OVERLAP, fold) is None


def test_a_pair_that_shares_pixels_is_found(rows: list[Row]) -> None:
    """A split of windows at random has one."""
    mixed = [replace(row, parts=("test" if at % 5 == 0 else "training",)) for at, row in enumerate(rows)]
    assert overlapping_pair(mixed, OVERLAP, 0) is not None


def test_a_pair_that_shares_pixels_is_found_in_any_order_of_the_rows() -> None:
    """Between two neighbours in the list, one that is far from both."""
    first, second = rows_of({"a": [20, 10]})[:2]
    tested, trained = replace(first, parts=("test",)), replace(second, parts=("training",))
    far = replace(trained, number=50, file="a/far.png")
    for order in itertools.permutations((tested, far, trained)):
        pair = overlapping_pair(order, OVERLAP, 0)
        assert pair is not None and {*pair} == {tested, trained}


def test_two_passes_have_a_guarded_end_block() -> None:
    rows = rows_of({"a": [20, 10]})
    assert [row.part for row in rows if row.pass_number == 2] == ["test"] * 10
    assert [row.part for row in rows if row.pass_number == 1] == ["training"] * 13 + ["guard"] * 3 + ["validation"] * 4
    assert {row.part for row in rows_of({"a": [3, 2]})} == {"training", "test"}  # too short for a block


def test_the_guard_reaches_across_a_gap_that_pixels_bridge() -> None:
    """Windows 0 to 15 and 40 to 44 are one pass, because 15 and 40 share pixels: the guard is the three before 40.

    How far they are apart is unknown, at least one step of the stride, so that 40 and 13 share 256 - 3 * 63 columns.
    """
    numbers = [*range(16), *range(40, 44), *range(100, 110)]
    windows = [Window(f"a/{number}.png", None, "a", "", "", number) for number in numbers]
    passes = Passes({one.name: 1 + (one.number >= 100) for one in windows}, 1, 0)
    rows = make_split(windows, passes, OVERLAP, {one.name: one.name for one in windows}, FOLDS)
    assert [row.part for row in rows[:20]] == ["training"] * 13 + ["guard"] * 3 + ["validation"] * 4
    assert all(overlapping_pair(rows, OVERLAP, fold) is None for fold in range(FOLDS))
    unguarded = [replace(row, parts=tuple(part.replace("guard", "training") for part in row.parts)) for row in rows]
    assert overlapping_pair(unguarded, OVERLAP, 0) is not None


def test_the_same_seed_gives_the_same_split_and_sizes_are_balanced() -> None:
    people = {"a": [20] * 10, "b": [8, 9, 10, 1, 1]}
    assert rows_of(people, 3) == rows_of(people, 3)
    assert rows_of(people, 3) != rows_of(people, 4)
    rows = rows_of(people)
    assert [sum(row.person == "a" and row.fold == fold for row in rows) for fold in range(5)] == [40] * 5
    # passes of one window make no fold of their own
    assert min(sum(row.person == "b" and row.fold == fold for row in rows) for fold in range(3)) >= 9


def windows_of(passes: list[tuple[str, int, int]]) -> tuple[list[Window], Passes, dict[str, str]]:
    """Return windows, passes and digests of a person whose passes have this condition, first number and length."""
    windows, numbers = [], {}
    for pass_number, (condition, start, count) in enumerate(passes, 1):
        for number in range(start, start + count):
            window = Window(f"a/{number}.png", None, "a", condition, "", number)
            windows.append(window)
            numbers[window.name] = pass_number
    return windows, Passes(numbers, 0, 0), {name: name for name in numbers}


@pytest.mark.parametrize("seed", range(10))
def test_each_fold_tests_every_condition_that_has_a_pass_for_it(seed: int) -> None:
    windows, passes, digests = windows_of([("A", 0, 10), ("A", 20, 10), ("B", 40, 10), ("B", 60, 10)])
    rows = make_split(windows, passes, OVERLAP, digests, 2, seed)
    for fold in (0, 1):
        assert {row.condition for row in rows if row.parts[fold] == "test"} == {"A", "B"}


def test_the_order_of_the_windows_changes_no_part() -> None:
    """Also not the guard and the end block of a pass, which are those of the running numbers."""
    windows, passes, digests = windows_of([("", 0, 20), ("", 40, 10)])
    forwards, backwards = (make_split(order, passes, OVERLAP, digests) for order in (windows, windows[::-1]))
    assert backwards == forwards[::-1]


def test_the_file_comes_back_and_is_refused_when_it_was_changed(rows: list[Row], tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    with pytest.raises(LightningDiTError, match=r"does not exist; fix: python step5_prepare_spectrograms.py --data"):
        load_split(file)
    save_split(file, tmp_path / "data", tmp_path / "data", rows, {"seed": 0, "db_range": [-60, 0]})
    split = load_split(file)
    assert list(split.rows) == rows
    assert split.settings["db_range"] == [-60, 0]
    assert len(split.part("test")) == sum(row.part == "test" for row in rows)
    text = file.read_text()
    for old, new in (('"test"', '"training"'), ('"number": 7', '"number": 8'), (FORMAT_TEXT, "x"), ("]", "")):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(LightningDiTError, match="fix: run step5_prepare_spectrograms.py again"):
            load_split(file)
    file.write_text(json.dumps({"mine": 1}))
    with pytest.raises(LightningDiTError, match="this program did not write"):
        save_split(file, tmp_path, tmp_path, rows, {})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *((key, value, "a text") for key in ("person", "condition", "file") for value in (5, None, ["a"])),
        *(
            (key, value, "a whole number")
            for key in ("number", "pass")
            for value in ("x", float("nan"), 1.5, None, True)
        ),
        *(("pass", value, "a whole number from 1 on") for value in (0, 10**30)),
        *(("index", value, "or null") for value in (-1, "0")),
        *(("fold", value, "or null") for value in ([], 0.5)),
        ("parts", "training", "training, validation, test, guard"),
        ("parts", ["training", ["test"]], "training, validation, test, guard"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: object, expected: str, tmp_path: Path) -> None:
    file, own = written_with(tmp_path, {}, {key: value})
    with pytest.raises(LightningDiTError) as refused:
        load_split(file)
    assert f"{key} of window 2 is {own!r:.60}, " in str(refused.value)
    assert expected in str(refused.value)
    assert str(refused.value).startswith(f"the split {file} cannot be read (")
    assert refused.value.fix == "run step5_prepare_spectrograms.py again"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("seed", value) for value in ("0; touch x #", -1, float("nan"), True, None)),
        *(("colour_maps", value) for value in ("jet", ["jet"], {"jet": "x"})),
        *(("db_range", value) for value in ("x", [0], [0, -45], ["-45", "0"], [float("-inf"), 0])),
        *((key, value) for key in ("window", "stride", "native_columns", "number_unit") for value in ("x", -1, [3])),
        *((key, 5) for key in ("parent", "parent_file", "data", "root", "digest")),
    ],
)
def test_a_setting_of_another_type_is_named(key: str, value: object, tmp_path: Path) -> None:
    file, _ = written_with(tmp_path, {key: value}, {})
    with pytest.raises(LightningDiTError, match=f"cannot be read .{key} is .* expected.; fix: run step5_prepare"):
        load_split(file)


def test_a_value_that_is_missing_or_unknown_is_named(tmp_path: Path) -> None:
    file, _ = written_with(tmp_path, {}, {"name": "x"})
    with pytest.raises(LightningDiTError, match="window 2 has the unknown key 'name'"):
        load_split(file)
    content = json.loads(file.read_text())
    del content["windows"][1]["name"], content["windows"][1]["person"]
    file.write_text(json.dumps(content))
    with pytest.raises(LightningDiTError, match="person of window 2 is missing, a text is expected"):
        load_split(file)


def written_with(folder: Path, head: dict[str, object], row: dict[str, object]) -> tuple[Path, object]:
    """Return the file of a split with other values in its head and in its second row, and the value of that as read.

    As in a file made to deceive, the digest is that of the rows wherever it can be computed.
    """
    file = folder / "split.json"
    rows = rows_of({"a": [2, 2]})
    settings = {"seed": 3, "window": 9, "stride": 2.5, "colour_maps": {"jet": 4}, "native_columns": None}
    save_split(file, folder, folder, rows, settings | {"db_range": [-45, 0.5], "number_unit": 1, "shares_up_to": 3})
    assert load_split(file).settings["db_range"] == [-45, 0.5]
    content = json.loads(file.read_text())
    content["windows"][1] |= row
    fields = {("pass_number" if key == "pass" else key): value for key, value in row.items() if key != "name"}
    content["digest"] = rows_digest([rows[0], replace(rows[1], **fields), *rows[2:]])
    file.write_text(json.dumps(content | head))
    return file, next(iter(json.loads(json.dumps(row)).values()), None)


FORMAT_TEXT = "passes of spectrograms, 1"


def test_a_test_window_in_the_training_is_refused_by_name_and_by_pixels(rows: list[Row], tmp_path: Path) -> None:
    save_split(tmp_path / "split.json", tmp_path, tmp_path, rows, {})
    split = load_split(tmp_path / "split.json")
    training, tested = split.part("training"), split.part("test")
    split.refuse_tested([row.name for row in training], [row.digest for row in training])
    with pytest.raises(LightningDiTError, match="is a test window of fold 0"):
        split.refuse_tested([training[0].name, tested[0].name])
    with pytest.raises(LightningDiTError, match="is a test window of fold 0"):
        split.refuse_tested(["renamed.png"], [tested[0].digest])
    with pytest.raises(LightningDiTError, match="folds 0 to 4 are there"):
        split.part("test", 5)


def test_a_test_window_is_one_of_the_fold_that_is_trained() -> None:
    rows = rows_of({"a": [20] * FOLDS})
    split = Split("data", "root", tuple(rows), FOLDS, {}, rows_digest(rows))
    split.refuse_tested([row.name for row in split.part("training", 1)], fold=1)  # fold 0 tests some of them
    with pytest.raises(LightningDiTError, match="is a test window of fold 1"):
        split.refuse_tested([split.part("test", 1)[0].name], fold=1)


def test_a_restricted_split_trains_on_the_kept_windows_alone(rows: list[Row], tmp_path: Path) -> None:
    """Part by part and fold by fold: only training windows of that fold change, and only to guards."""
    split, fold = Split("data", "root", tuple(rows), FOLDS, {"seed": 3}, rows_digest(rows)), 2
    training = [at for at, row in enumerate(rows) if row.parts[fold] == "training"]
    kept = training[::3]
    guards = {*training} - {*kept}
    for at, (row, own) in enumerate(zip(rows, restricted(split, kept, fold), strict=True)):
        expected = list(row.parts)
        expected[fold] = "guard" if at in guards else expected[fold]
        assert own.parts == tuple(expected)
        assert (own.name, own.digest, own.fold) == (row.name, row.digest, row.fold)
    for part in ("validation", "test", "guard"):
        odd = next(at for at, row in enumerate(rows) if row.parts[fold] == part)
        with pytest.raises(LightningDiTError, match=f"to be trained on and is a {part} window of fold {fold}"):
            restricted(split, [*kept, odd], fold)
    save_restricted(tmp_path / "own.json", split, tmp_path / "split.json", kept, fold)
    own = load_split(tmp_path / "own.json")
    assert own.parent == split.digest != own.digest
    assert (split.parent, own.settings["seed"], PARENT) == (None, 3, "parent")
    assert [row.name for row in own.part("training", fold)] == [rows[at].name for at in kept]
