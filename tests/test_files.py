"""Files that are whole or absent: writing, locks and free space."""

from __future__ import annotations

import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from LightningDiT import files
from LightningDiT.errors import LightningDiTError
from tests.conftest import largest_file


def test_a_new_file_takes_its_place_when_all_is_written(tmp_path: Path) -> None:
    path, aside = tmp_path / "a.txt", tmp_path / "a.txt.old"
    path.write_text("before")
    with files.atomic_path(path, aside) as fresh:
        fresh.write_text("after")
        assert path.read_text() == "before"
    assert (path.read_text(), aside.read_text()) == ("after", "before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "a.txt.old"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(path, tmp_path / "aside") as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "before"


@pytest.mark.skipif(sys.platform == "win32", reason="modes of a POSIX file system")
def test_the_mode_is_that_of_a_plain_file_and_of_a_linked_one_its_own(tmp_path: Path) -> None:
    plain, path, other = tmp_path / "plain", tmp_path / "a.txt", tmp_path / "other"
    plain.touch()
    files.write_text(path, "图像")
    assert path.read_text(encoding="utf-8") == "图像"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    other.touch(mode=0o400)
    with files.atomic_path(path) as fresh:
        fresh.unlink()
        fresh.symlink_to(other)
    assert (path.readlink(), stat.S_IMODE(other.stat().st_mode)) == (other, 0o400)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    (tmp_path / ".a[1].txt.x1y2.tmp").touch()
    (tmp_path / ".a1.txt.x1y2.tmp").touch()
    files.remove_leftovers(path)
    assert [path.name for path in tmp_path.iterdir()] == [".a1.txt.x1y2.tmp"]


def test_a_refusal_of_the_system_is_one_line_with_its_fix(tmp_path: Path) -> None:
    with largest_file(100), pytest.raises(LightningDiTError, match=r"a.txt cannot be written .*; fix: free space on"):
        files.write_text(tmp_path / "a.txt", "x" * 10_000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(LightningDiTError, match=r"a.txt cannot be written .*; fix: write to another folder"):
        files.write_text(tmp_path / "file" / "a.txt", "x")
    error = PermissionError(13, "Permission denied")
    with pytest.raises(LightningDiTError, match="fix: choose a folder that you may write to"), files.disk_errors("a"):
        raise error


@pytest.mark.skipif(sys.platform == "win32", reason="mv of a POSIX shell")
def test_a_command_that_renames_holds_for_any_name(tmp_path: Path) -> None:
    """A shell runs the command as a person pastes it."""
    path = tmp_path / "Li's models $HOME 图像"
    path.write_text("mine")
    with pytest.raises(LightningDiTError, match="is a file, a folder was expected; fix: mv ") as refusal:
        files.require_writable(path / "models")
    subprocess.run(refusal.value.fix, shell=True, check=True)
    assert (path.exists(), path.with_name(path.name + ".old").read_text()) == (False, "mine")
    files.require_writable(path / "models")
    assert [path.name for path in tmp_path.iterdir()] == [f"{path.name}.old"]
    assert shlex.split(files.rename_command(path, ".x")) == ["mv", str(path), f"{path}.x"]


def test_the_first_free_name(tmp_path: Path) -> None:
    (tmp_path / "a.bad-1").touch()
    (tmp_path / "a.bad-2").symlink_to(tmp_path / "nowhere")
    assert files.free_name(tmp_path / "a", "bad") == tmp_path / "a.bad-3"


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "a").touch()
    with (tmp_path / "a").open("rb") as first, (tmp_path / "a").open("rb") as second:
        assert files.try_lock(first)
        assert not files.try_lock(second)
    with (tmp_path / "a").open("rb") as third:
        assert files.try_lock(third)


def test_free_space_is_that_of_the_folder_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or SimpleNamespace(free=1000))
    files.require_space(tmp_path / "not" / "there", 1000, "the files", "free it")
    assert asked == [tmp_path]
    with pytest.raises(LightningDiTError, match=r"^the files may take 1.0 kB, and .* has 1.0 kB free; fix: free it$"):
        files.require_space(tmp_path, 1001, "the files", "free it")
