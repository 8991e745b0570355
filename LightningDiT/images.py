"""Pixels: centre crop, conversion to and from uint8, grids with captions, and saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from LightningDiT.files import atomic_path, disk_errors

CAPTION_COLOUR = (40, 40, 40)
PAPER = (255, 255, 255)


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


def to_uint8(images: Tensor) -> Tensor:
    """Return `trunc(clamp(127.5 x + 128, 0, 255))` as (N, H, W, 3) uint8 of (N, 3, H, W) in [-1, 1]."""
    scaled = torch.clamp(127.5 * images.float() + 128.0, 0, 255)
    return scaled.permute(0, 2, 3, 1).to(torch.uint8)


def to_float(pixels: Tensor) -> Tensor:
    """Return float32 values in [-1, 1] of uint8 pixels, in the same shape."""
    return pixels.float() / 127.5 - 1.0


def as_images(pixels: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] of pixels (N, H, W, 3) uint8: the inverse of `to_uint8`."""
    return to_float(pixels.permute(0, 3, 1, 2))


def image_grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Return one picture with all `images` (of one size) in rows, each above its caption.

    Images below 128 pixels are enlarged by a whole factor.
    """
    width, height = images[0].size
    factor = max(1, 128 // width)
    width, height = width * factor, height * factor
    columns = columns or grid_columns(len(images))
    rows = math.ceil(len(images) / columns)
    font = ImageFont.load_default(size=max(10, width // 10))
    strip = int(font.size * 1.6) if captions else 0
    margin = max(2, width // 32)
    cell = (width + margin, height + strip + margin)
    grid = Image.new("RGB", (columns * cell[0] + margin, rows * cell[1] + margin), PAPER)
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        left = margin + index % columns * cell[0]
        top = margin + index // columns * cell[1]
        grid.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            text = fit_text(captions[index], font, width)
            draw.text((left + width / 2, top + height + strip / 2), text, CAPTION_COLOUR, font, anchor="mm")
    return grid


def grid_columns(count: int) -> int:
    """Return the columns of a grid about twice as wide as high, with full rows if a number near to it gives them."""
    about = math.ceil(math.sqrt(2 * count))
    near = (about + shift for shift in (0, -1, 1, -2, 2))
    return next((columns for columns in near if 0 < columns <= count and count % columns == 0), min(count, about))


def fit_text(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return `text` as Unicode, shortened by an ellipsis where it is wider than `width` pixels."""
    text = text.encode("utf-8", "backslashreplace").decode()  # a folder's name may be no Unicode, and is not drawn then
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Return PIL images of uint8 pixels (N, H, W, 3)."""
    return [Image.fromarray(image) for image in images]


def save_reconstructions(originals: Tensor, copies: Tensor, path: str | Path, columns: int = 8) -> Path:
    """Write a PNG of `originals`, `columns` in a row, each row above its reconstructions; both (N, H, W, 3) uint8.

    Raises:
        LightningDiTError: see `save_png`.
    """
    pairs = zip(originals.split(columns), copies.split(columns), strict=True)
    rows = torch.cat([row for pair in pairs for row in pair])
    return save_png(image_grid(to_pil(rows.cpu().numpy()), None, min(columns, len(originals))), path)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write `image` as PNG, whole or not at all, and return its path.

    Raises:
        LightningDiTError: the folder cannot be written, or the disk is full.
    """
    with disk_errors(path), atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)
