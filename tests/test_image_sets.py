"""Image sets: their order, names and classes, and what stands for an image that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT.data.image_sets import (
    ArrayImages,
    Classes,
    FileImages,
    Unreadable,
    evenly_spaced,
    number_classes,
    open_fashion_mnist,
    open_files,
    open_folder,
    open_samples,
)
from LightningDiT.errors import LightningDiTError

CLASSES = ("cats", "dogs", "sea lions")


def save_images(folder: Path, count: int, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write `count` photographs of noise, 20x16, dealt over the classes in turn."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / classes[number % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 20, 3), np.uint8)).save(place / f"{number:03d}.png")
    return folder


def test_folders_that_are_numbers_are_classes_in_that_order(tmp_path: Path) -> None:
    opened = open_folder(save_images(tmp_path / "images", 12, tuple(map(str, range(12)))))
    assert opened.class_names == tuple(map(str, range(12)))
    assert [(Path(opened.name(n)).parent.name, opened.read(n)[1]) for n in range(4)] == [
        ("0", 0),
        ("1", 1),
        ("10", 10),
        ("11", 11),
    ]


def test_folders_without_images_or_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match="no images in"):
        open_folder(tmp_path / "absent")
    folder = save_images(tmp_path / "images", 3)
    (folder / "empty").mkdir()
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (16, 16)).save(folder / ".ipynb_checkpoints" / "000-checkpoint.png")
    opened = open_folder(folder)
    assert opened.class_names == CLASSES
    assert opened.notes == (
        "passed over 1 hidden files and folders of systems and tools: .ipynb_checkpoints 1",
        "subfolders without images, which are no classes: empty",
    )
    assert opened.class_list() == "0 cats (1), 1 dogs (1), 2 sea lions (1)"
    Image.new("RGB", (16, 16)).save(folder / "flat.png")
    with pytest.raises(LightningDiTError, match=r"flat.png lies in no subfolder"):
        open_folder(folder)


def test_a_flat_folder_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_images(tmp_path / "frogs", 2, (".",))
    opened = open_folder(folder)
    assert opened.labels is not None
    assert (opened.labels.tolist(), opened.class_names) == ([0, 0], ("frogs",))
    assert opened.notes == (f"{folder} has no subfolders of images: all of them are one class, frogs",)
    monkeypatch.chdir(folder)
    assert open_folder(".").class_names == ("frogs",)


def test_folders_are_numbered_as_people_count(tmp_path: Path) -> None:
    names = tuple(f"ID_{number}" for number in range(1, 12))
    opened = open_folder(save_images(tmp_path, 11, names))
    assert opened.class_names == names
    assert opened.labels is not None
    labels = {Path(opened.name(n)).parent.name: label for n, label in enumerate(opened.labels.tolist())}
    assert labels == {name: number for number, name in enumerate(names)}
    reversed_order = opened.in_order(names[::-1])
    assert reversed_order.labels is not None
    assert (reversed_order.labels + opened.labels).tolist() == [10] * 11
    assert reversed_order.class_names == names[::-1]
    assert opened.in_order(names[:3]) is opened


def test_linked_classes_are_read_and_dead_links_listed(tmp_path: Path) -> None:
    """As a folder of links into a larger set; one leads back to where it is, one nowhere."""
    save_images(tmp_path / "real", 6)
    place = tmp_path / "links"
    place.mkdir()
    for name in CLASSES:
        (place / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "cats" / "back").symlink_to(place)
    (tmp_path / "real" / "dogs" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    opened = open_folder(place)
    assert (opened.count, opened.class_names) == (7, CLASSES)
    names = [Path(opened.name(number)).name for number in range(7)]
    assert names == ["000.png", "003.png", "001.png", "004.png", "gone.png", "002.png", "005.png"]
    with pytest.raises(FileNotFoundError):
        opened.read(4)


def test_classes_of_samples_come_from_subfolders_numbers_and_manifests(tmp_path: Path) -> None:
    for name in ("names/dog", "names/ant", "numbers/7", "numbers/03"):
        save_images(tmp_path / Path(name).parent, 2, (Path(name).name,))
    named, numbered = (open_samples(tmp_path / name) for name in ("names", "numbers"))
    assert named.labels is not None and numbered.labels is not None
    assert (named.labels.tolist(), named.class_names) == ([0, 0, 1, 1], ("ant", "dog"))
    assert (numbered.labels.tolist(), numbered.class_names) == ([0, 0, 1, 1], ("03", "7"))
    folder = save_images(tmp_path / "run", 3, (".",))
    assert open_samples(folder).labels is None
    (folder / "000.png").unlink()
    (folder / "manifest.json").write_text(json.dumps({"labels": [4, 5, 6]}))
    opened = open_samples(folder)
    assert opened.labels is not None
    assert opened.labels.tolist() == [5, 6]
    (folder / "manifest.json").write_text(json.dumps({"labels": [1, 0, 1], "class_names": ["b", "a"]}))
    opened = open_samples(folder)
    assert opened.labels is not None
    assert (opened.labels.tolist(), opened.class_names) == ([0, 1], ("b", "a"))
    for content in ("{}", "[]", '{"labels": [1, 2, 1], "class_names": ["b", "a"]}', '{"labels": [1, -1, 1]}'):
        (folder / "manifest.json").write_text(content)
        assert open_samples(folder).labels is None


def test_a_flat_folder_has_no_classes_where_it_is_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent of `.` is `.`: its images are not those of one class without a name."""
    monkeypatch.chdir(save_images(tmp_path, 2, (".",)))
    assert open_samples(".").labels is None


