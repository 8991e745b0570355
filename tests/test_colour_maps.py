"""Colour maps: recognised and inverted, against matplotlib's tables and levels that are known."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from LightningDiT.radar.colour_maps import FAR, NAMES, Inverter, coloured, colours, distances
from tests.walkers import enlarged, windows_of


@pytest.mark.parametrize("name", ["jet-matplotlib", "viridis", "turbo", "inferno", "gray"])
def test_maps_are_those_of_matplotlib(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    published = 255 * matplotlib.colormaps[name.removesuffix("-matplotlib")](np.arange(256))[:, :3]
    assert np.abs(colours(name) - published).max() < 2.7  # of the lines and of rounding


def test_jet_and_parula_have_the_corners_of_matlab() -> None:
    assert colours("jet")[[0, 255]].tolist() == [[0, 0, 128], [128, 0, 0]]
    assert colours("jet")[round(0.375 * 255)].tolist()[1:] == [255, 254]  # cyan, half a step off
    assert colours("parula")[[0, 255]].tolist() == [[62, 38, 168], [249, 251, 21]]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_back_its_map_and_its_levels(name: str) -> None:
    """Without loss the nearest colour is the level itself; a JPEG file leaves the map and stays within 4 %."""
    levels = enlarged(windows_of(0, 1)[0])
    pixels = coloured(levels, name)
    found, error = Inverter(name).levels(pixels)
    repeated = len(np.unique(colours(name), axis=0)) < 256  # of the tables, neighbours may be equal
    assert np.abs(found - levels).max() <= (2.5 if repeated else 1.01) / 255
    assert error == 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    read = np.asarray(Image.open(file).convert("RGB"))
    found, error = Inverter(name).levels(read)
    assert float(np.sqrt(((found - levels) ** 2).mean())) < 0.04
    near = distances(read)
    assert min(near, key=lambda other: near[other]) == name
    assert error < FAR


def test_a_photograph_is_in_no_map() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert min(distances(noise).values()) > FAR
