"""The evaluation: torch-fidelity's own numbers, NumPy's and SciPy's, and what it refuses in one line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binomtest
from torch import Tensor, nn

from LightningDiT import evaluate
from LightningDiT.checkpoint import save_weights
from LightningDiT.data.fashion_mnist import FASHION_MNIST_CLASSES
from LightningDiT.data.image_sets import ArrayImages, ImageSet, open_samples
from LightningDiT.data.npz import NpzImages
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import save_png
from LightningDiT.metrics import cache, evaluation, neighbours
from LightningDiT.metrics.by_class import accuracy, class_table
from LightningDiT.metrics.extractors import (
    JUDGE_FILE,
    Extractor,
    InceptionExtractor,
    JudgeExtractor,
    TimmExtractor,
    make_extractor,
)
from LightningDiT.metrics.formulas import FrechetDistance, moments
from LightningDiT.metrics.judge import load_judge
from LightningDiT.metrics.scores import (
    FIDELITY_PIN,
    Bootstrap,
    Comparison,
    Score,
    bootstrap_score,
    proportion,
    scores_of,
)
from LightningDiT.metrics.sources import Source, open_images, open_source
from LightningDiT.seeds import generator_for
from tests.conftest import write_idx
from tests.test_metrics import distance_by_scipy

torch_fidelity = pytest.importorskip("torch_fidelity")


def pixels_of(count: int, side: int, seed: int, brightness: int = 0) -> np.ndarray:
    """Return smooth random pictures (N, side, side, 3) uint8."""
    coarse = np.random.RandomState(seed).randint(0, 200 - brightness, (count, 4, 4, 3))
    return (coarse + brightness).repeat(side // 4, 1).repeat(side // 4, 2).astype(np.uint8)


def save_folder(folder: Path, pixels: np.ndarray, first: int = 0) -> Path:
    for index, image in enumerate(pixels):
        save_png(Image.fromarray(image), folder / f"{first + index:06d}.png")
    return folder


def run(output: Path, samples: Path, reference: Path, *options: str) -> dict[str, Any]:
    """Evaluate by the command line and return its report."""
    given = ["--samples", str(samples), "--reference", str(reference), "--output", str(output)]
    assert evaluate.main([*given, *options]) == 0
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception's weights in torch-fidelity's format, random but of a scale that keeps activations alive."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    network = port.FeatureExtractorInceptionV3
    absent = mock.patch.object(port, "load_state_dict_from_url", return_value={})
    with absent, mock.patch.object(network, "load_state_dict", return_value=None):
        module = network("inception-v3-compat", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            scale = math.sqrt(2 / part.weight[0].numel())
            part.weight.data = scale * torch.randn(part.weight.shape, generator=generator)
    file = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(module.state_dict(), file)
    return file


def test_scores_are_those_of_torch_fidelity(weights: Path, tmp_path: Path) -> None:
    made = save_folder(tmp_path / "made", pixels_of(10, 16, seed=0))
    real = save_folder(tmp_path / "real", pixels_of(5, 16, seed=1, brightness=60))
    report = run(tmp_path / "out", made, real, "--inception-weights", str(weights), "--resamples", "0")
    options = {"cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False, "isc": True, "prc": True}
    theirs = torch_fidelity.calculate_metrics(
        input1=str(made),
        input2=str(real),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        fid=True,
        **options,
    )
    ours = {name: score["value"] for name, score in report["scores"].items()}
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["precision"] == pytest.approx(theirs["precision"])
    assert ours["recall"] == pytest.approx(theirs["recall"])
    assert report["features"] == {"network": "inception", "layer": "pool_3", "dimensions": 2048}
    assert any("10 generated images: below 10000" in line for line in report["warnings"])
    spatial = [spatial_activations(tmp_path / "out", title) for title in ("generated", "reference")]
    assert ours["sfid"] == pytest.approx(distance_by_svd(*spatial), rel=1e-5)
    first = open_images(str(made)).batch([0, 1]).pixels
    np.testing.assert_allclose(spatial[0][:2], spatial_by_layers(weights, first), rtol=1e-4, atol=1e-5)


def spatial_activations(output: Path, title: str) -> np.ndarray:
    (file,) = output.glob(f"features/{title}-*/*.safetensors")
    return load_file(file)["spatial"].double().numpy()


def spatial_by_layers(weights: Path, pixels: Tensor) -> np.ndarray:
    """Return the first 7 channels of `mixed_6/conv`, by the network's layers called one after the other."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
    before = (
        "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2"
        " Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c"
    )
    x = (resize(pixels.float(), size=(299, 299), align_corners=False) - 128) / 128
    for name in before.split():
        x = getattr(network, name)(x)
    spatial = network.Mixed_6d.branch1x1(x)[:, :7]
    assert spatial.shape[1:] == (7, 17, 17)
    return spatial.reshape(len(pixels), -1).numpy()


