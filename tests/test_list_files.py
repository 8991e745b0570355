"""List files: their formats, their classes, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from LightningDiT.data.list_files import open_list
from LightningDiT.errors import LightningDiTError
from tests.test_image_sets import save_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images: cats/000.png and dogs/001.png."""
    return save_images(tmp_path / "images", 2)


@pytest.mark.parametrize(
    ("name", "text", "labels", "names"),
    [
        ("list.txt", "cats/000.png 4\n\n# a note\ndogs/001.png 0\n", [4, 0], None),
        ("list.txt", "dogs/001.png\tsea lion\ncats/000.png\tcat\n", [1, 0], ("cat", "sea lion")),
        ("list.txt", "cats/000.png cat\nabsent file.png dog\n", [0, None], ("cat", "dog")),
        ("list.csv", 'path,label\ncats/000.png, "lion, sea"\ndogs/001.png,dog\n', [1, 0], ("dog", "lion, sea")),
        ("list.csv", "\ufeffcats/000.png,2\n", [2], None),
        ("list.txt", "cats/000.png,7\n", [7], None),
        ("list.csv", "image_id,label\ncats/000.png,10\ndogs/001.png,9\n", [10, 9], None),
        ("list.csv", "image_id,label\ncats/000.png,ID_10\ndogs/001.png,ID_9\n", [1, 0], ("ID_9", "ID_10")),
        ("list.txt", "image_id label\ncats/000.png 10\ndogs/001.png 9\n", [10, 9], None),
        ("list.csv", "file,class,split\ncats/000.png,3,train\n", [3], None),
        ("list.txt", "cats\\000.png 1\ndogs\\001.png 0\n", [1, 0], None),
    ],
)
def test_list_files(
    name: str, text: str, labels: list[int | None], names: tuple[str, ...] | None, images: Path
) -> None:
    (images / name).write_text(text, encoding="utf-8")
    opened = open_list(images / name)
    assert opened.class_names == names
    assert opened.count == len(labels)
    for number, label in enumerate(labels):
        if label is None:
            with pytest.raises(FileNotFoundError):
                opened.read(number)
        else:
            assert opened.read(number)[1] == label


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png 1\nb.png\n", r"line 2: 'b.png' has no class"),
        ("a.png\t\n", r"line 1: 'a.png' has no class"),
        ("a.png -1\nb.png 0\n", "a.png has the class -1"),
        ("a.png 1234567890\n", "a.png has the class 1234567890; fix: number classes from 0"),
        ("x" * 140_000 + ",1\n", r"line 1 is no CSV \(field larger"),
        ("\n# nothing\n", "lists no images"),
        ("path label\n", "lists no images"),
        ("a.png 1\nb.png 0\nc.png cat\n", r"line 3: the class is 'cat', in line 1 '1'; numbers and names are mixed"),
        ("a.png cat\nb.png 0\n", r"line 2: the class is '0', in line 1 'cat'; numbers and names are mixed"),
        (",image,label\n0,a.png,1\n1,b.png,0\n", r"line 2: the first column counts the rows, as pandas writes it"),
        ("0,a.png,1\n1,b.png,0\n", r"line 1: the first column counts the rows, .*index=False"),
        ("label,image\n1,a.png\n", r"line 2: the class '1' stands before the path 'a.png'; fix: swap"),
        ("cat a.png\ndog b.png\n", r"line 1: the class 'cat' stands before the path 'a.png'"),
        ("image,width,height,label\na.png,640,480,1\n", r"line 2 has 4 columns; a path and its class are expected"),
    ],
)
def test_list_files_with_errors_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(LightningDiTError, match=message):
        open_list(tmp_path / "list.txt")
    with pytest.raises(LightningDiTError, match="cannot be read"):
        open_list(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0.png"])
def test_listed_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{name} 1\n")
    opened = open_list(tmp_path / "list.txt")
    with pytest.raises((OSError, ValueError)):
        opened.read(0)


def test_a_header_that_is_passed_over_is_said(images: Path) -> None:
    (images / "list.csv").write_text("image_id,label\ncats/000.png,0\n")
    assert open_list(images / "list.csv").notes == (
        f"{images / 'list.csv'}: the first line is taken as a header: image_id, label",
    )
