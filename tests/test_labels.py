"""Classes by number and by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import ImageNetInfo

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.config import Config, load_config
from LightningDiT.data.labels import Labels, Match, check_agreement, match, natural_key
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.dry_run import verify


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
        "DGO": "class 'DGO' is unknown; near to it: dog",
    }
    for label, message in cases.items():
        with pytest.raises(LightningDiTError, match=message):
            labels.number(label)


def test_imagenet_names_come_from_the_tables_of_timm(tiny_source: Path) -> None:
    config = load_config(tiny_source / "config.yaml")
    imagenet = dataclasses.replace(config, data=dataclasses.replace(config.data, num_classes=1000, class_names=None))
    names = Labels.of(imagenet).names
    assert names is not None
    info = ImageNetInfo()
    assert names == tuple(info.index_to_description(index) for index in range(1000))
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


def test_a_whole_name_counts_before_a_synonym(tiny_source: Path) -> None:
    config = load_config(tiny_source / "config.yaml")
    imagenet = dataclasses.replace(
        config, ckpt_path=None, data=dataclasses.replace(config.data, num_classes=1000, class_names=None)
    )
    labels = Labels.of(imagenet)
    names = ("harp", "Harp", "harmonica", "mouth harp", "cardigan", "Cardigan", "Golden Retriever", "cock")
    assert labels.numbers(names) == [594, 594, 593, 593, 474, 264, 207, 7]
    with pytest.raises(LightningDiTError, match="'crane' names 2 classes: 134 crane; 517 crane; fix: choose one by"):
        labels.number("crane")
    assert labels.identity is not None
    assert (labels.identity[0], labels.listing([7, 594, 7])) == ("n01440764", "7 cock; 594 harp")


def test_names_that_differ_in_case_are_both_reachable() -> None:
    labels = Labels(3, ("Turkey", "turkey", "Istanbul, Turkish city"))
    assert labels.numbers(["Turkey", "turkey", "istanbul"]) == [0, 1, 2]
    with pytest.raises(LightningDiTError, match="'TURKEY' names 2 classes: 0 Turkey; 1 turkey"):
        labels.number("TURKEY")
    with pytest.raises(LightningDiTError, match="near to it: Turkish city"):
        labels.number("turkish citi")


def test_a_numeric_folder_is_a_name() -> None:
    labels = Labels(3, ("1", "2", "10"))
    assert labels.numbers(["10", "1", 0, 2]) == [2, 0, 0, 2]
    with pytest.raises(LightningDiTError, match="class '0' is unknown; near to it: 10"):
        labels.number("0")
    with pytest.raises(LightningDiTError, match="class '7' is unknown; known: 1, 2, 10"):
        labels.number("7")


def test_long_lists_are_cut() -> None:
    many = Labels(25, tuple(f"x{number}" for number in range(25)))
    assert many.listing([*range(20), 3]) == "; ".join(f"{number} x{number}" for number in range(20))
    assert many.listing(range(23)).endswith("; 19 x19 and 3 more")
    assert Labels(25).listing([3, 20]) == "3; 20"
    with pytest.raises(LightningDiTError, match="class 'qqq' is unknown; numbers 0 to 24 always work"):
        many.number("qqq")
    with pytest.raises(LightningDiTError, match="class 'qqq' is unknown; the names are numbers, from 30 to 54"):
        Labels(25, tuple(map(str, range(30, 55)))).number("qqq")


def test_names_are_in_natural_order() -> None:
    names = ["ID_10", "ID_2", "ID_1", "a", "B", "02", "2", "10", "1", "x1y2", "x1y10", "x01y2"]
    expected = ["1", "02", "2", "10", "B", "ID_1", "ID_2", "ID_10", "a", "x01y2", "x1y2", "x1y10"]
    assert sorted(names, key=natural_key) == expected


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (("ant", "cat"), ("ant", "bee", "cat"), Match(("ant", "cat", "bee"), None, (0, 2, 1))),
        (("ant", "bee", "cat"), ("ant", "cat"), Match(("ant", "bee", "cat"), None, (0, 2))),
        (("1", "2", "31"), ("02", "31", "1", "7"), Match(("1", "2", "31", "7"), None, (1, 2, 0, 3))),
        (("1", "2", "10"), None, Match(None, (1, 2, 10), None, "*")),
        (None, ("3", "07"), Match(None, None, (3, 7), "*")),
        (("1", "0"), ("ant", "bee"), Match(("ant", "bee"), (1, 0), None, "*")),
        (("ant", "bee"), ("1", "0"), Match(("ant", "bee"), None, (1, 0), "*")),
        (("ant", "bee"), None, Match(("ant", "bee"), None, None, "*")),
        (None, ("ant", "bee"), Match(("ant", "bee"), None, None, "*")),
        (None, None, Match(None)),
    ],
)
def test_two_sides_get_one_numbering(ours: tuple[str, ...], theirs: tuple[str, ...], expected: Match) -> None:
    found = match(ours, theirs, "A", "B")
    assert dataclasses.replace(found, note="*" if found.note else "") == expected
    assert not found.note or ("A" in found.note and "B" in found.note)


def test_numbers_beyond_the_names_of_the_other_side_are_refused() -> None:
    with pytest.raises(LightningDiTError, match="A has the class '2', and B has 2 classes, 0 to 1"):
        match(("1", "2"), ("ant", "bee"), "A", "B")


def test_a_contradiction_names_both_sides_and_the_first_class() -> None:
    check_agreement(["cat, house cat", "sea lion"], ["house cat", "sea lion"], "A", "B")
    check_agreement(["tench", "goldfish"], ["n01440764", "n01443537"], "A", "B")
    with pytest.raises(LightningDiTError, match="class 1 is 'ID_2' in A and 'ID_10' in B"):
        check_agreement(["ID_1", "ID_2", "ID_10"], ["ID_1", "ID_10", "ID_2"], "A", "B")
    with pytest.raises(LightningDiTError, match="A has 1 classes, B has 2"):
        check_agreement(["x"], ["x", "y"], "A", "B")


def test_names_that_are_one_number_stay_apart() -> None:
    """Within one side "1" and "01" are two classes, so the sides meet by the names as they are written."""
    names = ("1", "01")
    assert match(names, ("1", "01", "2"), "A", "B") == Match(("1", "01", "2"), None, (0, 1, 2))
    assert Labels(2, names).numbers(["1", "01"]) == [0, 1]


def configured(folder: Path, names: list[str] | None, count: int = 3, latents: list[str] | None = None) -> Config:
    """Return the small pipeline's settings with class names in the YAML, and in the latents' manifest."""
    if latents:
        (folder / "manifest.json").write_text(json.dumps({"class_names": latents}))
    config = load_config(folder / "config.yaml")
    given = tuple(names) if names else None
    return dataclasses.replace(config, data=dataclasses.replace(config.data, class_names=given, num_classes=count))


def test_a_configuration_that_contradicts_its_latents_is_refused(tiny_folder: Path) -> None:
    """The recipe's own list of names, written as a person counts, beside folders in another order."""
    config = configured(tiny_folder, ["ID_1", "ID_2", "ID_10"], latents=["ID_1", "ID_10", "ID_2"])
    with pytest.raises(
        LightningDiTError,
        match=r"class 1 is 'ID_2' in data.class_names in .* and 'ID_10' in .*; fix: remove data.class_n",
    ):
        Labels.of(config)
    assert Labels.of(configured(tiny_folder, None)).numbers(["ID_2", "ID_10"]) == [2, 1]