def distance_by_svd(made: np.ndarray, real: np.ndarray) -> float:
    """Return the Frechet distance of few features of many dimensions, by NumPy.

    The trace of the root of C1 C2 is the sum of singular values of A1 A2^T, with A the centred features over the
    root of N - 1: the eigenvalues of C1 C2 = A1^T A1 A2^T A2 are the squares of those values.
    """
    parts = [(side - side.mean(0)) / math.sqrt(len(side) - 1) for side in (made, real)]
    roots = np.linalg.svd(parts[0] @ parts[1].T, compute_uv=False).sum()
    shift = np.square(made.mean(0) - real.mean(0)).sum()
    return float(shift + sum(np.square(part).sum() for part in parts) - 2 * roots)


def gaussian(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_a_distance_is_that_of_scipy_and_its_resamples_are_those_of_repeated_rows(tmp_path: Path) -> None:
    made, real = gaussian(40, 5, seed=0) * 1.5, gaussian(50, 5, seed=1) + 0.5
    comparison = Comparison("judge", {"features": made}, {"features": real}, {}, "key")
    scores = scores_of(comparison, Bootstrap(20, 3, tmp_path))
    assert scores["frechet_distance"].value == pytest.approx(distance_by_scipy(made, real), rel=1e-5)
    (file,) = tmp_path.glob("resamples-fid-*.json")
    kept = json.loads(file.read_text())
    expected = [
        distance_by_scipy(made[torch.randint(40, (40,), generator=generator_for(3, number))], real)
        for number in range(20)
    ]
    assert kept == pytest.approx(expected, rel=1e-5)
    bias = np.mean(expected) - scores["frechet_distance"].value
    assert scores["frechet_distance"].bias == pytest.approx(bias, rel=1e-4)


def test_the_mean_of_the_resamples_tells_the_bias() -> None:
    """The truth: sets of 100 from the reference's own distribution lie above the distance 0 by their mean."""
    distance = FrechetDistance(torch.zeros(6).double(), torch.eye(6).double())
    values, biases = [], []
    for number in range(40):
        features = gaussian(100, 6, seed=number).double()
        drawn = [torch.randint(100, (100,), generator=torch.Generator().manual_seed(n)) for n in range(25)]
        value = distance(*moments(features))
        values.append(value)
        bias = bootstrap_score(value, [distance(*moments(features[chosen])) for chosen in drawn]).bias
        assert bias is not None
        biases.append(bias)
    # to first order in 1 / N: F / N of the mean, and |C - 1|^2 / 4 with F (F + 1) / (N - 1) in the mean (Wishart)
    assert np.mean(values) == pytest.approx(6 / 100 + 6 * 7 / (4 * 99), rel=0.15)
    assert np.mean(biases) == pytest.approx(np.mean(values), rel=0.15)


def test_an_interval_lies_around_the_value() -> None:
    score = bootstrap_score(5.0, [float(number) for number in range(101)])
    # the resamples' mean is 50, their quantiles 2.5 and 97.5; moved back by 45
    assert score == Score(5.0, 0.0, pytest.approx(52.5), pytest.approx(45.0))
    assert bootstrap_score(50.0, [float(number) for number in range(101)]).low == pytest.approx(2.5)
    assert bootstrap_score(5.0, []) == Score(5.0)


@pytest.mark.parametrize(("hits", "count"), [(0, 20), (7, 20), (20, 20), (499, 1000)])
def test_the_interval_of_a_share_is_scipys(hits: int, count: int) -> None:
    score = proportion(hits / count, count)
    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert (score.low, score.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert (score.low == 0, score.high == 1) == (hits == 0, hits == count)  # no 2.8e-17 is printed


def test_the_score_of_a_classifier_that_is_sure_is_the_number_of_classes(tmp_path: Path) -> None:
    # two images of each class in every one of the ten splits would need an order; one class gives 1 in any
    logits = torch.zeros(40, 4)
    logits[:, 2] = 100.0
    views = {"features": gaussian(40, 3, seed=0), "logits": logits}
    scores = scores_of(Comparison("inception", views, None, {}, "key"), Bootstrap(3, 0, tmp_path))
    assert list(scores) == ["inception_score"]
    assert scores["inception_score"].value == pytest.approx(1.0, abs=1e-9)


def test_precision_and_recall_of_sets_apart_and_of_a_part(tmp_path: Path) -> None:
    """Generated points in one of two far clusters of real ones: all are among real ones, half the real ones are met."""
    near, far = gaussian(30, 2, seed=0), gaussian(30, 2, seed=0) + 1000
    real = {"features": torch.cat([near, far])}
    scores = scores_of(Comparison("judge", {"features": near}, real, {}, "a"), Bootstrap(0, 0, tmp_path))
    assert (scores["precision"].value, scores["recall"].value) == (1.0, 0.5)
    interval = binomtest(30, 60).proportion_ci(0.95, method="wilson")
    assert (scores["recall"].low, scores["recall"].high) == pytest.approx((interval.low, interval.high))
    apart = Comparison("judge", {"features": near - 5000}, real, {}, "b")
    scores = scores_of(apart, Bootstrap(0, 0, tmp_path))
    assert (scores["precision"].value, scores["recall"].value) == (0.0, 0.0)


def test_the_judge_sees_what_it_sees_elsewhere() -> None:
    images = torch.from_numpy(pixels_of(5, 32, seed=0)).permute(0, 3, 1, 2)
    judge = load_judge(JUDGE_FILE)
    with torch.no_grad():
        expected = judge(images.float() / 127.5 - 1)
    torch.testing.assert_close(JudgeExtractor(JUDGE_FILE)(images)["logits"], expected)


def test_a_timm_model_with_weights_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_weights(model.state_dict(), tmp_path / "vit.safetensors")
    images = torch.from_numpy(pixels_of(2, 160, seed=0)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        expected = model((images.float() / 255 - mean) / std)
    views = make_extractor(f"timm:test_vit@{tmp_path / 'vit.safetensors'}")(images)
    torch.testing.assert_close(views["logits"], expected)
    assert views["features"].shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(views["features"]), expected)
    headless = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    save_weights(headless, tmp_path / "headless.safetensors")
    without = TimmExtractor("test_vit", tmp_path / "headless.safetensors")
    assert list(without(images)) == ["features"]
    torch.testing.assert_close(without(images)["features"], views["features"])


def test_the_crop_is_that_of_adm(tmp_path: Path) -> None:
    wide = np.zeros((1, 8, 24, 3), np.uint8)
    wide[:, :, 8:16] = 200
    save_folder(tmp_path / "a", wide)
    np.savez(tmp_path / "a.npz", wide)
    for name in ("a", "a.npz"):
        assert torch.equal(open_images(str(tmp_path / name), 8).batch([0]).pixels, torch.full((1, 3, 8, 8), 200).byte())


class Counting(Extractor):
    """A network whose features are an image's mean colour, and which counts its images."""

    name, key, layer, numbered = "counting", "counting 1", "mean", True

    def __init__(self, stop_after: int = 1000) -> None:
        super().__init__()
        self.seen, self.stop_after = 0, stop_after

    def activations(self, pixels: Tensor) -> dict[str, Tensor]:
        if self.seen + len(pixels) > self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return {"features": pixels.float().mean((2, 3))}


def test_activations_are_cached_and_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PART", 4)
    pixels = pixels_of(10, 8, seed=0)
    folder = save_folder(tmp_path / "a", pixels)
    expected = torch.from_numpy(pixels).float().mean((1, 2))
    with pytest.raises(KeyboardInterrupt):
        cache.cached_activations(open_images(str(folder)), Counting(stop_after=7), tmp_path / "kept", "a", 3)
    for seen, damaged in ((6, None), (0, None), (4, "00000004")):  # the first part was whole; all; one is torn
        if damaged:
            (part,) = (tmp_path / "kept").rglob(f"{damaged}.safetensors")
            part.write_bytes(part.read_bytes()[:100])
        network = Counting()
        views = cache.cached_activations(open_images(str(folder)), network, tmp_path / "kept", "a", 3)
        assert network.seen == seen
        torch.testing.assert_close(views["features"], expected)
        assert torch.equal(views["pixels"], torch.from_numpy(pixels).permute(0, 3, 1, 2))
    os.utime(folder / "000003.png", (1, 1))  # a file was written again
    network = Counting()
    cache.cached_activations(open_images(str(folder)), network, tmp_path / "kept", "a", 3)
    assert network.seen == 10


def test_values_are_cached_one_by_one(tmp_path: Path) -> None:
    asked: list[int] = []

    def value_of(stop: int) -> Callable[[int], float]:
        def value(number: int) -> float:
            if number == stop:
                raise KeyboardInterrupt
            asked.append(number)
            return number / 2

        return value

    progress = mock.Mock()
    with pytest.raises(KeyboardInterrupt):
        cache.cached_list(tmp_path / "v.json", 5, value_of(3), progress)
    assert cache.cached_list(tmp_path / "v.json", 5, value_of(-1), progress) == [0, 0.5, 1, 1.5, 2]
    assert cache.cached_list(tmp_path / "v.json", 2, value_of(0), progress) == [0, 0.5]
    assert asked == [0, 1, 2, 3, 4]


def test_large_images_are_measured_by_means_of_their_pixels() -> None:
    images = torch.from_numpy(pixels_of(3, 64, seed=0)).permute(0, 3, 1, 2)
    expected = images.double().reshape(3, 3, 32, 2, 32, 2).mean((3, 5)).round()
    assert torch.equal(cache.thumbnails(images).double(), expected)


def test_copies_are_found_and_fresh_images_are_not(tmp_path: Path) -> None:
    training = {"features": gaussian(50, 4, seed=0), "pixels": torch.from_numpy(pixels_of(50, 8, seed=0))}
    real = {"features": gaussian(40, 4, seed=1), "pixels": torch.from_numpy(pixels_of(40, 8, seed=1))}
    copies = {name: view[[30, 4, 17]] for name, view in training.items()}
    report, found = neighbours.memorisation(copies, training, real, tmp_path)
    for space in ("pixels", "features"):
        assert found[space].indices.tolist() == [30, 4, 17]
        assert report[space]["generated"] == {"median": 0.0, "percentile_1": 0.0, "minimum": 0.0}
        assert report[space]["nearer_than_real"] == 1.0
    expected = torch.cdist(real["features"].double(), training["features"].double()).amin(1)
    assert report["features"]["reference"]["median"] == pytest.approx(float(expected.median()), rel=1e-9)
    scaled = [view["pixels"].double().flatten(1) / 127.5 for view in (real, training)]
    expected = torch.cdist(*scaled).amin(1)
    assert report["pixels"]["reference"]["minimum"] == pytest.approx(float(expected.min()), rel=1e-5)
    again, _ = neighbours.memorisation(copies, training, real, tmp_path)
    assert again == report
    other = {**training, "pixels": torch.zeros(50, 4, 4, 3)}
    with pytest.raises(LightningDiTError, match=r"training images differ in size \(pixels\): .* give --size N"):
        neighbours.memorisation(copies, other, None, tmp_path / "new")


def test_the_picture_has_what_is_nearest_above_its_neighbour() -> None:
    made, known = (pixels_of(3, 8, seed) for seed in (0, 1))

    found = {"pixels": neighbours.Neighbours(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2, 2, 0]))}
    picture = np.asarray(neighbours.neighbour_picture(ArrayImages("", made), ArrayImages("", known), found))
    # image_grid enlarges 8 pixels to 128, with margins of 4 and captions of 1.6 times the font's 12 pixels
    row = 128 + int(12 * 1.6) + 4
    for column, (image, neighbour) in enumerate(((1, 2), (2, 0), (0, 2))):
        left = 4 + column * 132
        for top, expected in ((4, made[image]), (4 + row, known[neighbour])):
            cell = picture[top : top + 128 : 16, left : left + 128 : 16]
            assert np.array_equal(cell, expected)


