"""Whose a window is: folders, lists, patterns, and what is wrong with them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.radar import layouts
from LightningDiT.radar.layouts import Collected, collect, missing_people, other_split


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def keys(collected: Collected) -> list[tuple[str, str, str, int]]:
    return [(one.person, one.condition, one.recording, one.number) for one in collected.windows]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["ID_7/ID7_case1_1_Doppler102.jpg", "ID_10/ID10_case2_1_Doppler3.jpg"],
            [("ID_7", "", "case1_1", 102), ("ID_10", "", "case2_1", 3)],
        ),
        (
            ["Normal_line/ID_7/ID7_case1_1_Doppler102.jpg", "Bag/ID_8/ID8_case1_1_Doppler1.jpg"],
            [("ID_7", "Normal_line", "case1_1", 102), ("ID_8", "Bag", "case1_1", 1)],
        ),
        (
            ["01/Bag_Phone/free/3.png", "31/Normal/line/12.png"],
            [("01", "Bag_Phone/free", "", 3), ("31", "Normal/line", "", 12)],
        ),
        (
            ["Normal_line/01/x_3.png", "Normal_line/02/x_4.png"],
            [("01", "Normal_line", "x", 3), ("02", "Normal_line", "x", 4)],
        ),
        (["li/w12.png", "wang/w3.png"], [("li", "", "", 12), ("wang", "", "", 3)]),
        (["ID1_a_2.png", "ID2_a_3.png"], [("ID1", "", "a", 2), ("ID2", "", "a", 3)]),
        (["train/ID_1/D3.png", "test/ID_2/D4.png"], [("ID_1", "", "", 3), ("ID_2", "", "", 4)]),
        (["subject3/Doppler8.tif", "subject4/Doppler9.tif"], [("subject3", "", "", 8), ("subject4", "", "", 9)]),
    ],
)
def test_names_of_folders_and_files_say_whose_a_window_is(
    names: list[str], expected: list[tuple[str, str, str, int]], tmp_path: Path
) -> None:
    collected = collect(touched(tmp_path, *names))
    assert keys(collected) == expected
    assert collected.pattern


def test_a_part_is_no_condition(tmp_path: Path) -> None:
    names = ("训练集/Bag/ID_1/D3.png", "Testing/Bag/ID_1/D4.png", "val_set/Bag/ID_2/D1.png")
    collected = collect(touched(tmp_path, *names))
    assert {one.condition for one in collected.windows} == {"Bag"}
    assert [one.part for one in collected.windows] == ["training", "test", "validation"]


def test_folders_of_passes_are_part_of_the_recording(tmp_path: Path) -> None:
    names = [f"{person:02d}/Bag/{run}/r_D{n}.png" for person in (1, 2, 3) for run in (1, 2) for n in (1, 2)]
    collected = collect(touched(tmp_path, *names))
    assert keys(collected)[:4] == [("01", "Bag", f"{run}/r", n) for run in (1, 2) for n in (1, 2)]
    assert any("such as 1 counts as a recording" in note for note in collected.notes)
    again = collect(tmp_path, collected.pattern)  # the printed expression reads the same
    assert keys(again) == keys(collected)


def test_one_person_under_several_names_is_a_warning(tmp_path: Path) -> None:
    collected = collect(touched(tmp_path, *(f"{name}/D{n}.png" for name in ("ID_4", "id04", "ID_5") for n in range(3))))
    [note] = [note for note in collected.notes if note.startswith("warning: ")]
    assert note.startswith("warning: ID_4, id04 may be one person and count as 2")


def test_a_list_without_numbers_takes_them_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("path,person\n" + "".join(f"Doppler{n}_1.jpg,li\n" for n in (3, 7, 20)))
    assert [number for *_, number in keys(collect(tmp_path / "all.csv"))] == [3, 7, 20]


def test_a_pattern_of_ones_own(tmp_path: Path) -> None:
    touched(tmp_path, "2024/anna-walk-0012.png", "2024/ben-walk-7.png", "2024/readme.png")
    collected = collect(tmp_path, r"(?P<person>[a-z]+)-(?P<condition>walk)-(?P<number>\d+)")
    assert keys(collected) == [("anna", "walk", "", 12), ("ben", "walk", "", 7)]
    assert any("1 files whose names the pattern does not fit: 2024/readme.png" in note for note in collected.notes)
    for pattern, reason in (("(", "no regular expression"), ("x", "the groups none"), ("(?P<who>x)", "groups who")):
        with pytest.raises(LightningDiTError, match=reason):
            collect(tmp_path, pattern)
    with pytest.raises(LightningDiTError, match="fits none of 3 files"):
        collect(tmp_path, "(?P<person>zzz)")


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_list_has_columns(sign: str, tmp_path: Path) -> None:
    rows = [
        ["Path", "person", "condition", "recording", "number", "split"],
        [r"a\x.png", "li", "Bag", "r1", "7", "test"],
    ]
    listing = tmp_path / "all.csv"
    listing.write_text("\ufeff" + "\n".join(sign.join(row) for row in rows), encoding="utf-8")
    [window] = collect(listing).windows
    assert window.file == "a/x.png"
    assert (window.person, window.condition, window.recording, window.number) == ("li", "Bag", "r1", 7)
    assert window.part == "test"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.png,li\n", "a header with path, person"),
        ("path,person,number\na.png,li,one\n", "line 2 has the running number 'one'"),
        ("path,person,number\na.png,,1\n", "has no person line 2"),
        ("path,person,Person\na.png,li,wang\n", "has 2 columns person, one is expected; fix: correct the list"),
        ("path,split,part\na.png,test,train\n", "has 2 columns part"),
        ("path,person\na.png,li\nb.png,li\na.png,wang\n", "lines 2 and 4 of the list .* both name a.png"),
        (f"path,person\n{'a/' * 2100}b.png,li\n", "line 2 of the list .* has a path of 4205 characters, at most 4096"),
    ],
)
def test_a_wrong_list_is_one_line(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(LightningDiTError, match=reason):
        collect(tmp_path / "all.csv")


def test_numbers_that_start_again_are_recordings_of_their_own(tmp_path: Path) -> None:
    listing = tmp_path / "all.csv"
    listing.write_text("path,person,number\n" + "".join(f"{at}.png,li,{at % 4}\n" for at in range(8)))
    collected = collect(listing)
    assert [one.recording for one in collected.windows] == ["#1"] * 4 + ["#2"] * 4
    assert any("start again 1 times" in note for note in collected.notes)


def test_equal_numbers_in_one_folder_stay_together(tmp_path: Path) -> None:
    collected = collect(touched(tmp_path, "li/D1.png", "li/D1.jpg", "li/D2.png", "wang/D1.png"))
    assert {one.recording for one in collected.windows} == {""}
    assert any("1 windows have the running number of another" in note for note in collected.notes)


def test_copies_in_train_and_test_keep_their_recording(tmp_path: Path) -> None:
    """Else neighbours on both sides would count as apart."""
    collected = collect(touched(tmp_path, "train/li/D1.png", "train/li/D2.png", "test/li/D1.png", "test/li/D3.png"))
    assert len({one.group for one in collected.windows}) == 1


def test_an_array_has_a_window_for_each_row(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.zeros((3, 9, 9)), person=["b", "a", "a"], number=[5, 2, 1])
    assert keys(collect(tmp_path / "x.npz")) == [("a", "", "x", 1), ("a", "", "x", 2), ("b", "", "x", 5)]
    (tmp_path / "ID_1").mkdir()
    np.save(tmp_path / "ID_1" / "walk.npy", np.zeros((2, 9, 9)))
    (tmp_path / "ID_1" / "broken.npy").write_bytes(b"x")
    (tmp_path / "x.npz").unlink()
    collected = collect(tmp_path)
    assert keys(collected) == [("ID_1", "", "walk", 0), ("ID_1", "", "walk", 1)]
    assert [file for file, _ in collected.damaged] == ["ID_1/broken.npy"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    touched(tmp_path, "ID_1/D1.png", "ID_4/D1.png", "ID_8/ID9_x_D1.png")
    (tmp_path / "ID_3" / "inner").mkdir(parents=True)
    collected = collect(tmp_path)
    assert collected.empty == ("ID_3", "ID_3/inner")
    assert missing_people(collected.people, 9) == (["ID_2", "ID_3", "ID_5", "ID_6", "ID_7", "ID_9"], 6)
    assert missing_people(["01", "03"]) == (["02"], 1)
    assert missing_people(["li", "wang"], 9) == missing_people([], 9) == missing_people(["ID_1", "P_2"], 9) == ([], 0)
    assert any("1 files have another person's number" in note for note in collected.notes)
    with pytest.raises(LightningDiTError, match="that is there; fix: name the folder"):
        collect(tmp_path / "none")


@pytest.mark.parametrize("count", [400, 10**12])
def test_a_number_of_people_that_was_given_counts_however_few_are_there(count: int) -> None:
    """ID_2 and ID_3 are there: all others up to the count are missing, without a list of them."""
    names, missing = missing_people(["ID_2", "ID_3"], count)
    assert (names, missing) == (["ID_1", *(f"ID_{number}" for number in range(4, 13))], count - 2)
    assert missing_people(["ID_0", "ID_3", "ID_900"], 2) == (["ID_1", "ID_2"], 2)


def test_numbers_of_a_register_are_no_row() -> None:
    assert missing_people(["ID_1", "ID_121"]) == ([], 0)  # above 10 for each person and 100 more
    assert missing_people(["ID_1", "ID_120"])[1] == 118
    assert missing_people(["ID_1", "ID_" + "9" * 5000], 400) == ([], 0)  # no integer for Python


def test_a_name_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    """In arrays, whose texts have no limit; a file's name has 255 characters at most."""
    person = "ID_" + "9" * 5000
    for name, own in (("id7_1", person), ("id7_2", "ID_007")):
        np.savez(tmp_path / f"{name}.npz", w=np.zeros((9, 9)), person=[own])
    collected = collect(tmp_path)
    assert collected.people == ["ID_007", person]
    [note] = [note for note in collected.notes if "another person's number" in note]
    assert note == "1 files have another person's number in their name: id7_1.npz"  # ID_007 is person 7


