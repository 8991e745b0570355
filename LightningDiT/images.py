"""Pixels: centre crop, conversion to and from uint8, grids with captions in any script, and saving."""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from PIL.PngImagePlugin import PngInfo

from LightningDiT.errors import LightningDiTError
from LightningDiT.files import atomic_path, disk_errors, require_regular

if TYPE_CHECKING:  # processes that read images start without torch
    from torch import Tensor

CAPTION_COLOUR = (40, 40, 40)
PAPER = (255, 255, 255)
WHITE_16_BIT = np.iinfo(np.uint16).max
FONT = "LIGHTNINGDIT_FONT"  # variable that names a font for captions
#: Where systems and their users keep fonts.
FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/system/fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    *(f"{os.environ.get('WINDIR', 'C:/Windows')}/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts"),
    *(f"{sys.prefix}/fonts", f"{sys.prefix}/share/fonts"),
)
#: Beginnings of file names, the first to try first: plain faces that read well when small, Chinese ones before others.
READABLE = (
    *("dejavusans.", "notosans-", "arial.", "segoeui.", "helvetica"),
    *(
        "notosanscjk",
        "notosanssc",
        "sourcehansans",
        "wqy",
        "msyh",
        "pingfang",
        "hiragino",
        "stheiti",
        "simhei",
        "simsun",
    ),
    *("droidsansfallback", "meiryo", "yugoth", "malgun", "nanumgothic", "applesdgothic"),
)
STYLED = ("bold", "italic", "oblique", "light", "thin", "black", "medium", "condensed", "mono", "serif")
#: Fonts whose glyphs are frames or blanks for characters that they do not know.
NO_FONTS = ("lastresort", "blank")
MOST_FONTS = 3000
SIMPLIFIED = 2  # number of the simplified Chinese face in the collections of Noto CJK, whose first one is Japanese
PROBE_SIZE = 24  # pixels at which glyphs are compared
UNASSIGNED = "\U0010ffff"
Font = ImageFont.FreeTypeFont


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the middle `size` x `size` pixels after the shorter side was reduced to `size`.

    Halved by box filter as long as it stays at least twice too large, then bicubic (the crop of ADM,
    Dhariwal and Nichol, arXiv 2105.05233).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


#: How an image becomes a square: its middle (`centre_crop`), both axes resized, or the whole image with black around.
FITS = ("crop", "resize", "pad")


def square(image: Image.Image, size: int, fit: str = "crop") -> Image.Image:
    """Return an image with `size` x `size` pixels in one of `FITS`; "resize" and "pad" keep both ends of each axis."""
    if fit == "crop":
        return centre_crop(image, size)
    if fit == "resize":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    scale = size / max(image.size)
    inner = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    whole = Image.new(image.mode, (size, size))
    whole.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    return whole


def to_uint8(images: Tensor) -> Tensor:
    """Return `trunc(clamp(127.5 x + 128, 0, 255))` as (N, H, W, C) uint8 of (N, C, H, W) in [-1, 1]."""
    scaled = (127.5 * images.float() + 128.0).clamp(0, 255)
    return scaled.permute(0, 2, 3, 1).byte()