def test_the_table_by_class() -> None:
    labels = torch.tensor([0] * 6 + [2] * 4)
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2]), 3).float()
    samples = {"features": gaussian(10, 3, seed=0), "logits": logits}
    real_labels = torch.tensor([0] * 5 + [2] * 3)
    real = {"features": gaussian(8, 3, seed=1), "logits": torch.eye(3)[[0, 0, 0, 0, 2, 2, 2, 2]]}
    rows = class_table((samples, labels), (real, real_labels), Counting(), ["coat", "bag"])
    assert [(row["class"], row["name"], row["count"]) for row in rows] == [(0, "coat", 6), (2, "2", 4)]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0]
    assert [row["accuracy_real"] for row in rows] == [0.8, 1.0]
    expected = distance_by_scipy(samples["features"][:6], real["features"][:5])
    assert rows[0]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert "frechet_distance" not in rows[1]  # 3 real images in 3 dimensions
    assert accuracy((samples, labels), Counting()) == proportion(0.7, 10)
    assert accuracy((samples, labels + 1), Counting()) is None  # class 3 is beyond the network's


def test_the_whole_on_images_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0", "3"):
        save_folder(tmp_path / "made" / name, pixels_of(8, 32, seed=int(name)))
        save_folder(tmp_path / "real" / name, pixels_of(9, 32, seed=5 + int(name)))
    options = ["--features", "judge", "--resamples", "5", "--training", str(tmp_path / "made")]
    report = run(tmp_path / "out", tmp_path / "made", tmp_path / "real", *options)
    assert list(report["scores"]) == ["frechet_distance", "classifier_score", "precision", "recall"]
    assert report["scores"]["frechet_distance"]["bias"] > 0
    assert [row["count"] for row in report["classes"]] == [8, 8]
    assert report["memorisation"]["pixels"]["generated"]["minimum"] == 0.0
    assert report["memorisation"]["pixels"]["nearer_than_real"] == 1.0
    with Image.open(tmp_path / "out" / "metrics.png") as picture:
        assert picture.width > 1000
    said = capsys.readouterr()
    assert "16 generated images against 18 real ones; judge, penultimate layer, 96 dimensions" in said.out
    words = "balanced, 8 images of each of 2 classes"
    assert f"labels of the generated images: {words}" in said.out and report["samples"]["labels"] == words
    assert "warning: 16 generated images: below 10000" in said.err
    with mock.patch.object(JudgeExtractor, "activations", side_effect=AssertionError("computed again")):
        assert run(tmp_path / "out", tmp_path / "made", tmp_path / "real", *options) == report