@pytest.mark.parametrize(
    ("given", "labels", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], ("a", "b")),
        (["10", "2", "10"], [1, 0, 1], ("2", "10")),
        (["10", "a", "2"], [1, 2, 0], ("2", "10", "a")),
        (["1234567890123", "2"], [1, 0], ("2", "1234567890123")),
    ],
)
def test_the_numbers_of_classes(given: list[str], labels: list[int], names: tuple[str, ...]) -> None:
    classes = number_classes(given)
    assert classes.labels is not None
    assert (classes.labels.tolist(), classes.names) == (labels, names)


def test_fashion_mnist_has_two_black_pixels_around(fashion_folder: Path) -> None:
    opened = open_fashion_mnist(fashion_folder, "test")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28))
    image, label = opened.read(5)
    assert (opened.count, label, opened.class_names and opened.class_names[2]) == (12, 2, "Pullover")
    np.testing.assert_array_equal(np.asarray(image)[2:-2, 2:-2, 1], pixels[5])
    assert np.asarray(image).sum() == 3 * pixels[5].sum()
    with pytest.raises(LightningDiTError, match="FashionMNIST has no part 'val'"):
        open_fashion_mnist(fashion_folder, "val")


def test_images_in_memory_are_read_as_those_in_files(tmp_path: Path) -> None:
    """At once or one by one, whole and cropped."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    labels = torch.tensor([3, 1, 2, 0, 1])
    in_memory = ArrayImages("memory", pixels, Classes(labels))
    in_files = FileImages("files", sorted(tmp_path.iterdir()), Classes(labels))
    for size in (None, 8, 12):
        array, files = in_memory.cropped(size), in_files.cropped(size)
        expected = files.batch([4, 0, 0])
        assert expected.labels.tolist() == [1, 3, 3]
        for found in (array.batch([4, 0, 0]), *array.batches([4, 0, 0], 3), *files.batches([4, 0, 0], 3)):
            assert torch.equal(found.pixels, expected.pixels)
            assert torch.equal(found.labels, expected.labels)
    square = ArrayImages("square", np.ascontiguousarray(pixels[:, :, :12])).cropped(12)
    assert torch.equal(square.batch([2]).pixels, torch.from_numpy(pixels[2:3, :, :12]).permute(0, 3, 1, 2))


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """Seven images of one shade each, 0 to 6; the odd ones are cut short."""
    for shade in range(7):
        path = tmp_path / f"{shade}.png"
        Image.new("RGB", (4, 4), (shade, shade, shade)).save(path)
        if shade % 2:
            path.write_bytes(path.read_bytes()[:-30])
    return tmp_path


def test_an_unreadable_image_is_an_error_that_names_it(shades: Path) -> None:
    images = open_files(shades)
    assert images.batch([0, 2]).pixels[:, 0, 0, 0].tolist() == [0, 2]
    batches = images.batches(range(7), 1)
    assert next(batches).read.tolist() == [True]
    with pytest.raises(LightningDiTError, match=r"1\.png is no whole image .*; fix: delete it"):
        next(batches)


def test_a_black_image_stands_for_an_unreadable_one(shades: Path) -> None:
    first, second = open_files(shades).cropped(4).batches(range(2, 7), 3, Unreadable.BLACK)
    assert first.pixels[:, 2, 3, 3].tolist() == [2, 0, 4]
    assert first.read.tolist() == [True, False, True]
    assert [Path(name).name for name, _ in first.unreadable] == ["3.png"]
    assert second.read.tolist() == [False, True]


def test_the_next_image_stands_for_an_unreadable_one(shades: Path) -> None:
    images = open_files(shades).cropped(4)
    (shades / "6.png").write_bytes(b"no image")
    batch = images.batch([5, 2], Unreadable.NEXT)
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 2]  # 5 and 6 cannot be read; the first one follows the last
    assert [Path(name).name for name, _ in batch.unreadable] == ["5.png", "6.png"]
    for path in shades.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(LightningDiTError, match=r"none of the 7 images of .* can be read \(.*0\.png: "):
        images.batch([0], Unreadable.NEXT)


@pytest.mark.parametrize(
    ("count", "at_most", "chosen"),
    [(3, 5, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (10, 4, [0, 2, 5, 7]), (7, 1, [0]), (0, 3, [])],
)
def test_evenly_spaced_items(count: int, at_most: int, chosen: list[int]) -> None:
    assert evenly_spaced(count, at_most) == chosen