def to_float(pixels: Tensor) -> Tensor:
    """Return float32 values in [-1, 1] of uint8 pixels, in the same shape; floating pixels are returned unchanged."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1.0


def with_channels(images: Tensor, channels: int) -> Tensor:
    """Return images (N, C, H, W) with `channels` channels: one is replicated, several become their mean in each."""
    if images.shape[1] == channels:
        return images
    return levels_of(images).expand(-1, channels, -1, -1)


def levels_of(images: Tensor) -> Tensor:
    """Return the mean over the channels of images (N, C, H, W), (N, 1, H, W): what a tokenizer of colours gives for
    levels.
    """
    return images if images.shape[1] == 1 else images.mean(1, keepdim=True)


def as_images(pixels: Tensor) -> Tensor:
    """Return images (N, C, H, W) in [-1, 1] of pixels (N, H, W, C) uint8: the inverse of `to_uint8`."""
    return to_float(pixels.permute(0, 3, 1, 2))


def image_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
    columns: int | None = None,
    spares: Sequence[str] | None = None,
) -> Image.Image:
    """Return one picture with all `images` (of one size) in rows, each above its caption.

    Images below 128 pixels are enlarged by a whole factor. A caption that no font of this system can draw gives way to
    that of `spares`, by default to itself with the numbers of its characters.

    Raises:
        LightningDiTError: see `caption_fonts`.
    """
    width, height = images[0].size
    factor = max(1, 128 // width)
    width, height = width * factor, height * factor
    columns = columns or grid_columns(len(images))
    rows = math.ceil(len(images) / columns)
    size = max(10, width // 10)
    strip = int(size * 1.6) if captions else 0
    margin = max(2, width // 32)
    cell = (width + margin, height + strip + margin)
    grid = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), PAPER)
    draw = ImageDraw.Draw(grid)
    drawn = _drawable(captions, spares, size) if captions else []
    for index, image in enumerate(images):
        left = margin + index % columns * cell[0]
        top = margin + index // columns * cell[1]
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        if drawn:
            text, font = drawn[index]
            middle = (left + width / 2, top + height + strip / 2)
            draw.text(middle, fit_text(text, font, width), CAPTION_COLOUR, font, anchor="mm")
    return grid


def _drawable(captions: Sequence[str], spares: Sequence[str] | None, size: int) -> list[tuple[str, Font]]:
    """Return each caption, or what stands for it, with a font of `size` pixels that has its characters."""
    plain = [caption.encode("ascii", "backslashreplace").decode() for caption in captions]
    fonts, loaded = caption_fonts(captions), {"": ImageFont.load_default(size)}
    drawn = []
    for index, caption in enumerate(captions):
        file = fonts.get(caption)
        if file is None:
            drawn.append((spares[index] if spares else plain[index], loaded[""]))
            continue
        if file not in loaded:
            loaded[file] = _open_font(file, size)
        drawn.append((_readable(caption), loaded[file]))
    return drawn


def caption_note(captions: Iterable[str]) -> str | None:
    """Return a line about the fonts of captions; None if Pillow's own draws all of them.

    Raises:
        LightningDiTError: see `caption_fonts`.
    """
    wanted = list(dict.fromkeys(captions))
    fonts = caption_fonts(wanted)
    words = []
    if files := sorted({file for file in fonts.values() if file}):
        words.append(f"drawn by {', '.join(files)}")
    if lacking := [caption for caption in wanted if caption not in fonts]:
        words.append(
            f"no font here can draw {lacking[0]!r}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + f", so the class number stands for it: install one, or set {FONT}=FILE"
        )
    return "; ".join(words) or None


def caption_fonts(texts: Iterable[str]) -> dict[str, str]:
    """Return the file of a font for each text that some font can draw whole; "" is Pillow's own font.

    The font that LIGHTNINGDIT_FONT names comes first, then Pillow's own, then those in the system's folders.

    Raises:
        LightningDiTError: LIGHTNINGDIT_FONT names no font.
    """
    return _fonts_of(frozenset(texts), os.environ.get(FONT, ""))


@functools.lru_cache(maxsize=8)  # a training draws the same captions many times
def _fonts_of(texts: frozenset[str], named: str) -> dict[str, str]:
    found: dict[str, str] = {}
    needs = {
        text: {letter for letter in _readable(text) + "…" if letter != " " and not _is_unseen(letter)}
        for text in texts
        if not _needs_shaping(text)
    }
    for file in _font_files(named):
        if len(found) == len(needs):
            break
        try:
            # letter by letter, since raqm may put a circle under a mark that stands alone
            font = _open_font(file, PROBE_SIZE).font_variant(layout_engine=ImageFont.Layout.BASIC)
        except (OSError, ValueError) as error:
            if file == named:
                raise LightningDiTError(
                    f"{FONT} names {named}, which is no font ({error})", "name a file of the kind .ttf, .otf or .ttc"
                ) from error
            continue
        missing = _glyph(font, UNASSIGNED)
        has = functools.cache(lambda letter, font=font, missing=missing: _glyph(font, letter) not in (missing, None))
        found |= {text: file for text, letters in needs.items() if text not in found and all(map(has, letters))}
    return found


def _font_files(named: str) -> Iterator[str]:
    """Yield the fonts to try; the system's folders are read only if those before them do not do."""
    if named:
        yield named
    yield ""
    files: set[Path] = set()
    for folder in dict.fromkeys(FONT_FOLDERS):
        with contextlib.suppress(OSError, RuntimeError):  # a folder that cannot be read, or a user without a home
            files.update(Path(folder).expanduser().rglob("*.[tToO][tT][fFcC]"))

    def order(path: Path) -> tuple[int, bool, str]:
        name = path.name.lower()
        rank = next((at for at, start in enumerate(READABLE) if name.startswith(start)), len(READABLE))
        return rank, any(word in name for word in STYLED), str(path)

    yield from map(str, sorted((path for path in files if not _is_no_font(path)), key=order)[:MOST_FONTS])