def test_another_number_of_classes_than_the_latents_have(tiny_folder: Path) -> None:
    """More classes keep the names that there are; fewer are refused."""
    more = Labels.of(configured(tiny_folder, None, 5, ["ant", "bee", "cat"]))
    assert [more.caption(number) for number in (2, 4)] == ["cat", "class 4"]
    with pytest.raises(LightningDiTError, match=r"has 3 classes, data.num_classes is 2; fix: set data.num_classes: 3"):
        Labels.of(configured(tiny_folder, None, 2))


def test_a_model_carries_its_class_names(tiny_folder: Path) -> None:
    model = tiny_folder / "transformer.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_weights(model).items()}
    save_weights(weights, model, {"class_names": json.dumps(["ant", "bee", "cat"])})
    assert Labels.of(configured(tiny_folder, None)).names == ("ant", "bee", "cat")
    with pytest.raises(LightningDiTError, match="class 1 is 'cat' in data.class_names .* and 'bee' in the model"):
        verify(configured(tiny_folder, ["ant", "cat", "bee"]))
    with pytest.raises(LightningDiTError, match=r"class 0 is 'bee' in the latents' manifest .* and 'ant' in the model"):
        Labels.of(configured(tiny_folder, None, latents=["bee", "ant", "cat"]))
    save_weights(weights, model, {"class_names": "{"})
    with pytest.raises(LightningDiTError, match="its class names cannot be read"):
        Labels.of(configured(tiny_folder, None, latents=["ant", "bee", "cat"]))


