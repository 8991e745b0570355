"""The registry of weights: names, sets, and the search by file name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import step3_setup_configs as step3
from LightningDiT.errors import LightningDiTError
from setup_steps import weights

DIT = weights.DIT["800ep"]
COPIES = [weights.converted_name(DIT.name, precision) for precision in weights.PRECISIONS]


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_sets_and_roles() -> None:
    assert weights.files_of("800ep") == (weights.VAVAE, weights.STATS, DIT)
    assert weights.files_of("all", "dit") == (DIT, weights.DIT["64ep"])
    assert weights.files_of("bundled") == ()


def test_names_of_converted_copies() -> None:
    assert weights.converted_name("a.b.pt", "fp16") == "a.b.fp16.safetensors"
    fp32, bf16, fp16 = COPIES
    assert weights.usable_names(DIT) == (fp32, DIT.name, bf16, fp16)
    assert weights.usable_names(weights.VAVAE) == (weights.VAVAE.name,)


def test_search_finds_at_any_depth_in_order(tmp_path: Path) -> None:
    deep, flat = put(tmp_path / "b" / "c" / "d" / "one.pt"), put(tmp_path / "a" / "one.pt")
    folder = tmp_path / "two.pt"
    folder.mkdir()
    put(tmp_path / "none.pt")
    assert weights.search(tmp_path, ["two.pt", "one.pt", "three.pt"]) == {
        "two.pt": [folder],
        "one.pt": [flat, deep],
        "three.pt": [],
    }
    assert weights.search(tmp_path / "absent", ["one.pt"]) == {"one.pt": []}
    assert weights.search(flat, ["one.pt"]) == {"one.pt": []}


def test_search_follows_links_once(tmp_path: Path) -> None:
    """A data set may be a link, and a link may lead back up."""
    put(tmp_path / "elsewhere" / "one.pt")
    attached = tmp_path / "attached"
    attached.mkdir()
    (attached / "set").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(attached)
    assert weights.search(attached, ["one.pt"]) == {"one.pt": [attached / "set" / "one.pt"]}


def test_find_file_takes_models_first_and_the_best_name_first(tmp_path: Path) -> None:
    models, attached = tmp_path / "models", tmp_path / "attached"
    assert weights.find_file(DIT, models, weights.Tree(attached)) is None
    assert weights.find_file(DIT, models, None) is None
    rounded = put(attached / "x" / COPIES[2])
    assert weights.find_file(DIT, models, weights.Tree(attached)) == rounded
    original = put(attached / "y" / "z" / DIT.name)
    assert weights.find_file(DIT, models, weights.Tree(attached)) == original
    exact = put(attached / "z" / COPIES[0])
    assert weights.find_file(DIT, models, weights.Tree(attached)) == exact
    in_models = put(models / COPIES[1])
    assert weights.find_file(DIT, models, weights.Tree(attached)) == in_models


def test_find_file_explains_a_folder_unless_the_file_is_inside(tmp_path: Path) -> None:
    """Some uploads put a file into a folder of its own name."""
    (tmp_path / "latents_stats.pt").mkdir()
    with pytest.raises(LightningDiTError, match=r"is a folder, the file latents_stats.pt was expected there; fix: mv "):
        weights.find_file(weights.STATS, tmp_path / "models", weights.Tree(tmp_path))
    inside = put(tmp_path / "latents_stats.pt" / "latents_stats.pt")
    assert weights.find_file(weights.STATS, tmp_path / "models", weights.Tree(tmp_path)) == inside


def test_attached_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weights.ATTACHED_VARIABLE, raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert weights.attached_folder() is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert weights.attached_folder() == Path("/kaggle/input")
    monkeypatch.setenv(weights.ATTACHED_VARIABLE, "~/data")
    assert weights.attached_folder() == Path.home() / "data"


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were really walked through, one entry a walk."""
    folders: list[Path] = []
    walk = weights.walk

    def noting(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
        folders.append(folder)
        return walk(folder)

    monkeypatch.setattr(weights, "walk", noting)
    return folders


def test_what_is_in_models_needs_no_walk_and_all_files_one(tmp_path: Path, walked: list[Path]) -> None:
    models, attached = tmp_path / "models", tmp_path / "attached"
    put(models / DIT.name)
    stats = put(attached / "x" / weights.STATS.name)
    assert weights.find_file(DIT, models, weights.Tree(attached)) == models / DIT.name
    assert walked == []
    tree = weights.Tree(attached)
    found = [weights.find_file(file, models, tree) for file in weights.files_of("all")]
    assert found == [None, stats, models / DIT.name, None]
    assert walked == [attached]


def test_step3_walks_once_for_all_files_and_models(tmp_path: Path, walked: list[Path]) -> None:
    attached = tmp_path / "attached"
    put(attached / "a" / weights.STATS.name)
    options = step3.parse(["--models-dir", str(tmp_path / "models"), "--attached", str(attached)])
    for model in ("800ep", "64ep"):
        with pytest.raises(LightningDiTError, match=f"vavae.*, lightningdit-xl-imagenet256-{model}.pt; fix: "):
            step3.find_files(model, options)
    assert walked == [attached]


def test_a_long_walk_says_that_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "a" / "one.pt")
    weights.search(tmp_path, ["one.pt"])
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(weights, "SAY_EVERY", 0.0)
    weights.search(tmp_path, ["one.pt"])
    assert capsys.readouterr().out.splitlines() == [
        f"  searching {tmp_path}: {count} folders so far" for count in (1, 2)
    ]


def test_bytes_to_come(tmp_path: Path) -> None:
    tree = weights.Tree(tmp_path / "attached")
    assert weights.bytes_to_come(DIT, tmp_path, tree) == 6_000_000_000
    (tmp_path / (DIT.name + ".part")).write_bytes(b"x" * 1234)
    assert weights.bytes_to_come(DIT, tmp_path, tree) == 6_000_000_000 - 1234
    (tmp_path / (weights.STATS.name + ".part")).write_bytes(b"x" * 9999)  # the real one is larger than was thought
    assert weights.bytes_to_come(weights.STATS, tmp_path, tree) == 0
    put(tmp_path / "attached" / COPIES[1])
    assert weights.bytes_to_come(DIT, tmp_path, weights.Tree(tmp_path / "attached")) == 0
