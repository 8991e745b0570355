"""Colour maps: which one an image is drawn in, the levels behind its colours, and colours for levels.

A level is the place on the map, 0 at its low end and 1 at its high end.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
GREY = "gray"
SIZE = 256  # colours of a map
#: Root mean square distance of pixels to a map, in steps of 8 bits, beyond which the image is not drawn in that map.
#: Photographs lie at 60 and more, JPEG files of spectrograms at 5 to 20.
FAR = 30.0
BLOCKS = 16  # along each side of an image, one pixel of each decides its map
#: Corners of piecewise linear maps: place and red, green, blue in 0 to 1. Jet has two: MATLAB's and matplotlib's.
CORNERS: dict[str, tuple[tuple[float, ...], ...]] = {
    "jet": (
        (0, 0, 0, 0.5),
        (0.125, 0, 0, 1),
        (0.375, 0, 1, 1),
        (0.625, 1, 1, 0),
        (0.875, 1, 0, 0),
        (1, 0.5, 0, 0),
    ),
    "jet-matplotlib": (
        (0, 0, 0, 0.5),
        (0.11, 0, 0, 1),
        (0.125, 0, 0, 1),
        (0.34, 0, 0.86, 1),
        (0.35, 0, 0.9, 0.9677),
        (0.375, 0.0806, 1, 0.8871),
        (0.64, 0.9355, 1, 0.0323),
        (0.65, 0.9677, 0.963, 0),
        (0.66, 1, 0.9259, 0),
        (0.89, 1, 0.0741, 0),
        (0.91, 0.9091, 0, 0),
        (1, 0.5, 0, 0),
    ),
    GREY: ((0, 0, 0, 0), (1, 1, 1, 1)),
}
#: 33 colours of each smooth map, evenly spaced. Lines between them lie within 2 steps of 8 bits of the published
#: tables (matplotlib's; MATLAB's for parula, within 4).
TABLES = {
    "viridis": (
        "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e 297a8e "
        "26828e 23898e 21918c 1f978b 1f9f88 21a685 27ad81 31b57b 3dbc74 4cc26c 5cc863 6ece58 81d34d 95d840 "
        "aadc32 c0df25 d5e21a eae51a fde725"
    ),
    "turbo": (
        "30123b 392a73 4040a2 4456c7 466be3 4680f6 4294ff 37a8fa 28bceb 1ccdd8 18ddc2 1fe9af 32f298 4ef97d "
        "6dfe62 8bff4b a4fc3c b7f735 cbed34 dde037 ecd13a f7c13a fdae35 fe992c fb8122 f56918 ec530f e14109 "
        "d23105 c12302 ac1701 950d01 7a0403"
    ),
    "parula": (
        "3e26a8 422ebf 4537d5 4741e5 484cf0 4757f7 4562fc 3f6eff 337afd 2e86f8 2b90f0 269ae8 21a3e3 1aacdd "
        "0bb3d2 01b9c6 13beb8 27c2ac 33c79d 42ca8b 5acc77 76cc61 93ca4b aec637 c8c129 debd29 f1ba37 febe3c "
        "feca33 f9d62d f5e127 f6ec22 f9fb15"
    ),
    "inferno": (
        "000004 040312 0b0724 150b37 210c4a 2f0a5b 3d0965 4a0c6b 57106e 64156e 71196e 7d1e6d 8a226a 972766 "
        "a32c61 b0315b bc3754 c63d4d d04545 da4e3c e35933 eb6429 f1711f f67e14 f98c0a fb9b06 fcaa0f fbba1f "
        "f9c932 f5d949 f2e865 f3f586 fcffa4"
    ),
}
NAMES = ("jet", "jet-matplotlib", "viridis", "turbo", "parula", "inferno", GREY)


@functools.cache
def colours(name: str) -> Pixels:
    """Return the (256, 3) uint8 colours of a map of `NAMES`, from its low end to its high end."""
    if name in CORNERS:
        corners = np.array(CORNERS[name])
        places, values = corners[:, 0], 255 * corners[:, 1:]
    else:
        values = np.array([list(bytes.fromhex(text)) for text in TABLES[name].split()], np.float64)
        places = np.linspace(0, 1, len(values))
    at = np.linspace(0, 1, SIZE)
    return np.stack([np.interp(at, places, values[:, channel]) for channel in range(3)], 1).round().astype(np.uint8)


def coloured(levels: NDArray[np.floating], name: str) -> Pixels:
    """Return RGB pixels (..., 3) uint8 of levels; those beyond 0 and 1 get the colours of the ends."""
    return colours(name)[np.clip(np.rint(levels * (SIZE - 1)), 0, SIZE - 1).astype(np.intp)]


def distances(pixels: Pixels) -> dict[str, float]:
    """Return the root mean square distance of the pixels (H, W, 3) of an image to each map, in steps of 8 bits.

    The flattest pixel of each block counts, because JPEG files keep colours at half the resolution and edges leave
    the map.
    """
    grey = pixels.sum(2, dtype=np.int16)
    slope = np.zeros(grey.shape, np.int16)
    for axis in (0, 1):
        step = np.abs(np.diff(grey, axis=axis))
        for ends in ((1, 0), (0, 1)):
            slope += np.pad(step, [ends if axis == at else (0, 0) for at in (0, 1)])
    rows, columns = (max(1, side // BLOCKS) for side in slope.shape)
    height, width = slope.shape[0] // rows * rows, slope.shape[1] // columns * columns
    blocks = slope[:height, :width].reshape(height // rows, rows, width // columns, columns).swapaxes(1, 2)
    flat = blocks.reshape(*blocks.shape[:2], -1).argmin(2)
    top, left = np.indices(flat.shape)
    probes = pixels[top * rows + flat // columns, left * columns + flat % columns].reshape(-1, 3)
    return {name: float(np.sqrt(_nearest(probes, name)[1].mean())) for name in NAMES}


def _nearest(pixels: Pixels, name: str) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return number and squared distance of the nearest colour of a map for pixels (N, 3)."""
    table, given = colours(name).astype(np.float32), pixels.astype(np.float32)
    squares = (table**2).sum(1) - 2 * given @ table.T
    index = squares.argmin(1)
    return index, np.take_along_axis(squares, index[:, None], 1)[:, 0] + (given**2).sum(1)


class Inverter:
    """The nearest colour of one map for any pixel; each colour is looked for once (the table takes 32 MB)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._index = np.full(2**24, -1, np.int16)
        self._colours = colours(name).astype(np.int32)

    def levels(self, pixels: Pixels) -> tuple[NDArray[np.float32], float]:
        """Return the levels (H, W) of pixels (H, W, 3), and the root mean square distance of the pixels to the map."""
        packed = (pixels.astype(np.int32) * (65536, 256, 1)).sum(2)
        fresh = np.unique(packed[self._index[packed] < 0])
        for start in range(0, len(fresh), 2**14):
            part = fresh[start : start + 2**14]
            split = np.stack([part >> 16, part >> 8 & 255, part & 255], 1).astype(np.uint8)
            self._index[part] = _nearest(split, self.name)[0]
        index = self._index[packed]
        error = ((self._colours[index] - pixels) ** 2).sum(2).mean()
        return index.astype(np.float32) / (SIZE - 1), float(np.sqrt(error))
