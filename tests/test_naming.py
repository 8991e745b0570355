"""Which folder names the person, which number runs, and which folders are a split: names with a known meaning."""

from __future__ import annotations

import itertools

import pytest

from LightningDiT.radar.naming import guess, one_person, part_of

CONDITIONS = ("Normal_line", "Bag_free", "Backpack_line")


def paths(form: str, **levels: object) -> list[str]:
    """Return a path for each combination of the levels' values and of four running numbers."""
    values = [list(level) for level in levels.values()]  # type: ignore[call-overload]
    named = [dict(zip(levels, chosen, strict=True)) for chosen in itertools.product(*values)]
    return [form.format(**one, n=number) for one in named for number in range(1, 5)]


def read(found: list[str]) -> tuple[dict[str, set[str]], list[str]]:
    """Return the values of each group, and the notes."""
    expression, notes = guess(found, named=False)
    assert expression
    matches = [expression.search(path) for path in found]
    assert all(matches)
    groups: dict[str, set[str]] = {}
    for match in matches:
        for key, value in match.groupdict().items() if match else ():
            groups.setdefault(key, set()).update([value] if value else [])
    return groups, notes


@pytest.mark.parametrize(
    ("form", "people", "conditions", "runs"),
    [
        ("ID_{p}/s{r}/D{n}.jpg", "ID_{p}", False, "s{r}"),
        ("{p:02d}/{c}/{r}/D{n}.jpg", "{p:02d}", True, "{r}"),
        ("{c}/{p:02d}/{r}/D{n}.jpg", "{p:02d}", True, "{r}"),
        ("{c}/{p:02d}/D{n}.jpg", "{p:02d}", True, None),
        ("{p:02d}/{c}/ID{p}_case1_1_D{n}.jpg", "{p:02d}", True, None),
        ("{c}/ID{p}_case1_1_D{n}.jpg", "ID{p}", True, None),
        ("{c}/用户{p}/多普勒{n}.jpg", "用户{p}", True, None),
        ("受试者{p}/{c}/第{r}次/{n}.jpg", "受试者{p}", True, "第{r}次"),
        ("{c}/第{p}人/{n}.jpg", "第{p}人", True, None),
        ("ID_{p}/session{r}/{c}/D{n}.jpg", "ID_{p}", True, "session{r}"),
        ("2024/ID_{p}/{c}/D{n}.jpg", "ID_{p}", True, "2024"),
        ("data/ID_{p}/{c}/D{n}.jpg", "ID_{p}", True, None),
        ("name{p}x/{r}/D{n}.jpg", "name{p}x", False, "{r}"),
        ("{c}/name{p}x/D{n}.jpg", "name{p}x", True, None),
        ("name{p}x/{c}/D{n}.jpg", "name{p}x", True, None),
        ("name{p}x/s{r}_D{n}.jpg", "name{p}x", False, None),
        ("{c}/s{p}_D{n}.jpg", "s{p}", True, None),
        ("{c}/ID_{p}.npy", "ID_{p}", True, None),
    ],
)
def test_people_conditions_and_passes_are_told_apart(
    form: str, people: str, conditions: bool, runs: str | None
) -> None:
    """Five people, two passes and three conditions, wherever their folders stand."""
    groups, _ = read(paths(form, p=range(1, 6), r=(1, 2), c=CONDITIONS))
    assert groups["person"] == {people.format(p=at) for at in range(1, 6)}
    assert groups.get("condition", set()) == ({*CONDITIONS} if conditions else set())
    assert groups.get("run", set()) == ({runs.format(r=at) for at in (1, 2)} if runs else set())
    assert "n" not in form.partition("{n}")[0] or groups.get("number", set()) in ({"1", "2", "3", "4"}, set())


