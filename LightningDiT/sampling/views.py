"""Pictures of samples for people: levels of one channel in a colour map, other images as they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from LightningDiT.data.image_files import open_image
from LightningDiT.files import read_bytes
from LightningDiT.images import WHITE_16_BIT, to_pil, to_uint8
from LightningDiT.radar.colour_maps import coloured

COLOUR_MAP = "jet"


def views(images: Tensor, colour_map: str = COLOUR_MAP) -> list[Image.Image]:
    """Return PIL images of images (N, 3, H, W), or of levels (N, 1, H, W) in a colour map, in [-1, 1]."""
    if images.shape[1] != 1:
        return to_pil(to_uint8(images).cpu().numpy())
    levels = (images[:, 0].float().cpu().numpy() + 1) / 2  # (N, H, W)
    return [Image.fromarray(picture) for picture in coloured(levels, colour_map)]


def shown_file(path: Path, colour_map: str = COLOUR_MAP) -> Image.Image:
    """Return the picture of a sample's file, RGB, levels in a colour map.

    The file is closed at once, since a contact sheet has a thousand.
    """
    with open_image(path) as image:
        if not _is_levels(image):
            return image.convert("RGB")
        return Image.fromarray(coloured(np.asarray(image, np.float64) / WHITE_16_BIT, colour_map))


def shown_bytes(path: Path) -> bytes:
    """Return the picture of a sample's file as a PNG: the file itself, of levels one in the colour map."""
    with open_image(path) as image:
        if not _is_levels(image):
            return read_bytes(path)
    picture = io.BytesIO()
    shown_file(path).save(picture, "PNG")
    return picture.getvalue()


def _is_levels(image: Image.Image) -> bool:
    return image.mode.startswith("I")  # "I;16", or "I", as which older releases of Pillow open 16 bits
