"""The data sets of torchvision by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from LightningDiT.data.torchvision_sets import open_torchvision
from LightningDiT.errors import LightningDiTError
from tests.test_image_sets import CLASSES, save_images


def test_any_set_of_torchvision_by_its_name(tmp_path: Path) -> None:
    """EuroSAT from a folder as torchvision keeps it, and FakeData, which makes its images itself."""
    save_images(tmp_path / "eurosat" / "2750", 5)
    opened = open_torchvision("EuroSAT", tmp_path, "train")
    assert (opened.count, opened.class_names) == (5, CLASSES)
    assert [opened.read(number)[1] for number in range(5)] == [0, 0, 1, 1, 2]
    expected = Image.open(tmp_path / "eurosat" / "2750" / "dogs" / "001.png")
    np.testing.assert_array_equal(np.asarray(opened.read(2)[0]), np.asarray(expected))
    assert open_torchvision("FakeData", tmp_path, "train").class_names is None
    with pytest.raises(LightningDiTError, match="no data set 'CIFAR11'; near to it: CIFAR10"):
        open_torchvision("CIFAR11", tmp_path, "train")
    with pytest.raises(LightningDiTError, match="FakeData .test. of torchvision cannot be had .* it has no parts"):
        open_torchvision("FakeData", tmp_path, "test")