@pytest.mark.parametrize(
    ("columns", "row", "reason"),
    [
        ("person", "ID_7", "line 2 says person ID_7, and window 0 of x.npz itself says ID_1"),
        ("condition", "Bag", "line 2 says condition Bag, and window 1 of x.npz itself says Phone"),
        ("recording", "r2", "line 2 says recording r2, and window 0 of x.npz itself says r1"),
        ("split", "test", "line 2 says part test, and window 0 of x.npz itself says train"),
        ("number", "3", "line 2 gives the running number 3 to the 2 windows of x.npz"),
    ],
)
def test_a_list_that_contradicts_its_array_is_refused(columns: str, row: str, reason: str, tmp_path: Path) -> None:
    own = {"person": ["ID_1", "ID_2"], "condition": ["", "Phone"], "recording": ["r1", ""], "part": ["train", ""]}
    np.savez(tmp_path / "x.npz", w=np.zeros((2, 9, 9)), **own)
    (tmp_path / "all.csv").write_text(f"path,{columns}\nx.npz,{row}\n")
    with pytest.raises(LightningDiTError, match=f"{reason}.*; fix: correct the list"):
        collect(tmp_path / "all.csv")


def test_a_list_and_its_array_complete_one_another(tmp_path: Path) -> None:
    """Also where both say the same in other words, and where either leaves a value open."""
    np.savez(tmp_path / "x.npz", w=np.zeros((2, 9, 9)), condition=["", "Bag"], number=[5, 6], part=["train", ""])
    np.savez(tmp_path / "one.npz", w=np.zeros((9, 9)), person=["ID_2"], number=[7])
    text = "path,person,condition,number,split\nx.npz,ID_1,Bag,,training\none.npz,,,7.0,\n"
    (tmp_path / "all.csv").write_text(text)
    windows = collect(tmp_path / "all.csv").windows
    assert [(one.person, one.condition, one.number, one.part) for one in windows] == [
        ("ID_1", "Bag", 5, "training"),
        ("ID_1", "Bag", 6, "training"),
        ("ID_2", "", 7, ""),
    ]