def test_a_level_that_may_hold_people_as_well_is_a_warning() -> None:
    """Two folders with folders 1 and 2 each: either level may be the people. Of ten and two, the ten are."""
    for others in (("li", "wang"), (1, 2)):
        _, notes = read(paths("{c}/{p}/D{n}.jpg", p=(1, 2), c=others))
        said = [note for note in notes if "are taken for people" in note]
        assert [note.startswith("warning: names such as ") for note in said] == [True]
    _, notes = read(paths("{c}/{p:02d}/D{n}.jpg", p=range(1, 11), c="AB"))
    assert notes == [
        "names such as 01 (10 of them) are taken for people, and not those such as A (2); --pattern states another"
        " reading"
    ]
    groups, notes = read(paths("2024/{c}/D{n}.jpg", c=("anna", "ben")))
    assert groups["person"] == {"2024"}
    assert notes[0].startswith(
        "warning: names such as 2024 (1 of them) are taken for people, and not those such as anna"
    )
    _, notes = read(paths("{y}/ID_{p}/{c}/D{n}.jpg", y=("old", "new"), p=(1, 2), c=CONDITIONS))
    assert any(note.startswith("warning: folders above those of the people count for nothing: new/") for note in notes)


@pytest.mark.parametrize(
    ("form", "noted"),
    [
        ("ID_{p}/Doppler{n}_{p}.jpg", True),
        ("ID_{p}/{n}_ID{p}.jpg", True),
        ("ID_{p}/ID{p}_case1_1_Doppler{n}_0.jpg", True),
        ("ID_{p}/{n}-{p}of5 (256x256).jpg", True),
        ("ID_{p}/ID{p}_case1_1_Doppler{n}.jpg", False),
        ("ID_{p}/spec ({n}).jpg", False),
        ("ID_{p}/时频图（{n}）.jpg", False),
        ("ID_{p}/D{n}_left.jpg", False),
        ("ID_{p}/pass{r}_{n}.jpg", False),  # many recordings, each with a run of its own
    ],
)
def test_the_number_that_makes_runs_counts(form: str, noted: bool) -> None:
    """Unless a word for a window stands before the last one; see below."""
    groups, notes = read(paths(form, p=range(1, 6), r=range(10)))
    assert groups["number"] == {"1", "2", "3", "4"}
    assert any("the running number is" in note for note in notes) == noted
    assert not any("(" in name for name in groups["recording"])


def test_the_number_behind_a_word_for_a_window_counts() -> None:
    """One window of each recording is what it seems."""
    groups, notes = read(paths("ID_{p}/ID{p}_rec{n}_Doppler1.jpg", p=range(1, 6)))
    assert (groups["number"], groups["recording"], notes) == ({"1"}, {f"rec{n}" for n in range(1, 5)}, [])


def test_a_part_of_a_decimal_number_is_no_running_number() -> None:
    groups, _ = read(paths("ID_{p}/t_{n}.5s.jpg", p=range(1, 6)))
    assert "number" not in groups


@pytest.mark.parametrize("session", ["session{r}", "day_{r}", "case{r}", "第{r}次", "2023-05-0{r}", "hat{r}x"])
def test_people_with_names_may_have_more_sessions_than_there_are_people(session: str) -> None:
    names = {"张三", "李四", "王五"}
    groups, _ = read(paths("{p}/" + session + "/Doppler{n}.jpg", p=names, r=range(1, 6)))
    assert groups["person"] == names


def test_days_are_no_people() -> None:
    groups, _ = read(paths("2023050{r}/{p:02d}/Doppler{n}.jpg", p=range(1, 4), r=range(1, 6)))
    assert groups["person"] == {"01", "02", "03"}
    assert groups["condition"] == {f"2023050{r}" for r in range(1, 6)}


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("training", "train Training train_set train_data trainset traindata data_train 训练 训练集 训练数据 訓練集"),
        ("validation", "val valid_set validation-data dev 验证集 验证 校验集 驗證"),
        ("test", "test testing test_set test-images testset Test_Data_Set 测试集 测试 测试数据集 評估 评估集"),
        ("", "Normal_line 训练有素 测试者1 test_1 training1 testimony data set 集 trainer ID_1"),
    ],
)
def test_folders_of_a_split_are_known_in_both_languages(part: str, names: str) -> None:
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


def test_names_of_one_person_are_found() -> None:
    people = ["ID_4", "ID_04", "ID４", "04", "ID_5", "Li Wei", "Li_Wei", "li_wei", "anna4", "anna5"]
    assert one_person(people) == {"4": ["ID_4", "ID_04", "ID４", "04"], "liwei": ["Li Wei", "Li_Wei", "li_wei"]}
    assert one_person(["ID_1", "ID_10", "ID_11", "ID_0", "ID_" + 5000 * "1"]) == {}
