"""Windows as files: pictures in a colour map, arrays in dB, and the names and folders that recordings have."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from LightningDiT.radar.colour_maps import coloured
from LightningDiT.radar.population import CONDITIONS

#: How folders are laid out; {person:02d} and the like are filled in by `path_of`.
LAYOUTS = {
    "people": "ID_{person}",
    "conditions": "{condition}/ID_{person}",
    "people-conditions": "{person:02d}/{condition}",
}
FORMATS = ("jpg", "npy")
SIZE = 256  # pixels of a picture's side
SHOWN = 45.0  # dB below a picture's maximum that the colour map covers
QUALITY = 90  # of the JPEG
BLOW_UPS = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


def path_of(layout: str, person: int, condition: int, number: int, ending: str) -> str:
    """Return the path of a window below the output folder: `ID_7/ID7_case1_1_Doppler102.jpg`.

    The case is the number of the condition from 1, the recording is always 1.
    """
    folder = LAYOUTS[layout].format(person=person, condition=CONDITIONS[condition])
    return f"{folder}/ID{person}_case{condition + 1}_1_Doppler{number}.{ending}"


def picture(decibels: NDArray[np.float32], blow_up: str, colour_map: str) -> Image.Image:
    """Return a window (rows, columns) as a picture: its native columns blown up, then coloured.

    The high end of the map is the window's maximum, the low end lies 45 dB below it.
    """
    share = np.clip(1 + (decibels - decibels.max()) / SHOWN, 0, 1).astype(np.float32)
    large = Image.fromarray(share).resize((SIZE, SIZE), BLOW_UPS[blow_up])
    return Image.fromarray(coloured(np.asarray(large), colour_map))


def encoded(decibels: NDArray[np.float32], ending: str, blow_up: str, colour_map: str) -> bytes:
    """Return the content of a window's file: a JPEG, or the array itself (rows, columns) float32 in dB."""
    content = io.BytesIO()
    if ending == "npy":
        np.lib.format.write_array(content, np.ascontiguousarray(decibels, dtype=np.float32))
    else:
        picture(decibels, blow_up, colour_map).save(content, "JPEG", quality=QUALITY)
    return content.getvalue()