def carry(folder: Path, **names: list[str]) -> None:
    """Write the small pipeline's weights again, with these names in them."""
    model = folder / "transformer.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_weights(model).items()}
    save_weights(weights, model, {key: json.dumps(value) for key, value in names.items()})


def test_each_place_is_compared_with_the_next(tiny_folder: Path) -> None:
    """The settings and the latents agree, and the model says otherwise."""
    carry(tiny_folder, class_names=["a", "c", "b"])
    with pytest.raises(LightningDiTError, match="class 1 is 'b' in the latents' manifest .* and 'c' in the model"):
        Labels.of(configured(tiny_folder, ["a", "b", "c"], latents=["a", "b", "c"]))


def test_a_class_is_known_by_the_name_of_its_folder(tiny_folder: Path) -> None:
    """Words of the settings beside the synsets that the model has learnt."""
    synsets = ("n01440764", "n01443537", "n01484850")
    carry(tiny_folder, class_names=list(synsets))
    labels = Labels.of(configured(tiny_folder, ["tench", "goldfish", "great white shark"]))
    assert (labels.identity, labels.caption(2)) == (synsets, "great white shark")


def test_before_a_training_the_weights_say_nothing_of_names(tiny_folder: Path) -> None:
    carry(tiny_folder, condition_names=["line", "bag"])
    config = configured(tiny_folder, None)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_conditions=2))
    conditions = [Labels.conditions_of(config, trained) for trained in (True, False)]
    assert [known and known.names for known in conditions] == [("line", "bag"), None]
    adapter = tiny_folder / "adapter.safetensors"
    save_weights({"x": torch.zeros(1)}, adapter, {"class_names": json.dumps(["ID_1", "ID_2", "ID_10"])})
    adapted = dataclasses.replace(config, adapter_path=str(adapter))
    assert [Labels.of(adapted, trained).names for trained in (True, False)] == [("ID_1", "ID_2", "ID_10"), None]
    imagenet = dataclasses.replace(configured(tiny_folder, None, 1000), ckpt_path=None)
    assert [Labels.of(imagenet, trained).names is None for trained in (True, False)] == [False, True]


def test_the_names_of_an_adapter_go_before_those_of_its_weights(tiny_folder: Path) -> None:
    """An adapter may be one for other people than the weights that it changes."""
    model, adapter = tiny_folder / "transformer.safetensors", tiny_folder / "adapter.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_weights(model).items()}
    save_weights(weights, model, {"class_names": json.dumps(["ant", "bee", "cat"])})
    save_weights({"x": torch.zeros(1)}, adapter, {"class_names": json.dumps(["ID_1", "ID_2", "ID_10"])})
    adapted = dataclasses.replace(configured(tiny_folder, None), adapter_path=str(adapter))
    assert Labels.of(adapted).names == ("ID_1", "ID_2", "ID_10")
    save_weights({"x": torch.zeros(1)}, adapter)
    assert Labels.of(adapted).names == ("ant", "bee", "cat")
    assert Labels.of(adapted, trained=False).names is None
