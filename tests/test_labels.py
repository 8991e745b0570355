"""Classes by number and by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

from LightningDiT.config import load_config
from LightningDiT.data.labels import Labels
from LightningDiT.errors import LightningDiTError


def test_labels_by_number_and_name() -> None:
    labels = Labels(3, ("cat, house cat", "dog", "sea lion"))
    assert [labels.number(name) for name in (2, "2", "dog", "House Cat", "sea lion", "cat, house cat")] == [
        2,
        2,
        1,
        0,
        2,
        0,
    ]
    assert labels.caption(0) == "cat"
    cases = {
        3: "class 3 is out of range; 0 to 2",
        "-1": "class -1 is out of range",
        "dgo": "class 'dgo' is unknown; near to it: dog",
        "lion": "near to it: sea lion",
        "qqqq": "known: cat, house cat, dog, sea lion",
    }
    for label, message in cases.items():
        with pytest.raises(LightningDiTError, match=message):
            labels.number(label)


def test_imagenet_names_come_from_the_tables_of_timm(tiny_source: Path) -> None:
    config = load_config(tiny_source / "config.yaml")
    imagenet = dataclasses.replace(config, data=dataclasses.replace(config.data, num_classes=1000, class_names=None))
    names = Labels.of(imagenet).names
    assert names is not None
    assert names == tuple(ImageNetInfo().index_to_description(index) for index in range(1000))
    assert names[207] == "golden retriever"
    assert names[3].startswith("tiger shark")
    assert len(names) == 1000


def test_integers_of_other_libraries_are_numbers() -> None:
    labels = Labels(5)
    assert labels.numbers(torch.tensor([1, 4])) == [1, 4]
    assert labels.numbers(np.array([0, 2])) == [0, 2]
    assert labels.caption(4) == "class 4"
    with pytest.raises(LightningDiTError, match="numbers 0 to 4 always work"):
        labels.number("dog")
    with pytest.raises(LightningDiTError, match="class '²' is unknown"):
        labels.number("²")
