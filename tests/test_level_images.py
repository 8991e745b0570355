"""The levels of step 5 as windows and as images: 16 bits all the way, parts of one split, and what is refused."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import step5_prepare_spectrograms as step5
from LightningDiT.data.image_sets import Unreadable
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import to_float
from LightningDiT.radar.augmentation import NAMES, parsed
from LightningDiT.radar.level_images import again, has_windows, load_windows, open_level_files, open_levels
from LightningDiT.radar.split import load_split, rows_digest, save_split
from tests.walkers import prepared, render

PASSES = {"1": [4, 5, 3], "10": [3, 3, 3], "2": [6, 4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("levels"), PASSES, "--db-range", "-50", "0")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def places(folder: Path) -> tuple[Path, Path]:
    return folder / "levels", folder / "out" / "split.json"


def test_windows_are_the_files_of_their_rows_in_sixteen_bits(folder: Path) -> None:
    levels, split_file = places(folder)
    split, files = load_split(split_file), json.loads((levels / "manifest.json").read_text())["files"]
    found = load_windows(levels, split_file, "validation")
    rows = [split.rows[row] for row in found.rows.tolist()]
    assert {row.part for row in rows} == {"validation"}
    assert len(rows) == len(split.part("validation"))
    for pixels, row in zip(found.pixels, rows, strict=True):
        grey = np.asarray(Image.open(levels / "levels" / files[row.name])).astype(np.float64)
        np.testing.assert_allclose(pixels[0].numpy(), grey / 65535 * 2 - 1, atol=2e-7)
        steps = (pixels.double() + 1) / 2 * 255
        assert float((steps - steps.round()).abs().max()) > 0.1  # no eight bits on the way
    assert found.class_names == ("ID_1", "ID_2", "ID_10")  # natural order, of everybody
    assert [found.class_names[number] for number in found.people.tolist()] == [row.person for row in rows]
    assert (found.condition_names, found.conditions.unique().tolist()) == (None, [0])
    assert found.db_range == (-50, 0)


def test_passes_have_one_number_each_over_all_people_and_parts_are_apart(folder: Path) -> None:
    levels, split_file = places(folder)
    split = load_split(split_file)
    parts = {part: load_windows(levels, split_file, part, 1) for part in ("training", "validation", "test")}
    rows = {part: set(found.rows.tolist()) for part, found in parts.items()}
    assert all(rows[part] == {at for at, row in enumerate(split.rows) if row.parts[1] == part} for part in parts)
    owners: dict[int, set[tuple[str, int]]] = {}
    for found in parts.values():
        for number, row in zip(found.passes.tolist(), found.rows.tolist(), strict=True):
            owners.setdefault(number, set()).add((split.rows[row].person, split.rows[row].pass_number))
    assert all(len(owner) == 1 for owner in owners.values())
    assert len(owners) == 8


def test_draws_of_a_window_lie_together_and_the_first_is_the_window(folder: Path) -> None:
    levels, split_file = places(folder)
    windows, images = load_windows(levels, split_file, "training"), open_levels(levels, split_file, "training", draws=3)
    batch = images.batch(range(images.count))
    assert images.count == 3 * len(windows.rows)
    assert batch.pixels.dtype == torch.float32
    assert torch.equal(batch.pixels[::3], windows.pixels)
    assert torch.equal(to_float(batch.pixels), batch.pixels)
    assert torch.equal(batch.labels[1::3], windows.people)
    assert batch.windows is not None
    assert torch.equal(batch.windows[2::3], windows.rows)
    assert torch.equal(batch.windows, images.windows)
    assert batch.augmentation is not None
    assert batch.augmentation.shape == (images.count, len(NAMES))
    assert not batch.augmentation[::3].any()
    assert batch.augmentation[1::3].any(1).all()
    [late] = images.batches([7], 1)  # alone, in another order: the same draw
    assert torch.equal(late.pixels[0], batch.pixels[7])
    assert open_levels(levels, split_file, "training").batch([0]).augmentation is None


def test_the_key_changes_with_all_that_the_pixels_depend_on(folder: Path) -> None:
    levels, split_file = places(folder)
    usual = {"part": "training", "fold": 0, "draws": 2, "seed": 0, "augmentation": parsed("gain=6")}
    other = (
        {"part": "validation", "draws": 1},
        {"fold": 1},
        {"draws": 3},
        {"seed": 1},
        {"augmentation": parsed("gain=5")},
    )
    keys = [open_levels(levels, split_file, **{**usual, **changed}).key for changed in ({}, {}, *other)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def test_notes_say_what_the_draws_do_and_who_is_missing(folder: Path) -> None:
    levels, split_file = places(folder)
    [note] = open_levels(levels, split_file, "training", draws=2).notes
    assert note.startswith("2 draws of each window: circular shift in time, gain up to 6 dB, noise floor up to 6 dB")
    assert "assumed" not in note
    assert open_levels(levels, split_file, "test", 2).notes == ("people without test windows in fold 2: ID_2",)


def test_texts_of_a_split_are_words_of_the_command(copied: Path, tmp_path: Path) -> None:
    """A shell and step 5 take each as it is, whatever a stranger wrote there; a seed that is no number is refused."""
    levels, split_file = places(copied)
    split, odd = load_split(split_file), "x; touch 'PWNED' $(id) #\n"
    save_split(
        tmp_path / "split.json", Path(odd), tmp_path, split.rows, {"seed": 3, "parent_file": f"{odd}/split.json"}
    )
    script, *words = shlex.split(again(load_split(tmp_path / "split.json"), split_file, Path(odd)))[1:]
    options = step5.parse(words)
    assert (script, options.seed) == ("step5_prepare_spectrograms.py", 3)
    assert [str(path) for path in (options.data, options.output, options.write)] == [odd] * 3
    split_file.write_text(split_file.read_text().replace('"seed": 0', '"seed": "0; touch PWNED #"'))
    with pytest.raises(LightningDiTError, match="seed is '0; touch PWNED #', a whole number .*; fix: run step5"):
        open_level_files(levels, split_file)


def test_conditions_are_numbered_in_their_natural_order(tmp_path: Path) -> None:
    name = "{condition}/ID_{{person}}/ID{{person}}_case1_1_Doppler{{number}}.jpg"
    for condition, person in (("Normal_line", 3), ("Backpack_line", 4)):
        render(tmp_path / "data", {str(person): [4, 4, 4]}, name=name.format(condition=condition))
    folder = prepared(tmp_path, {"5": [4, 4, 4]}, name=name.format(condition="Normal_line"))
    found = load_windows(*places(folder), "training")
    assert found.condition_names == ("Backpack_line", "Normal_line")
    images = open_levels(*places(folder), "training")
    batch = images.batch(range(images.count))
    assert batch.conditions is not None
    assert torch.equal(batch.conditions, found.conditions)
    assert set(zip(found.people.tolist(), found.conditions.tolist(), strict=True)) == {(0, 1), (1, 0), (2, 1)}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.unlink(), r"cannot be read \(.*No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "cannot be read"),
        (lambda file: Image.new("I;16", (8, 16)).save(file), "has 8x16 pixels, the windows have 16x16"),
        (lambda file: Image.new("RGB", (16, 16)).save(file), "has 16x16 pixels, .* and one channel"),
        (lambda file: Image.new("I;16", (16, 16), 9).save(file), "does not hold the levels that step 5 wrote"),
    ],
)
def test_a_damaged_window_is_one_line_wherever_it_is_read(harm: object, said: str, copied: Path) -> None:
    levels, split_file = places(copied)
    split, files = load_split(split_file), json.loads((levels / "manifest.json").read_text())["files"]
    harm(levels / "levels" / files[split.part("training")[1].name])  # type: ignore[operator]
    with pytest.raises(
        LightningDiTError, match=f"{said}.*fix: python step5_prepare_spectrograms.py --data .* --size 16x16$"
    ):
        load_windows(levels, split_file, "training")
    images = open_levels(levels, split_file, "training")
    for way in Unreadable:
        with pytest.raises(LightningDiTError, match=said):
            images.batch([0, 1], way)
    load_windows(levels, split_file, "test")


def test_the_command_that_writes_levels_again_keeps_a_range_that_was_given(copied: Path) -> None:
    opened = open_level_files(*places(copied))
    given = replace(opened, db_range=(-45.0, 0.0), is_measured=False)
    assert given.again().endswith(" --db-range -45 0 --size 16x16")
    assert "--db-range" not in replace(given, is_measured=True).again() + replace(given, db_range=None).again()


def test_levels_of_another_split_or_release_or_unfinished_are_refused(copied: Path, tmp_path: Path) -> None:
    levels, split_file = places(copied)
    manifest = levels / "manifest.json"
    whole = json.loads(manifest.read_text())
    other = prepared(tmp_path / "other", PASSES, "--seed", "5")
    with pytest.raises(
        LightningDiTError, match="are of another split than .*; fix: name the split of these levels, or "
    ):
        load_windows(levels, places(other)[1], "training")
    first = next(iter(whole["files"]))
    for changed, said in (
        ({key: value for key, value in whole.items() if key != "split"}, "of an earlier release"),
        ({key: value for key, value in whole.items() if key != "digests"}, "are not complete"),
        ({**whole, "files": {k: v for k, v in whole["files"].items() if k != first}}, "lack windows of"),
        ({**whole, "format": "x"}, "holds no levels of step 5"),
        ([], "holds no levels of step 5"),
        ({**whole, "pixels": [16, 16.5]}, "or say them wrongly"),
        ({**whole, "db_range": [0, 0]}, r"or say them wrongly \(a range from 0.0 to 0.0 dB"),
        ({**whole, "files": {**whole["files"], first: 3}}, r"or say them wrongly \(files and digests are no texts"),
    ):
        manifest.write_text(json.dumps(changed))
        with pytest.raises(LightningDiTError, match=said):
            open_levels(levels, split_file, "training")
    manifest.unlink()
    with pytest.raises(LightningDiTError, match=r"holds no levels of step 5 \(.*No such file"):
        open_levels(levels, split_file, "training")


def test_a_training_window_with_the_pixels_of_a_test_window_is_refused(copied: Path) -> None:
    levels, split_file = places(copied)
    split, told = load_split(split_file), json.loads((levels / "manifest.json").read_text())
    rows, [first, *_], [tested, *_] = list(split.rows), split.part("training"), split.part("test")
    rows[rows.index(first)] = replace(first, digest=tested.digest)
    save_split(split_file, Path(split.data), Path(split.root), rows, split.settings)
    (levels / "manifest.json").write_text(json.dumps({**told, "split": rows_digest(rows)}))
    for opened in (load_windows, open_levels):
        with pytest.raises(LightningDiTError, match="is a test window of fold 0"):
            opened(levels, split_file, "training")
        opened(levels, split_file, "validation")


def test_squares_of_their_own_size_alone_and_draws_of_the_training_alone(folder: Path, tmp_path: Path) -> None:
    levels, split_file = places(folder)
    with pytest.raises(LightningDiTError, match="16x16 pixels, 32x32 are asked for; fix: set data.image_size: 16, or"):
        open_levels(levels, split_file, "training").cropped(32)
    with pytest.raises(LightningDiTError, match="2 draws of validation windows are asked for"):
        open_levels(levels, split_file, "validation", draws=2)
    wide = prepared(tmp_path / "wide", {"1": [3, 3, 3]}, size="24x16")
    assert load_windows(*places(wide), "training").pixels.shape[1:] == (1, 16, 24)
    with pytest.raises(LightningDiTError, match="24x16 pixels, and networks take squares; fix: .* --size 32"):
        open_levels(*places(wide), "training")


def test_a_part_that_nobody_has_is_one_line(tmp_path: Path) -> None:
    single = prepared(tmp_path, {"1": [4], "2": [5]})
    assert load_windows(*places(single), "training").people.tolist() == [0] * 4 + [1] * 5
    assert has_windows(places(single)[1], "training")
    for part in ("validation", "test"):
        assert not has_windows(places(single)[1], part)
        with pytest.raises(LightningDiTError, match=f"has no {part} windows: nobody has enough passes"):
            load_windows(*places(single), part)
