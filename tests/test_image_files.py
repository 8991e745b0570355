"""Image files: which ones are found, and how their pixels become 8-bit RGB."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from LightningDiT.data.image_files import as_rgb, find_images, read_image, shown
from LightningDiT.errors import LightningDiTError
from tests.conftest import PROJECT


def test_an_image_like_a_thread_is_refused(tmp_path: Path) -> None:
    """Its crop would take 256 x 256 x 257 pixels; up to 256 times as long as wide it is read."""
    for length in (256, 257):
        Image.new("RGB", (1, length)).save(tmp_path / f"{length}.png")
    assert read_image(tmp_path / "256.png").size == (1, 256)
    with pytest.raises(ValueError, match="1x257 pixels"):
        read_image(tmp_path / "257.png")


def test_names_that_are_no_unicode_can_be_printed() -> None:
    assert shown(Path(os.fsdecode(b"a/\xff.png"))) == "a/?.png"


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I;16", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("I", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        ("L", [0, 1, 128, 255], [0, 1, 128, 255]),
        ("1", [0, 1, 1, 0], [0, 255, 255, 0]),
    ],
)
def test_grey_pixels_of_any_depth_keep_black_and_white(mode: str, values: list[int], expected: list[int]) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "L": np.uint8, "1": bool}[mode]
    image = as_rgb(Image.fromarray(np.array([values], kind)))
    assert image.mode == "RGB"
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


def test_pixels_without_a_fixed_range_are_refused() -> None:
    with pytest.raises(ValueError, match="fractions"):
        as_rgb(Image.fromarray(np.array([[0.5]], np.float32)))
    with pytest.raises(ValueError, match="from -3 to 70000, beyond 16 bits"):
        as_rgb(Image.fromarray(np.array([[-3, 70000]], np.int32)))


def test_image_files_are_found_by_their_endings_at_any_depth(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    for name in ("a/b/x.JPG", "a/y.webp", "z.tiff", "notes.txt", "model.pt"):
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in find_images(tmp_path).files] == [
        "a/b/x.JPG",
        "a/y.webp",
        "z.tiff",
    ]


def test_what_systems_and_tools_leave_is_passed_over_with_a_count(tmp_path: Path) -> None:
    for name in (
        ".ipynb_checkpoints/x.png",
        "__MACOSX/ant/._a.png",
        "ant/a.png",
        "ant/._a.png",
        "ant/a.npy",
        "b.npy",
        ".lock",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "ant" / "self.png").symlink_to("self.png")
    found = find_images(tmp_path)
    assert [path.name for path in found.files] == ["a.png", "self.png"]
    assert found.notes[0].startswith("passed over 3 hidden files and folders of systems and tools: ")
    assert found.notes[1:] == ("passed over 2 files that are no images: .npy 2",)
    with pytest.raises(LightningDiTError, match=r"no file there is called like an image \(.npy 1 are\)"):
        (tmp_path / "only").mkdir()
        (tmp_path / "only" / "x.npy").touch()
        find_images(tmp_path / "only")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a program of a POSIX shell")
def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    programs, picture = tmp_path / "programs", tmp_path / "cat.png"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    picture.write_bytes(EPS)
    with pytest.raises(UnidentifiedImageError):
        read_image(picture)
    assert not (tmp_path / "started").exists()
    with contextlib.suppress(OSError), Image.open(picture) as opened:
        opened.load()
    assert (tmp_path / "started").exists()  # the program would have been found


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of a POSIX file system")
def test_a_pipe_among_images_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(OSError, match="a pipe, a file was expected"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"])
def test_the_usual_formats_are_read(kind: str, tmp_path: Path) -> None:
    """From a file of any name."""
    Image.new("RGB", (16, 8), (255, 255, 255)).save(tmp_path / "a.image", format=kind)
    image = read_image(tmp_path / "a.image")
    assert (image.size, image.mode, image.getpixel((3, 3))) == ((16, 8), "RGB", (255, 255, 255))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of the memory as Linux counts it")
def test_a_large_16_bit_image_takes_few_bytes_a_pixel(tmp_path: Path) -> None:
    """6000 x 6000 grey pixels of 16 bits, 72 MB: less than twice that above the program itself."""
    side = 6000
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint16)[:, None] * 7, (side, side))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "large.png", compress_level=1)
    program = (
        "import re, sys\nfrom pathlib import Path\nfrom LightningDiT.data.image_sets import open_files\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024\n"
        "images = open_files(sys.argv[1]).cropped(16)\nbefore = peak()\npixels = images.batch([0]).pixels\n"
        "print(peak() - before, pixels[0, 0, 0, 0].item(), pixels[0, 2, 15, 15].item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    grown, first, last = map(int, done.stdout.split())
    assert grown < 2 * 2 * side**2
    assert (first, last) == pytest.approx((7 * side / 32 / 257, 7 * side * 31 / 32 / 257), abs=3)
