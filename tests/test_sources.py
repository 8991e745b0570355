"""Folders that are searched by file name, and links in place of copies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from LightningDiT.console import Progress
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import UNFINISHED
from setup_steps import downloads, sources, weights
from setup_steps.sources import Source, link
from tests.project_copy import PYTHON

STATS = weights.STATS


def put(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fault_of(_: weights.WeightFile, path: Path) -> str | None:
    """A good file says so."""
    return None if path.read_bytes() == b"good" else "says nothing good"


def test_find_passes_over_what_has_a_fault_and_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = put(tmp_path / "in" / "a" / STATS.name, b"bad")
    good = put(tmp_path / "in" / "b" / STATS.name, b"good")
    put(tmp_path / "in" / "c" / STATS.name, b"good")
    assert Source("attached", tmp_path / "in").find(STATS, tmp_path / "models", fault_of) == good
    taken = f"2 files of that name below {tmp_path / 'in'}; the first is taken, another by --folder FOLDER: {good}"
    assert capsys.readouterr().out == f"  {bad} is passed over: says nothing good\n  {STATS.name}: {taken}\n"


def test_a_file_of_models_is_no_candidate_for_itself(tmp_path: Path) -> None:
    """The searched folder may hold models/, or links that lead back to it."""
    put(tmp_path / "models" / STATS.name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / STATS.name).symlink_to(tmp_path / "models" / STATS.name)
    backup = put(tmp_path / "models" / "backup" / STATS.name)
    assert Source("folder", tmp_path).candidates(STATS, tmp_path / "models") == [backup]


def test_folders_that_carry_the_name_are_no_candidates(tmp_path: Path) -> None:
    inside = put(tmp_path / STATS.name / STATS.name)
    assert Source("folder", tmp_path).candidates(STATS, tmp_path / "models") == [inside]


def test_the_hub_has_no_folder(tmp_path: Path) -> None:
    source = Source("hub")
    source.require_folder()
    assert source.asks_hub
    assert source.find(STATS, tmp_path, fault_of) is None


def test_auto_says_that_it_goes_to_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Source("auto", tmp_path).find(STATS, tmp_path / "models", fault_of) is None
    assert capsys.readouterr().out == f"  latents_stats.pt: not below {tmp_path}, so the hub is asked\n"


def test_absence_names_where_what_and_the_fix(tmp_path: Path) -> None:
    error = Source("attached", tmp_path).explain_absence(weights.DIT["64ep"])
    assert f"{tmp_path} holds no usable lightningdit-xl-imagenet256-64ep.pt" in str(error)
    assert "lightningdit-xl-imagenet256-64ep.bf16.safetensors" in str(error)
    step2 = f"{PYTHON} step2_download_models.py --source"
    assert f"; fix: {step2} attached --attached FOLDER, or {step2} hub" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(("kind", "option"), [("folder", "--folder FOLDER"), ("attached", "--attached FOLDER")])
def test_the_folder_must_be_one(tmp_path: Path, kind: str, option: str) -> None:
    Source(kind, tmp_path).require_folder()
    with pytest.raises(LightningDiTError, match=f"x is not there, the folder to search was expected; fix: .*{option}"):
        Source(kind, tmp_path / "x").require_folder()
    with pytest.raises(LightningDiTError, match=f"y is a file, the folder to search was expected; fix: .*{option}"):
        Source(kind, put(tmp_path / "y")).require_folder()


def test_auto_only_says_that_the_folder_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Source("auto", tmp_path / "x").require_folder()
    assert capsys.readouterr().out == f"  {tmp_path / 'x'} is not there; no attached folder is searched\n"


def test_a_link_is_absolute_and_replaces_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = put(tmp_path / "in" / "weights.pt", b"weights")
    (tmp_path / "set").symlink_to("in")
    target = tmp_path / "models" / "weights.pt"
    target.parent.mkdir()
    target.symlink_to(tmp_path / "detached" / "weights.pt")
    put(target.with_name(f".weights.pt.abcdefgh{UNFINISHED}"), b"left by a run that was killed")
    monkeypatch.chdir(tmp_path)
    assert link(Path("set/weights.pt"), target) == f"linked to {source}"
    assert target.readlink() == source
    assert target.read_bytes() == b"weights"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(1, "Operation not permitted"), NotImplementedError("no links here")])
def test_where_links_are_not_possible_the_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Path, "symlink_to", refuse)
    content = os.urandom(3_000_000)
    source, target = put(tmp_path / "weights.pt", content), tmp_path / "models" / "weights.pt"
    target.parent.mkdir()
    assert link(source, target).startswith(f"copied from {source} (no link: ")
    assert not target.is_symlink()
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_copy_that_finds_no_room_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(downloads, "SPARE_BYTES", 10**18)
    source, target = put(tmp_path / "new.pt", b"new"), put(tmp_path / "models" / "weights.pt", b"old")
    with pytest.raises(LightningDiTError, match=r"the files may take .*, and .* has .* free"):
        link(source, target)
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_what_was_there_is_kept_when_the_link_is_there_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = put(tmp_path / "new.pt", b"new"), put(tmp_path / "models" / "weights.pt", b"old")
    aside = target.with_name("weights.pt.bad-1")
    with monkeypatch.context() as no_links:
        no_links.setattr(Path, "symlink_to", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "not permitted")))
        no_links.setattr(downloads, "SPARE_BYTES", 10**18)
        with pytest.raises(LightningDiTError, match=r"the files may take .*, and .* has .* free"):
            link(source, target, aside)
    assert (target.read_bytes(), aside.exists()) == (b"old", False)
    link(source, target, aside)
    assert (target.readlink(), aside.read_bytes()) == (source, b"old")


def test_a_copy_that_is_stopped_ends_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    class Stopped(Progress):
        """Ctrl-C in the middle of a copy."""

        def __init__(self, total: int, unit: str, *, label: str) -> None:
            super().__init__(total, unit, label=label)
            self.label = label

        def update(self, count: float = 1) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            ended.append(self.label)

    monkeypatch.setattr(sources, "Progress", Stopped)
    with pytest.raises(KeyboardInterrupt):
        sources._copy(put(tmp_path / "new.pt", b"new"), tmp_path / "copy.pt")
    assert ended == ["copying new.pt"]


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    dit = weights.DIT["800ep"]
    fp16, original = (tmp_path / name for name in (weights.converted_name(dit.name, "fp16"), dit.name))
    fp16.symlink_to(tmp_path / "detached")
    assert sources.dangling_links(dit, tmp_path) == [fp16]
    assert sources.at_hand(dit, tmp_path) == []
    original.symlink_to(put(tmp_path / "there"))
    assert sources.dangling_links(dit, tmp_path) == [fp16]
    assert sources.at_hand(dit, tmp_path) == [original]
