"""LPIPS: the package's number is the formula of the paper, and weights come from each kind of file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from LightningDiT.checkpoint import load_weights, save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer import perceptual
from LightningDiT.tokenizer.perceptual import PerceptualDistance, find_weights, load_perceptual

pytest.importorskip("lpips")
LAYERS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of VGG-16's features
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the published code, for images in [-1, 1]


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of VGG-16's convolutions under torchvision's names."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "vgg16.safetensors"
    layers = make_layers(cfgs["D"])
    save_weights({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    return path


def pair() -> tuple[Tensor, Tensor]:
    draws = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return draws[0], draws[1]


def by_hand(vgg_file: Path, first: Tensor, second: Tensor) -> np.ndarray:
    """`sum_l mean_hw w_l . (phi_l(x) - phi_l(y))^2` of unit feature vectors (arXiv 1801.03924, equation 1)."""
    import lpips
    from torchvision.models.vgg import cfgs, make_layers

    heads = load_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth")
    layers = make_layers(cfgs["D"])
    layers.load_state_dict({name.removeprefix("features."): value for name, value in load_weights(vgg_file).items()})
    total = np.zeros(len(first))
    maps = [
        (image - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None] for image in (first, second)
    ]
    for index, layer in enumerate(layers):
        with torch.no_grad():
            maps = [layer(values.clone()) for values in maps]
        if index in LAYERS:
            unit = [values.double().numpy() for values in maps]
            unit = [values / np.sqrt((values**2).sum(1, keepdims=True)) for values in unit]
            weights = heads[f"lin{LAYERS.index(index)}.model.1.weight"].double().numpy()[0, :, 0, 0]
            total += np.einsum("c,nchw->n", weights, (unit[0] - unit[1]) ** 2) / unit[0][0, 0].size
    return total


def test_the_distance_is_that_of_the_paper(vgg_file: Path) -> None:
    distance = load_perceptual(vgg_file)
    first, second = pair()
    np.testing.assert_allclose(distance(first, second).numpy(), by_hand(vgg_file, first, second), rtol=1e-4)
    assert distance(first, first).tolist() == [0.0, 0.0]


def test_it_is_frozen_and_lets_gradients_through(vgg_file: Path) -> None:
    distance = load_perceptual(vgg_file).train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    first, second = pair()
    second.requires_grad_()
    distance(first, second).sum().backward()
    assert float(second.grad.norm()) > 0


def test_the_smallest_image_is_seen(vgg_file: Path) -> None:
    distance = load_perceptual(vgg_file)
    side = perceptual.SMALLEST_SIDE
    first, second = pair()
    assert distance(first[..., :side, :side], second[..., :side, :side]).shape == (2,)
    with pytest.raises(RuntimeError):
        distance(first[..., : side - 1, : side - 1], second[..., : side - 1, : side - 1])


def test_weights_have_three_kinds_of_names(vgg_file: Path, tmp_path: Path) -> None:
    """torchvision's, the package's own, and those inside a published VA-VAE checkpoint."""
    first, second = pair()
    original = load_perceptual(vgg_file)
    own = {name.removeprefix("model."): value for name, value in original.state_dict().items()}
    own = {name: value for name, value in own.items() if name.startswith("net.")}
    published = {f"loss.perceptual_loss.{name}": value for name, value in own.items()}
    for weights in (own, published | {"encoder.conv_in.weight": torch.zeros(1)}):
        assert torch.equal(PerceptualDistance(weights, "file")(first, second), original(first, second))


def test_missing_weights_name_the_file_and_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vgg_file: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(perceptual, "VGG_URL", "http://127.0.0.1:9/vgg16-397923af.pth")  # nobody listens there
    with pytest.raises(LightningDiTError, match=r"vgg16-397923af.pth does not exist and cannot be .*--lpips-weights"):
        load_perceptual(None)
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True, exist_ok=True)
    torch.save(load_weights(vgg_file), cached)
    assert find_weights(None) == cached
    with pytest.raises(LightningDiTError, match=r"gone.pth does not exist; fix: give --lpips-weights FILE"):
        load_perceptual(tmp_path / "gone.pth")
    with pytest.raises(LightningDiTError, match="does not fit LPIPS: tensors 26 missing: net.slice1.0.weight"):
        PerceptualDistance({}, "file")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(LightningDiTError, match=r"lpips, .*, is missing .*; fix: pip install lpips==0.1.4"):
        load_perceptual(None)
