"""What a training may see of a split: latents of its training windows, and for validation of its validation windows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from LightningDiT.config import Config, DataConfig, TrainConfig
from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.errors import LightningDiTError
from LightningDiT.radar.split import Split, load_split, save_split
from LightningDiT.training.parts import check_parts
from tests.test_split import rows_of
from tests.walkers import prepared

PEOPLE = {"a": [6, 7, 5], "b": [6, 6, 6], "c": [14, 6]}


@pytest.fixture
def split(tmp_path: Path) -> Split:
    save_split(tmp_path / "split.json", tmp_path, tmp_path, rows_of(PEOPLE), {})
    return load_split(tmp_path / "split.json")


def latents(
    folder: Path, of: Split, rows: Sequence[int], part: str, fold: int = 0, conditions: bool = False, **told: object
) -> str:
    """Write shards of these rows with a manifest, of which `told` replaces entries."""
    split = of
    numbers = torch.tensor(rows)
    labels = torch.tensor([split.people.index(split.rows[row].person) for row in rows])
    for index, chosen in enumerate((slice(None, 3), slice(3, None))):
        count = len(numbers[chosen])
        extras = {"windows": numbers[chosen], **({"conditions": torch.ones(count).long()} if conditions else {})}
        write_shard(shard_path(folder, 0, index), torch.zeros(count, 1, 2, 2), labels[chosen], extras=extras)
    usual = {"class_names": split.people, "split": {"digest": split.digest, "fold": fold, "part": part}}
    usual |= {"condition_names": ["Bag", "Normal"]} if conditions else {}
    (folder / LATENTS_MANIFEST).write_text(json.dumps({**usual, **told}))
    return str(folder)


def rows_in(split: Split, part: str, fold: int = 0) -> list[int]:
    return [at for at, row in enumerate(split.rows) if row.parts[fold] == part]


def config(tmp_path: Path, data_path: str, valid_path: str | None = None, fold: int = 0, **more: object) -> Config:
    split_file = str(tmp_path / "split.json")
    data = DataConfig(data_path=data_path, valid_path=valid_path, split_file=split_file, fold=fold)
    return Config(data=replace(data, **more), train=TrainConfig(valid_every=1))


def folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / name).mkdir()
    return tmp_path / name


@pytest.mark.parametrize("fold", [0, 1])
def test_training_and_validation_windows_of_one_fold_pass(split: Split, tmp_path: Path, fold: int) -> None:
    trained = latents(folder(tmp_path, "t"), split, rows_in(split, "training", fold) * 2, "training", fold)
    valid = latents(folder(tmp_path, "v"), split, rows_in(split, "validation", fold), "validation", fold)
    assert check_parts(config(tmp_path, trained, valid, fold)) == []
    other = config(tmp_path, trained, valid, 1 - fold)
    with pytest.raises(LightningDiTError, match=f"latents of fold {fold}; .* fix: set data.fold: {fold}"):
        check_parts(other)


def test_each_window_that_is_no_training_window_is_refused(split: Split, tmp_path: Path) -> None:
    good = rows_in(split, "training")
    for part, said in (
        ("test", "is a test window of fold 0"),
        ("validation", "of the part validation"),
        ("guard", "of the part guard"),
    ):
        wrong = [*good, rows_in(split, part)[0]]
        where = latents(folder(tmp_path, part), split, wrong, "training")
        with pytest.raises(LightningDiTError, match=said):
            check_parts(config(tmp_path, where))
    trained = latents(folder(tmp_path, "good"), split, good, "training")
    valid = latents(folder(tmp_path, "v"), split, [*rows_in(split, "validation"), good[0]], "validation")
    with pytest.raises(LightningDiTError, match="data.valid_path .* of the part training, and 0 more"):
        check_parts(config(tmp_path, trained, valid))


def test_a_training_window_with_the_pixels_of_a_test_window_is_refused(tmp_path: Path) -> None:
    rows = rows_of(PEOPLE)
    tested = next(row for row in rows if row.part == "test")
    at = next(at for at, row in enumerate(rows) if row.part == "training")
    rows[at] = replace(rows[at], digest=tested.digest)
    save_split(tmp_path / "split.json", tmp_path, tmp_path, rows, {})
    split = load_split(tmp_path / "split.json")
    where = latents(folder(tmp_path, "t"), split, rows_in(split, "training"), "training")
    with pytest.raises(LightningDiTError, match="is a test window of fold 0"):
        check_parts(config(tmp_path, where))


def test_manifests_of_other_parts_splits_and_none(split: Split, tmp_path: Path) -> None:
    good, told = rows_in(split, "training"), {"digest": split.digest, "fold": 0, "part": "training"}
    for name, changed, said in (
        ("part", {**told, "part": "validation"}, "holds latents of the part validation"),
        ("split", {**told, "digest": "0"}, "holds latents of another split"),
        ("none", None, "do not say which windows of data.split_file"),
        ("odd", {"digest": "0"}, "does not say which split"),
        ("word", {**told, "part": "mine"}, "there is no part 'mine'"),
    ):
        where = latents(folder(tmp_path, name), split, good, "training", split=changed)
        with pytest.raises(LightningDiTError, match=said):
            check_parts(config(tmp_path, where))
    (tmp_path / "none" / LATENTS_MANIFEST).unlink()
    with pytest.raises(LightningDiTError, match="do not say which windows"):
        check_parts(config(tmp_path, str(tmp_path / "none")))
    (tmp_path / "none" / LATENTS_MANIFEST).write_text("{")
    with pytest.raises(LightningDiTError, match="cannot be read"):
        check_parts(config(tmp_path, str(tmp_path / "none")))


def test_without_a_split_file_the_latents_own_words_count(split: Split, tmp_path: Path) -> None:
    trained = latents(folder(tmp_path, "t"), split, rows_in(split, "training"), "training")
    valid = latents(folder(tmp_path, "v"), split, rows_in(split, "validation"), "validation")
    other = latents(folder(tmp_path, "o"), split, rows_in(split, "validation", 1), "validation", 1)
    plain = latents(folder(tmp_path, "p"), split, [0, 1], "training", split=None)
    own = {"split_file": None}
    notes = check_parts(config(tmp_path, trained, valid, **own))
    assert [note.split(" by its own words")[0] for note in notes] == [
        "data.data_path holds training windows of fold 0",
        "data.valid_path holds validation windows of fold 0",
    ]
    for first, second, said in (
        (valid, None, "holds latents of the part validation, those of the part training"),
        (trained, trained, "holds latents of the part training, those of the part validation"),
        (trained, other, "extract both from the same split and fold"),
        (trained, plain, "extract both from the same split and fold"),
    ):
        with pytest.raises(LightningDiTError, match=said):
            check_parts(config(tmp_path, first, second, **own))
    assert check_parts(config(tmp_path, plain, plain, **own)) == [
        f"classes without a latent in {plain}, which are never trained: b, c"
    ]
    assert check_parts(Config()) == []
    assert check_parts(config(tmp_path, str(tmp_path / "nowhere"), str(tmp_path / "nothing"))) == []  # said by others
    assert check_parts(config(tmp_path, trained, str(tmp_path / "nothing"))) == []


def test_labels_and_rows_that_are_not_the_splits(split: Split, tmp_path: Path) -> None:
    good = rows_in(split, "training")
    where = folder(tmp_path, "t")
    latents(where, split, good, "training")
    count = len(good) - 3
    for windows, labels, said in (
        (torch.full((count,), len(split.rows)), torch.zeros(count, dtype=torch.long), "of a split that has"),
        (torch.tensor(good[3:]), torch.full((count,), 7), "has the class 7, and its person is number"),
        (None, torch.zeros(count, dtype=torch.long), "has shards without the rows of the split"),
    ):
        extras = {} if windows is None else {"windows": windows}
        write_shard(shard_path(where, 0, 1), torch.zeros(count, 1, 2, 2), labels, extras=extras)
        with pytest.raises(LightningDiTError, match=said):
            check_parts(config(tmp_path, str(where)))


def test_names_and_conditions_that_are_not_the_splits(tmp_path: Path) -> None:
    rows = [replace(row, condition=("Bag", "Normal")[at % 2]) for at, row in enumerate(rows_of(PEOPLE))]
    save_split(tmp_path / "split.json", tmp_path, tmp_path, rows, {})
    split = load_split(tmp_path / "split.json")
    odd = [at for at in rows_in(split, "training") if at % 2]  # those of condition 1, which `latents` writes
    fit = latents(folder(tmp_path, "fit"), split, odd, "training", conditions=True)
    assert check_parts(config(tmp_path, fit)) == [f"conditions without a latent in {fit}, which are never trained: Bag"]
    for name, chosen, told, said in (
        ("names", odd, {"class_names": ["b", "a", "c"]}, "class 0 is b by its manifest.json, and a by the split"),
        ("fewer", odd, {"class_names": ["a", "b"]}, "class 2 is missing by its manifest.json, and c by the split"),
        ("more", odd, {"class_names": ["a", "b", "c", "d"]}, "class 3 is d by its manifest.json, and missing by"),
        ("kinds", odd, {"condition_names": ["Normal", "Bag"]}, "condition 0 is Normal by its .* and Bag by the split"),
        ("numbers", rows_in(split, "training"), {}, "has the condition 1, and its condition is number 0"),
    ):
        where = latents(folder(tmp_path, name), split, chosen, "training", conditions=True, **told)
        with pytest.raises(LightningDiTError, match=said):
            check_parts(config(tmp_path, where))


def test_people_who_are_never_trained_and_random_validation_are_said(split: Split, tmp_path: Path) -> None:
    rows = [row for row in rows_in(split, "training") if split.rows[row].person != "b"]
    where = latents(folder(tmp_path, "t"), split, rows, "training")
    own = config(tmp_path, where)
    notes = check_parts(replace(own, train=replace(own.train, valid_share=0.1)))
    assert "train.valid_share holds out windows at random" in notes[0]
    assert notes[1:] == [f"classes without a latent in {where}, which are never trained: b"]
    where = latents(folder(tmp_path, "c"), split, rows_in(split, "training"), "training", conditions=True)
    assert check_parts(config(tmp_path, where)) == [
        f"conditions without a latent in {where}, which are never trained: Bag"
    ]


def test_levels_belong_to_the_split(split: Split, tmp_path: Path) -> None:
    walkers = prepared(folder(tmp_path, "walkers"), {"1": [3, 3, 3]})
    own = load_split(walkers / "out" / "split.json")
    where = latents(folder(tmp_path, "t"), own, rows_in(own, "training"), "training")
    fitting = {"split_file": str(walkers / "out" / "split.json"), "levels_path": str(walkers / "levels")}
    assert check_parts(config(tmp_path, where, **fitting)) == []
    with pytest.raises(LightningDiTError, match="data.levels_path is .* data.split_file is not set"):
        check_parts(config(tmp_path, where, **{**fitting, "split_file": None}))
    ours = latents(folder(tmp_path, "o"), split, rows_in(split, "training"), "training")
    with pytest.raises(LightningDiTError, match="are of another split than"):
        check_parts(config(tmp_path, ours, levels_path=str(walkers / "levels")))
