"""Classes of a run that names none: random or balanced, the same in every batch, and what is said of them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from LightningDiT import inference
from LightningDiT.console import run_main
from LightningDiT.data.labels import balance_of
from LightningDiT.sampling.label_draws import balanced_labels, drawn_labels, random_labels, remainder_line
from LightningDiT.seeds import generator_for
from tests.test_conditions import write_model


@pytest.mark.parametrize(("count", "classes"), [(40, 10), (43, 10), (7, 10), (5, 1)])
def test_balanced_labels_have_each_class_once_a_round(count: int, classes: int) -> None:
    labels = balanced_labels(count, classes, seed=3)
    assert len(labels) == count
    for start in range(0, count, classes):
        part = labels[start : start + classes]
        assert len(set(part)) == len(part) and set(part) <= set(range(classes))
    assert labels == balanced_labels(count + 17, classes, seed=3)[:count]  # more images only add
    assert drawn_labels("balanced", count, classes, 3) == labels


def test_rounds_differ_from_one_another_and_between_seeds() -> None:
    rounds = [
        tuple(balanced_labels(100, 10, seed)[start : start + 10]) for seed in (0, 1) for start in range(0, 100, 10)
    ]
    assert len(set(rounds)) == 20


def test_random_labels_are_those_of_earlier_releases() -> None:
    expected = [int(torch.randint(10, (), generator=generator_for(4, index, 1))) for index in range(20)]
    assert random_labels(20, 10, 4) == expected == drawn_labels("random", 20, 10, 4)


def test_a_remainder_is_said_in_one_line() -> None:
    assert remainder_line(50, 10) == remainder_line(60, 10, 3) == ""
    assert remainder_line(53, 10) == ("53 images are no multiple of 10 classes: 3 of these have 6 images, the others 5")
    assert remainder_line(50, 10, 3) == (
        "50 images are no multiple of 10 classes x 3 conditions: 20 of these have 2 images, the others 1"
    )


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        ([0, 1, 2] * 4, 3, "balanced, 4 images of each of 3 classes"),
        ([0, 1, 2, 1], ("a", "b", "c"), "balanced, 1 or 2 images of each of 3 classes"),
        ([0, 1], 3, "balanced, 0 or 1 images of each of 3 classes"),
        ([0, 0, 2, 2], 3, "balanced over 2 of 3 classes, 2 images of each"),
        ([0, 0, 0, 1], 3, "not balanced, 0 to 3 images of each of 3 classes"),
        ([5, 5, 7, 7], None, "balanced, 2 images of each of 2 classes"),
    ],
)
def test_how_evenly_images_lie_on_classes(labels: list[int], names: object, words: str) -> None:
    assert balance_of(labels, names) == words


def sample(file: Path, output: str, *arguments: str) -> int:
    command = ["--config", str(file), "--output", str(file.parent / output), *arguments]
    return run_main(lambda: inference.main(command))


def test_a_balanced_run_is_the_same_in_every_batch_and_in_its_manifest(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_folder / "config.yaml"
    options = ["--labels", "balanced", "--num-samples", "5", "--seed", "2"]
    assert sample(file, "out", *options, "--batch-size", "2") == 0
    said = capsys.readouterr().out
    assert "labels         balanced, 1 or 2 images of each of 3 classes" in said
    assert "5 images are no multiple of 3 classes: 2 of these have 2 images, the others 1" in said
    content = json.loads((tiny_folder / "out" / "manifest.json").read_text())
    assert content["labels"] == balanced_labels(5, 3, 2) and content["sample"]["labels"] == "balanced"
    first = (tiny_folder / "out" / "000003.png").read_bytes()
    (tiny_folder / "out" / "000003.png").unlink()
    assert sample(file, "out", *options, "--batch-size", "2") == 0  # goes on, with the bytes of the whole run
    assert (tiny_folder / "out" / "000003.png").read_bytes() == first
    assert sample(file, "out", "--num-samples", "5", "--seed", "2") == 1
    assert "sample.labels: balanced there, default now" in capsys.readouterr().err


def test_the_setting_is_that_of_the_file_and_classes_make_it_idle(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_folder / "config.yaml"
    file.write_text(file.read_text() + "\n" if "sample:" not in file.read_text() else file.read_text())
    text = (
        file.read_text()
        .replace("sample:\n", "sample:\n  labels: balanced\n")
        .replace("sample: {", "sample: {labels: balanced, ")
    )
    file.write_text(text)
    assert sample(file, "a", "--num-samples", "3") == 0
    assert json.loads((tiny_folder / "a" / "manifest.json").read_text())["sample"]["labels"] == "balanced"
    capsys.readouterr()
    assert sample(file, "b", "--num-samples", "3", "--classes", "0") == 0
    assert "note           sample.labels: no effect with --classes or --labels FILE" in capsys.readouterr().out
    assert "labels" not in json.loads((tiny_folder / "b" / "manifest.json").read_text())["sample"]
    with pytest.raises(SystemExit) as usage:
        sample(file, "c", "--labels", "balanced", "--classes", "0")
    assert usage.value.code == 2 and "omit --classes" in capsys.readouterr().err


def test_each_class_under_each_condition_equally_often(tiny_folder: Path) -> None:
    file = write_model(tiny_folder)
    options = ["--labels", "balanced", "--num-samples", "12", "--conditions", "Bag", "none"]
    assert sample(file, "out", *options) == 0
    content = json.loads((tiny_folder / "out" / "manifest.json").read_text())
    pairs = Counter(zip(content["labels"], content["conditions"], strict=True))
    assert pairs == dict.fromkeys(itertools.product(range(3), (2, None)), 2)