class Shades(Extractor):
    """A network that knows an image's class: its grey value over eight."""

    name, key, layer, numbered = "shades", "shades 1", "mean", True

    def __init__(self, classes: tuple[str, ...] | None = None, width: int = 40) -> None:
        super().__init__()
        self.classes, self.width = classes, width

    def activations(self, pixels: Tensor) -> dict[str, Tensor]:
        grey = pixels.float().mean((1, 2, 3))
        logits = torch.nn.functional.one_hot((grey / 8).round().long(), self.width).float()
        return {"features": pixels.float().mean((2, 3)), "logits": logits}


def shaded(folder: Path, outputs: dict[str, int]) -> Path:
    """Write two images for each class (its folder), which `Shades` recognises as the given output."""
    for name, output in outputs.items():
        save_folder(folder / name, np.full((2, 8, 8, 3), 8 * output, np.uint8))
    return folder


def judged(made: ImageSet, real: ImageSet, extractor: Extractor) -> tuple[dict[str, Any], list[str]]:
    """Return accuracies and all lines about classes."""
    samples, reference, notes = evaluation.with_common_classes(made, Source(real, {}))
    assert reference.images is not None
    activations = [extractor(one.batch(range(one.count)).pixels) for one in (samples, reference.images)]
    report, reasons = evaluation.accuracies(samples, activations[0], reference.images, activations[1], extractor)
    return report, notes + reasons


