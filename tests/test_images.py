"""Crop, uint8, grid and saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from LightningDiT import images as module
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import (
    FITS,
    FONT,
    as_images,
    caption_fonts,
    caption_note,
    centre_crop,
    fit_text,
    grid_columns,
    image_grid,
    levels_of,
    save_levels,
    save_png,
    save_reconstructions,
    square,
    to_float,
    to_pil,
    to_uint8,
    with_channels,
)


def test_uint8_is_the_published_formula() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    pixels = to_uint8(values.view(1, 1, 1, 7).expand(1, 3, 1, 7))
    assert pixels.shape == (1, 1, 7, 3)
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_pixels_come_back_from_floats() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    images = as_images(pixels)
    assert (images.shape, float(images.min()), float(images.max())) == ((1, 3, 16, 16), -1.0, 1.0)
    assert torch.equal(to_uint8(images), pixels)
    assert torch.equal(to_float(pixels).permute(0, 3, 1, 2), images)


def test_reconstructions_are_drawn_below_their_originals(tmp_path: Path) -> None:
    """Three images in rows of two; an image of 128 pixels is not enlarged, and the margins have 4 pixels."""
    originals = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 128, 128, 3)
    save_reconstructions(originals, originals + 100, tmp_path / "r.png", columns=2)
    picture = np.asarray(Image.open(tmp_path / "r.png"))[:, :, 0]
    cells = picture[4 + 64 :: 132, 4 + 64 :: 132]
    assert cells.tolist() == [[10, 20], [110, 120], [30, 130]]


def test_one_channel_is_drawn_grey(tmp_path: Path) -> None:
    levels = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 128, 128)
    pixels = to_uint8(levels)
    assert pixels.shape == (3, 128, 128, 1)
    assert [image.mode for image in to_pil(pixels.numpy())] == ["L"] * 3
    save_reconstructions(pixels, 255 - pixels, tmp_path / "r.png", columns=3)
    picture = np.asarray(Image.open(tmp_path / "r.png"))
    assert (picture == picture[..., :1]).all()
    assert picture[4 + 64 :: 132, 4 + 64 :: 132, 0].tolist() == [[0, 128, 255], [255, 127, 0]]


def test_floating_pixels_are_levels_already() -> None:
    levels = torch.rand(2, 1, 4, 4)
    assert to_float(levels) is levels


def test_channels_are_replicated_or_averaged() -> None:
    levels = torch.rand(2, 1, 4, 4)
    assert torch.equal(with_channels(levels, 3), levels.repeat(1, 3, 1, 1))
    colours = torch.rand(2, 3, 4, 4)
    assert with_channels(colours, 3) is colours
    assert torch.equal(with_channels(colours, 1), colours.mean(1, keepdim=True))
    assert levels_of(levels) is levels


def test_levels_are_saved_in_sixteen_bits(tmp_path: Path) -> None:
    """-1 is 0, 1 is 65535; steps of 1/65535 survive, values beyond are clipped, and NumPy and radar read the same."""
    steps = torch.tensor([-1.5, -1.0, -1 + 2 / 65535, 0.0, 1 - 2 / 65535, 1.0, 2.0]).view(1, 1, 1, 7)
    save_levels(torch.cat([steps, -steps]), [tmp_path / "a.png", tmp_path / "b.png"])
    values = [np.asarray(Image.open(tmp_path / name)).astype(int)[0].tolist() for name in ("a.png", "b.png")]
    assert values == [[0, 0, 1, 32768, 65534, 65535, 65535], [65535, 65535, 65534, 32768, 1, 0, 0]]


@pytest.mark.parametrize("side", [(64, 16), (16, 64)])
def test_a_square_that_is_not_cropped_keeps_both_ends(side: tuple[int, int]) -> None:
    """A grey picture four times as long as wide; an eighth of it is white at one end, and black at the other."""
    wide = side[0] > side[1]
    pixels = np.full((16, 64), 128, np.uint8)
    pixels[:, :8], pixels[:, -8:] = 255, 0
    image = Image.fromarray(pixels if wide else pixels.T)
    found = {fit: np.asarray(square(image, 32, fit)) for fit in FITS}
    found = {fit: values if wide else values.T for fit, values in found.items()}
    assert {values.shape for values in found.values()} == {(32, 32)}
    assert set(found["crop"].flat) == {128}
    np.testing.assert_array_equal(found["crop"], np.asarray(centre_crop(image, 32)))
    assert found["resize"][:, [0, 2, 8, 24, 29, 31]].tolist() == [[255, 255, 128, 128, 0, 0]] * 32
    inner = found["pad"][12:20]
    assert inner[:, [0, 2, 8, 24, 29, 31]].tolist() == [[255, 255, 128, 128, 0, 0]] * 8
    assert not found["pad"][:12].any()
    assert not found["pad"][20:].any()


@pytest.mark.parametrize("size", [(64, 64), (200, 64), (64, 131), (640, 480), (50, 40)])
def test_the_crop_keeps_the_middle(size: tuple[int, int]) -> None:
    """A picture that is white on its left half and black on its right half stays so."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    cropped = np.asarray(centre_crop(image, 32))
    assert cropped.shape == (32, 32)
    assert cropped[:, :14].min() > 250
    assert cropped[:, 18:].max() < 5


