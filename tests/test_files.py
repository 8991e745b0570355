"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from setup_steps import files


def test_the_place_is_taken_when_all_is_written(tmp_path: Path) -> None:
    place, aside = tmp_path / "a.txt", tmp_path / "a.txt.old"
    place.write_text("before")
    files.fresh_name(place).write_text("what a killed run left")
    with files.replacing(place, aside) as fresh:
        assert not fresh.exists()
        fresh.write_text("after")
        assert place.read_text() == "before"
    assert (place.read_text(), aside.read_text()) == ("after", "before")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "a.txt.old"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "a.txt"
    place.write_text("before")
    with pytest.raises(KeyboardInterrupt), files.replacing(place, tmp_path / "aside") as fresh:
        fresh.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert place.read_text() == "before"


def test_the_first_free_name(tmp_path: Path) -> None:
    (tmp_path / "a.bad-1").touch()
    (tmp_path / "a.bad-2").symlink_to(tmp_path / "nowhere")
    assert files.free_name(tmp_path / "a", "bad") == tmp_path / "a.bad-3"


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "a").touch()
    with (tmp_path / "a").open("rb") as first, (tmp_path / "a").open("rb") as second:
        assert files.claim(first)
        assert not files.claim(second)
    with (tmp_path / "a").open("rb") as third:
        assert files.claim(third)