def test_classes_of_both_sides_are_compared_by_name(tmp_path: Path) -> None:
    """Of {ant, cat} and {ant, bee, cat}, cat is beside the cats, and a network that names its classes knows them."""
    made = open_samples(shaded(tmp_path / "made", {"ant": 2, "cat": 0}))
    real = open_samples(shaded(tmp_path / "real", {"ant": 2, "bee": 1, "cat": 0}))
    report, notes = judged(made, real, Shades(("cat", "bee", "ant"), 3))
    rows = [(row["name"], row["count_real"], row["accuracy"], row["accuracy_real"]) for row in report["classes"]]
    assert rows == [("ant", 2, 1.0, 1.0), ("cat", 2, 1.0, 1.0)]
    assert (report["accuracy"]["value"], report["accuracy_real"]["value"], notes) == (1.0, 1.0, [])
    report, notes = judged(real, made, Shades(("cat", "ant"), 3))
    assert "accuracy" not in report
    assert notes == [
        f"{made.source} has no images of 1 classes of {real.source}: bee",
        "no accuracy over all images: shades does not know 1 classes: bee",
    ]


def test_a_part_of_the_people_keeps_their_numbers(tmp_path: Path) -> None:
    people = {str(number): number for number in range(1, 32)}
    made = open_samples(shaded(tmp_path / "made", people))
    some = open_samples(shaded(tmp_path / "real", {name: people[name] for name in ("2", "10", "31")}))
    report, notes = judged(made, some, Shades())
    rows = {row["name"]: (row["count_real"], row["accuracy"]) for row in report["classes"]}
    assert rows == {name: (2 if name in ("2", "10", "31") else 0, 1.0) for name in people}
    assert notes[0] == f"{some.source} has no images of 28 classes of {made.source}: 1, 3, 4, 5, 6"
    assert notes[1] == f"the class names of {made.source} are numbers, and count as the class numbers of shades"
    assert report["accuracy"]["value"] == 1.0


def test_class_numbers_meet_numeric_folders_by_value_and_the_line_says_so(tmp_path: Path) -> None:
    made = open_samples(shaded(tmp_path / "made", {"1": 1, "10": 10}))
    np.savez(tmp_path / "real.npz", np.full((4, 8, 8, 3), 80, np.uint8), np.array([10, 10, 1, 5]))
    report, notes = judged(made, NpzImages(tmp_path / "real.npz"), Shades())
    assert [(row["name"], row["count_real"], row["accuracy"]) for row in report["classes"]] == [
        ("1", 1, 1.0),
        ("10", 2, 1.0),
    ]
    assert notes == [
        f"the class names of {made.source} are numbers, and count as the class numbers of {tmp_path / 'real.npz'}"
    ]