def test_a_crop_of_the_same_size_changes_nothing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 24)), pixels)


def test_the_grid_shows_every_picture_in_its_place() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    images = [Image.new("RGB", (32, 32), colour) for colour in colours]
    grid = image_grid(images, [str(number) for number in range(5)], columns=3)
    pixels = np.asarray(grid)
    margin, side = 4, 128  # small pictures are enlarged by a whole factor
    assert grid.width == 3 * (side + margin) + margin
    rows = [margin + 10, (grid.height - margin) // 2 + margin + 10]
    for index, colour in enumerate(colours):
        x = margin + index % 3 * (side + margin) + 64
        assert tuple(pixels[rows[index // 3], x]) == colour
    captions = pixels[margin + side : rows[1] - 10, : side + margin]
    assert captions.min() < 120  # there is ink


def test_long_captions_are_shortened() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size=12)
    assert fit_text("dog", font, 100) == "dog"
    short = fit_text("lesser panda, red panda, panda", font, 100)
    assert short.endswith("…")
    assert font.getlength(short) <= 100


def write_font(path: Path, letters: str) -> Path:
    """Write a font whose glyph of each letter is a full square, and whose box for others is a small one."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    glyphs = {}
    for name, side in ((".notdef", 200), *((f"u{ord(letter):05X}", 900) for letter in letters)):
        pen = pens.TTGlyphPen(None)
        pen.moveTo((50, 0))
        for corner in ((50, side), (side, side), (side, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({ord(letter): f"u{ord(letter):05X}" for letter in letters})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    path.parent.mkdir(exist_ok=True)
    font.save(path)
    return path


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A system whose folder of fonts has one of two Chinese letters, one that frames every letter, and no font."""
    monkeypatch.delenv(FONT, raising=False)
    monkeypatch.setattr(module, "FONT_FOLDERS", (str(tmp_path / "none"), str(tmp_path / "fonts")))
    write_font(tmp_path / "fonts" / "Other.TTF", "猫狗…")
    write_font(tmp_path / "fonts" / "LastResort.otf", "猫狗虎…")
    (tmp_path / "fonts" / "broken.ttf").write_text("no font")
    module._fonts_of.cache_clear()
    yield tmp_path / "fonts"
    module._fonts_of.cache_clear()


def test_a_font_is_found_for_a_name_in_any_script_or_its_number_stands_for_it(fonts: Path) -> None:
    other = str(fonts / "Other.TTF")
    names = ["cat", "猫", "狗狗", "虎", "猫 cat"]
    assert caption_fonts(names) == {"cat": "", "猫": other, "狗狗": other}
    assert caption_note(names) == (
        f"drawn by {other}; no font here can draw '虎' and 1 more, so the class number stands for it:"
        f" install one, or set {FONT}=FILE"
    )
    assert caption_note(["cat", ""]) is None
    white = [Image.new("RGB", (128, 128), "white")] * 5
    drawn = np.asarray(image_grid(white, names, 5, [f"class {number}" for number in range(5)]))
    wanted = np.asarray(image_grid(white, ["cat", "猫", "狗狗", "class 3", "class 4"], 5))
    np.testing.assert_array_equal(drawn, wanted)
    ink = (drawn[4 + 128 :] < 100).all(2)  # the strip of the captions; the letter is a square of 12 x 0.85 pixels
    assert 80 < ink[:, 132:264].sum() < 130
    plain = np.asarray(image_grid(white[:1], ["虎"]))
    np.testing.assert_array_equal(plain, np.asarray(image_grid(white[:1], [r"\u864e"])))


def test_a_font_that_is_named_comes_first(fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = write_font(tmp_path / "mine" / "m.ttf", "cat虎…")
    monkeypatch.setenv(FONT, str(mine))
    assert caption_fonts(["cat", "虎", "dog", "猫"]) == {
        "cat": str(mine),
        "虎": str(mine),
        "dog": "",
        "猫": str(fonts / "Other.TTF"),
    }
    for wrong in (fonts / "broken.ttf", fonts, tmp_path / "absent.ttf"):
        monkeypatch.setenv(FONT, str(wrong))
        with pytest.raises(LightningDiTError, match=f"{FONT} names .*, which is no font .*; fix: name a file"):
            caption_note(["cat"])


def test_text_that_runs_from_right_to_left_needs_a_library(fonts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(write_font(fonts / "hebrew.ttf", "שלום…"))
    monkeypatch.setattr(module.features, "check", lambda name: True)
    assert caption_fonts(["שלום"]) == {"שלום": file}
    module._fonts_of.cache_clear()
    monkeypatch.setattr(module.features, "check", lambda name: False)
    assert caption_fonts(["שלום", "猫\ufe0f"]) == {"猫\ufe0f": str(fonts / "Other.TTF")}


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LightningDiTError, match="cannot be written"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "file" / "grid.png")


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (2, 2), (5, 5), (6, 3), (7, 4), (8, 4), (10, 5), (12, 4), (13, 6), (20, 5), (31, 8)]
)
def test_rows_of_a_grid_are_full_where_they_can_be(count: int, columns: int) -> None:
    assert grid_columns(count) == columns
