"""The registry of weights: names, sets, and the search by file name."""

from __future__ import annotations

from pathlib import Path

import pytest

from setup_steps import weights
from setup_steps.console import StepError

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
    assert weights.find_file(DIT, models, attached) is None
    assert weights.find_file(DIT, models, None) is None
    rounded = put(attached / "x" / COPIES[2])
    assert weights.find_file(DIT, models, attached) == rounded
    original = put(attached / "y" / "z" / DIT.name)
    assert weights.find_file(DIT, models, attached) == original
    exact = put(attached / "z" / COPIES[0])
    assert weights.find_file(DIT, models, attached) == exact
    in_models = put(models / COPIES[1])
    assert weights.find_file(DIT, models, attached) == in_models


def test_find_file_explains_a_folder_unless_the_file_is_inside(tmp_path: Path) -> None:
    """Some uploads put a file into a folder of its own name."""
    (tmp_path / "latents_stats.pt").mkdir()
    with pytest.raises(StepError, match=r"is a folder, the file latents_stats.pt was expected there; mend: mv "):
        weights.find_file(weights.STATS, tmp_path / "models", tmp_path)
    inside = put(tmp_path / "latents_stats.pt" / "latents_stats.pt")
    assert weights.find_file(weights.STATS, tmp_path / "models", tmp_path) == inside


def test_attached_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(weights.ATTACHED_VARIABLE, raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert weights.attached_folder() is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert weights.attached_folder() == Path("/kaggle/input")
    monkeypatch.setenv(weights.ATTACHED_VARIABLE, "~/data")
    assert weights.attached_folder() == Path.home() / "data"