def test_a_damaged_array_costs_none_of_the_others(tmp_path: Path) -> None:
    np.savez(tmp_path / "ID_1.npz", w=np.zeros((2, 9, 9)))
    for name, at in (("ID_2", 6), ("ID_3", 8)):  # the flags and the method of the member, in both of its headers
        content = bytearray((tmp_path / "ID_1.npz").read_bytes())
        content[at], content[content.find(b"PK\x01\x02") + at + 2] = 1, 1
        (tmp_path / f"{name}.npz").write_bytes(content)
    collected = collect(tmp_path)
    assert len(collected.windows) == 2
    assert sorted(file for file, _ in collected.damaged) == ["ID_2.npz", "ID_3.npz"]
    (tmp_path / "ID_1.npz").unlink()
    with pytest.raises(LightningDiTError, match=r"2 damaged files, the first ID_2.npz: it is no whole .npz file \("):
        collect(tmp_path)


def test_an_entry_of_a_split_with_many_folders_costs_little(tmp_path: Path) -> None:
    """All ends of a path of 60,000 folders would be 3.6 GB."""
    windows = collect(touched(tmp_path, "ID_1/D1.png", "ID_1/D2.png", "ID_2/D1.png")).windows
    entry = "a/" * 60_000
    (tmp_path / "data_split.json").write_text(json.dumps({"train": ["ID_1", entry], "test": [entry + "ID_1/D2.png"]}))
    tracemalloc.start()
    try:
        parts, note = other_split(tmp_path, windows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert parts == {"ID_1/D1.png": "training", "ID_1/D2.png": "test"}
    assert note == "1 of 3 entries of data_split.json name no window that is there"
    assert peak < 2**27  # of which 2**26 are the buffer that the file is read with


def test_a_split_that_is_nested_without_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of JSON ends at some depth, that of Python 3.12 beyond the depth at which functions of Python end."""
    windows = collect(touched(tmp_path, "ID_1/D1.png", "ID_2/D1.png")).windows
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    (tmp_path / "data_split.json").write_text('{"train": ' + "[" * 10**6 + "]" * 10**6 + "}")
    for reader in (json.loads, lambda text: {"train": deep}):
        monkeypatch.setattr(layouts.json, "loads", reader)
        parts, note = other_split(tmp_path, windows)
        assert not parts
        assert note.startswith("data_split.json cannot be read (")


def test_a_split_of_ones_own_is_read_in_many_forms(tmp_path: Path) -> None:
    windows = collect(touched(tmp_path, *(f"ID_{p}/D{n}.png" for p in (1, 2) for n in (1, 2)))).windows
    split = {"train_files": {"a": ["ID_1/D1.png"]}, "测试集": ["/old/place/ID_1/D2.png", "gone.png"], "val": ["ID_2"]}
    (tmp_path / "data_split.json").write_text(json.dumps(split))
    parts, note = other_split(tmp_path, windows)
    assert parts == {
        "ID_1/D1.png": "training",
        "ID_1/D2.png": "test",
        "ID_2/D1.png": "validation",
        "ID_2/D2.png": "validation",
    }
    assert note == "1 of 4 entries of data_split.json name no window that is there"
    for text, reason in (("{", "cannot be read"), ('{"indices": [1, 2]}', "has no lists of files")):
        (tmp_path / "data_split.json").write_text(text)
        parts, note = other_split(tmp_path, windows)
        assert not parts
        assert reason in note