def test_an_accuracy_that_is_missing_is_explained(tmp_path: Path) -> None:
    """Folders 1 to 3 and a network of three outputs: which of them is which cannot be told."""
    made = open_samples(shaded(tmp_path / "made", {"1": 0, "2": 1, "3": 2}))
    report, notes = judged(made, made, Shades(("a", "b", "c"), 3))
    assert "accuracy" not in report
    assert notes == [f"no accuracy: {made.source} has the class '3', and shades has 3 classes, 0 to 2"]
    report, notes = judged(made, made, Shades(None, 3))
    assert "accuracy" not in report
    assert notes[-1] == f"no accuracy: {made.source} has the class 3, shades 3 outputs, 0 to 2"


@pytest.mark.parametrize("name", ["stats.pkl", "photo.png"])
def test_a_file_that_is_no_set_is_named_as_such(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(LightningDiTError, match=rf"{name} is a {name[-4:]} file; a folder of images or an .npz file"):
        open_images(str(tmp_path / name))


def test_statistics_stand_in_for_images(tmp_path: Path) -> None:
    made, real = pixels_of(20, 32, seed=0), pixels_of(30, 32, seed=1)
    np.savez(tmp_path / "made.npz", made)
    images = torch.from_numpy(real).permute(0, 3, 1, 2)
    features = JudgeExtractor(JUDGE_FILE)(images)["features"].double().numpy()
    np.savez(tmp_path / "moments.npz", mu=features.mean(0), sigma=np.cov(features.T))
    np.savez(tmp_path / "real.npz", real)
    # ADM's reference files have images too, and statistics of more of them: the distance takes the statistics
    np.savez(tmp_path / "both.npz", arr_0=real[:10], mu=features.mean(0), sigma=np.cov(features.T))
    options = ["--features", "judge", "--resamples", "0"]
    scores = {
        name: run(tmp_path / f"of {name}", tmp_path / "made.npz", tmp_path / f"{name}.npz", *options)["scores"]
        for name in ("moments", "real", "both")
    }
    distances = [scores[name]["frechet_distance"]["value"] for name in ("moments", "real", "both")]
    assert distances == pytest.approx([distances[1]] * 3, rel=1e-6)
    assert "recall" not in scores["moments"]
    assert "recall" in scores["both"]
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(LightningDiTError, match=r"statistics of 2048 features, the network has 96; fix: name"):
        run(tmp_path / "wide", tmp_path / "made.npz", tmp_path / "wide.npz", *options)


def test_other_statistics_are_resampled_anew(tmp_path: Path) -> None:
    """Of another spread, in a folder that has the resamples of the first ones."""
    made, options = save_folder(tmp_path / "made", pixels_of(12, 32, seed=0)), ("--features", "judge")
    for name, scale in (("a", 1.0), ("b", 100.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(96), sigma=scale * np.eye(96))
    distances = [
        run(tmp_path / output, made, tmp_path / f"{name}.npz", *options, "--resamples", "4")["scores"]
        for output, name in (("out", "a"), ("out", "b"), ("fresh", "b"))
    ]
    first, again, fresh = (scores["frechet_distance"] for scores in distances)
    assert again == fresh != first


def test_another_training_set_is_searched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples themselves are at no distance, and other images are at some."""
    monkeypatch.setattr(evaluation, "neighbour_picture", lambda *parts: None)  # which takes a second
    made, real, other = (save_folder(tmp_path / f"{seed}", pixels_of(8 + seed, 32, seed)) for seed in range(3))
    minima = [
        run(tmp_path / "out", made, real, "--features", "judge", "--resamples", "0", "--training", str(training))
        for training in (made, other)
    ]
    same, apart = (report["memorisation"]["pixels"]["generated"]["minimum"] for report in minima)
    assert same == 0 < apart


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.full(96, np.nan), np.eye(96), "are not finite, or variances below 0"),  # a distance of NaN is none of 0
        (np.zeros(96), -np.eye(96), "are not finite, or variances below 0"),
        (np.zeros(96, complex), np.eye(96), "complex128 where numbers are expected"),
        (np.float64(3), np.eye(96), "statistics of 1 features, the network has 96"),
    ],
)
def test_statistics_that_cannot_be_are_refused(
    mean: np.ndarray, covariance: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "real.npz", mu=mean, sigma=covariance)
    made = save_folder(tmp_path / "made", pixels_of(2, 32, seed=0))
    with pytest.raises(LightningDiTError, match=message):
        run(tmp_path / "out", made, tmp_path / "real.npz", "--features", "judge")


@pytest.mark.parametrize("labels", [[-1, 0], [0.5, 1], [np.nan, 0], [1e12, 0]])
def test_labels_that_are_no_classes_are_refused(labels: list[float], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels_of(2, 8, seed=0), np.array(labels))
    with pytest.raises(LightningDiTError, match="arr_1 holds what is no class number"):
        open_images(str(tmp_path / "a.npz"))


def test_a_network_that_sees_no_numbers_is_named(tmp_path: Path) -> None:
    class Blind(Counting):
        def activations(self, pixels: Tensor) -> dict[str, Tensor]:
            return {"features": torch.full((len(pixels), 1), torch.nan)}

    folder = save_folder(tmp_path / "a", pixels_of(2, 8, seed=0))
    with pytest.raises(LightningDiTError, match="are not finite; fix: give other weights"):
        cache.cached_activations(open_images(str(folder)), Blind(), tmp_path / "kept", "a", 3)
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


@pytest.mark.parametrize("content", ["[1", '{"fid": 1}', '["a"]', "3"])
def test_foreign_values_are_computed_again(content: str, tmp_path: Path) -> None:
    (tmp_path / "v.json").write_text(content)
    assert cache.cached_list(tmp_path / "v.json", 2, float, mock.Mock()) == [0, 1]
    assert json.loads((tmp_path / "v.json").read_text()) == [0, 1]


def test_images_of_other_sizes_are_warned_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_weights(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.safetensors")
    made = save_folder(tmp_path / "made", pixels_of(4, 16, seed=0))
    real = save_folder(tmp_path / "real", pixels_of(4, 24, seed=1))
    options = ["--features", f"timm:test_vit@{tmp_path / 'vit.safetensors'}", "--resamples", "0"]
    assert (
        "generated images have 16x16 pixels, the reference's 24x24: scaling changes every score"
        in (run(tmp_path / "out", made, real, *options)["warnings"])
    )
    cropped = run(tmp_path / "cropped", made, real, *options, "--size", "16")
    assert not any("pixels" in line for line in cropped["warnings"])


@pytest.mark.parametrize("labelled", [True, False])
def test_the_file_for_adms_evaluator(labelled: bool, tmp_path: Path) -> None:
    pixels = pixels_of(3, 8, seed=0)
    folder = save_folder(tmp_path / "made", pixels)
    if labelled:
        (folder / "manifest.json").write_text(json.dumps({"labels": [2, 0, 1]}))
    assert evaluate.main(["--samples", str(folder), "--npz", str(tmp_path / "made.npz")]) == 0
    with np.load(tmp_path / "made.npz") as archive:
        assert np.array_equal(archive["arr_0"], pixels)
        assert archive.files == (["arr_0", "arr_1"] if labelled else ["arr_0"])
        if labelled:
            assert archive["arr_1"].tolist() == [2, 0, 1]
    assert evaluate.main(["--samples", str(tmp_path / "made.npz"), "--npz", str(tmp_path / "again.npz")]) == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "made.npz").read_bytes()
    for target, message in ((tmp_path, "is a folder"), (tmp_path / "made.npz", "holds the samples themselves")):
        with pytest.raises(LightningDiTError, match=message):
            evaluate.main(["--samples", str(tmp_path / "made.npz"), "--npz", str(target)])


def test_the_file_for_adms_evaluator_is_cropped_by_size(tmp_path: Path) -> None:
    """Against the middle columns in NumPy; without --size nobody is told to delete the images."""
    pixels = np.random.RandomState(0).randint(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    given = ["--samples", str(save_folder(tmp_path / "wide", pixels)), "--npz", str(tmp_path / "out.npz")]
    with pytest.raises(LightningDiTError, match=r"000000.png has 12x8 pixels, 12x12 expected; fix: give --size N"):
        evaluate.main(given)
    assert not (tmp_path / "out.npz").exists()
    assert evaluate.main([*given, "--size", "8"]) == 0
    with np.load(tmp_path / "out.npz") as archive:
        assert np.array_equal(archive["arr_0"], pixels[:, :, 2:10])


def test_fashion_mnist_is_taken_by_part(tmp_path: Path) -> None:
    for part, prefix, count in (("train", "train", 5), ("test", "t10k", 3)):
        photographs = np.random.RandomState(count).randint(0, 256, (count, 28, 28))
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", photographs)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count))
        source = open_images(f"{tmp_path}:{part}")
        padded = np.pad(photographs, ((0, 0), (2, 2), (2, 2)))
        assert np.array_equal(source.batch(range(source.count)).pixels.numpy(), np.stack([padded] * 3, 1))
        assert source.labels is not None
        assert source.labels.tolist() == list(range(count))
        assert source.class_names == FASHION_MNIST_CLASSES
    with pytest.raises(LightningDiTError, match=r"holds Fashion-MNIST, and not which part of it; fix: name .*:test"):
        open_source(str(tmp_path))


def make_damaged(tmp_path: Path) -> None:
    """Make what cannot be evaluated."""
    save_folder(tmp_path / "sizes", pixels_of(2, 8, seed=0))
    save_folder(tmp_path / "sizes", pixels_of(2, 16, seed=0), first=2)
    save_folder(tmp_path / "torn", pixels_of(2, 8, seed=0))
    (tmp_path / "torn" / "000001.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "float.npz", np.zeros((2, 8, 8, 3), np.float32))
    np.savez(tmp_path / "labels.npz", np.zeros((2, 8, 8, 3), np.uint8), np.zeros(5))
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "columns.npz", np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)))
    np.savez(tmp_path / "flipped.npz", pixels_of(2, 8, seed=0))
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[400] ^= 1  # in a pixel: the archive's checksum no longer holds
    (tmp_path / "flipped.npz").write_bytes(content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sizes", r"000002\.png has 16x16 pixels, .*000000\.png has 8x8; fix: give --size N"),
        ("torn", r"000001\.png is no whole image .*; fix: delete it"),
        ("empty", r"no images in .*empty"),
        ("nowhere", r"no images in .*nowhere: it is not there"),
        ("nowhere.npz", r"nowhere\.npz is no whole \.npz file"),
        ("text.npz", r"text\.npz is no whole \.npz file"),
        ("float.npz", r"arr_0 is float32 \(2, 8, 8, 3\); uint8 \(N, H, W, 3\) in C order is expected"),
        ("columns.npz", r"in C order is expected"),
        ("flipped.npz", r"flipped\.npz is no whole \.npz file \(Bad CRC-32"),
        ("labels.npz", r"arr_1 has the shape \(5,\) for 2 images"),
        ("other.npz", r"holds weights; arr_0 \(images\) or mu and sigma are expected"),
        ("moments.npz", r"moments\.npz holds statistics and no images"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    make_damaged(tmp_path)
    with pytest.raises(LightningDiTError, match=message) as caught:
        source = open_images(str(tmp_path / name))
        list(source.batches(range(source.count), 5))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    made = save_folder(tmp_path / "made", pixels_of(2, 8, seed=0))
    with pytest.raises(LightningDiTError, match=r"torch-fidelity, .* is missing .*; fix: pip install torch-fid"):
        run(tmp_path / "out", made, made)


def test_the_pin_in_the_message_is_that_of_the_requirements() -> None:
    lines = (Path(__file__).parent.parent / "requirements.txt").read_text().splitlines()
    assert FIDELITY_PIN in lines


def test_without_matplotlib_there_is_no_picture_and_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    made = save_folder(tmp_path / "made", pixels_of(4, 32, seed=0))
    report = run(tmp_path / "out", made, made, "--features", "judge", "--resamples", "0")
    assert report["scores"]["frechet_distance"]["value"] == pytest.approx(0.0, abs=1e-5)
    assert not (tmp_path / "out" / "metrics.png").exists()
    assert "no picture, matplotlib is missing: pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("vgg", r"--features is 'vgg'; inception, judge, timm:NAME or timm:NAME@FILE is expected"),
        ("timm:", r"--features is 'timm:'"),
        ("timm:no_such_model", r"knows no model 'no_such_model'"),
        ("timm:test_vit@nowhere.safetensors", r"nowhere\.safetensors"),
    ],
)
def test_networks_that_cannot_be_had_are_named(features: str, message: str) -> None:
    with pytest.raises(LightningDiTError, match=message):
        make_extractor(features)


def test_other_weights_than_inceptions_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(LightningDiTError, match=r"other\.pth holds other weights than FID's Inception") as caught:
        InceptionExtractor(tmp_path / "other.pth")
    assert "\n" not in str(caught.value)


def test_the_judge_says_which_size_it_sees(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "made", pixels_of(2, 16, seed=0))
    with pytest.raises(LightningDiTError, match=r"have 16x16 pixels; the judge expects 32x32; fix: give --size 32"):
        run(tmp_path / "out", made, made, "--features", "judge")


def test_one_image_has_no_spread(tmp_path: Path) -> None:
    one, many = (save_folder(tmp_path / str(count), pixels_of(count, 32, seed=0)) for count in (1, 3))
    for made, real in ((one, many), (many, one)):
        with pytest.raises(LightningDiTError, match=r"1 has one image; a distance needs two; fix: name a larger set"):
            run(tmp_path / "out", made, real, "--features", "judge")


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    made = save_folder(tmp_path / "made", pixels_of(2, 32, seed=0))
    (tmp_path / "file").write_text("")
    with (
        mock.patch.object(JudgeExtractor, "activations", side_effect=AssertionError("too early")),
        pytest.raises(LightningDiTError, match=r"file/features cannot be written"),
    ):
        run(tmp_path / "file", made, made, "--features", "judge")


def test_the_command_line_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--samples", "a"])
    assert caught.value.code == 2
    assert "--reference is missing" in capsys.readouterr().err