def _is_no_font(path: Path) -> bool:
    return any(word in path.name.lower() for word in NO_FONTS)


def _open_font(file: str, size: int) -> Font:
    """Return the font of a file at `size` pixels, Pillow's own for ""; raises OSError or ValueError."""
    if not file:
        return ImageFont.load_default(size)
    require_regular(file)
    if Path(file).name.startswith("NotoSansCJK"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(file, size, SIMPLIFIED)
    return ImageFont.truetype(file, size)


def _glyph(font: Font, letter: str) -> tuple[tuple[int, int], bytes] | None:
    """Return size and pixels of a character as `font` draws it, for one that it lacks those of a box or a blank."""
    try:
        mask = font.getmask(letter)
    except (OSError, ValueError):
        return None
    return mask.size, bytes(mask)


def _readable(text: str) -> str:
    """Return a text of composed characters, without those that are never seen and that some fonts draw as boxes."""
    composed = unicodedata.normalize("NFC", text.encode("utf-8", "backslashreplace").decode())
    spaced = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp", "Zs") else letter for letter in composed)
    return "".join(letter for letter in spaced if features.check("raqm") or not _is_unseen(letter))


def _is_unseen(letter: str) -> bool:
    """Return whether a character only joins, turns or varies others."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


def _needs_shaping(text: str) -> bool:
    """Return whether a text runs from right to left or joins its characters, which Pillow leaves to raqm."""
    joins = ("R", "AL", "AN", "NSM")
    return not features.check("raqm") and any(unicodedata.bidirectional(letter) in joins for letter in _readable(text))


def grid_columns(count: int) -> int:
    """Return the columns of a grid about twice as wide as high, with full rows if a number near to it gives them."""
    about = math.ceil(math.sqrt(2 * count))
    near = (about + shift for shift in (0, -1, 1, -2, 2))
    return next((columns for columns in near if 0 < columns <= count and count % columns == 0), min(count, about))


def fit_text(text: str, font: Font, width: int) -> str:
    """Return `text`, shortened by an ellipsis where it is wider than `width` pixels."""
    shown = text[: width + 1]  # no letter is narrower than a pixel
    if shown == text and font.getlength(text) <= width:
        return text
    lengths = range(1, len(shown) + 1)
    return shown[: bisect.bisect_right(lengths, width, key=lambda end: font.getlength(shown[:end] + "…"))] + "…"


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Return PIL images of uint8 pixels (N, H, W, 3), or grey ones of (N, H, W, 1)."""
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


def save_reconstructions(originals: Tensor, copies: Tensor, path: str | Path, columns: int = 8) -> Path:
    """Write a PNG of `originals`, `columns` in a row, each row above its reconstructions; both (N, H, W, C) uint8.

    Args:
        originals, copies: with three channels, or both with one.

    Raises:
        LightningDiTError: see `save_png`.
    """
    pairs = zip(originals.split(columns), copies.split(columns), strict=True)
    rows = np.concatenate([row.cpu().numpy() for pair in pairs for row in pair])
    return save_png(image_grid(to_pil(rows), None, min(columns, len(originals))), path)


def save_png(image: Image.Image, path: str | Path, mark: str = "") -> Path:
    """Write `image` as PNG, whole or not at all, and return its path.

    Args:
        mark: text kept in the file, by which `holding` knows it for ours.

    Raises:
        LightningDiTError: the folder cannot be written, or the disk is full.
    """
    about = PngInfo()
    if mark:
        about.add_text("Software", mark)
    with disk_errors(path), atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=about)
    return Path(path)


def save_levels(images: Tensor, paths: Sequence[Path]) -> None:
    """Write levels (N, 1, H, W) in [-1, 1] as grey PNGs of 16 bits: -1 is 0, 1 is 65535, values beyond are clipped.

    Raises:
        LightningDiTError: see `save_png`.
    """
    for image, path in zip(images[:, 0].float().cpu().numpy(), paths, strict=True):
        grey = np.rint((np.clip(image.astype(np.float64), -1, 1) + 1) / 2 * WHITE_16_BIT).astype(np.uint16)
        save_png(Image.fromarray(grey), path)
