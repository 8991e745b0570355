"""The vision model that latents are aligned with: any timm model, its sizes, its input, its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.checkpoint import save_weights
from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.vision import PUBLISHED_MODELS, VisionModel, create_model

VIT, RESNET = "test_vit", "test_resnet"  # timm's own small models for tests: 64 wide at a stride of 16; 128 at 32


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the small ViT, with its classifier, as hubs have them."""
    path = tmp_path_factory.mktemp("vision") / "vit.safetensors"
    torch.manual_seed(0)
    save_weights(timm.create_model(VIT, num_classes=7).state_dict(), path)
    return path


def images(side: int) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_are_the_last_normalised_tokens_on_the_latent_grid(vit_file: Path) -> None:
    vision = VisionModel(create_model(VIT, vit_file), grid=5)
    assert (vision.side, vision.width) == (80, 64)  # 5 positions of 16 pixels
    features = vision(images(80))
    reference = timm.create_model(VIT, num_classes=0, dynamic_img_size=True).eval()
    reference.load_state_dict(vision.model.state_dict())
    mean, std = (torch.tensor(reference.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        tokens = reference.forward_features((images(80) / 2 + 0.5 - mean) / std)[:, reference.num_prefix_tokens :]
    torch.testing.assert_close(features, tokens.transpose(1, 2).reshape(2, 64, 5, 5))
    assert not features.requires_grad


def test_the_published_input_is_the_image_as_it_is(vit_file: Path) -> None:
    vision = VisionModel(create_model(VIT, vit_file), grid=4, published_input=True)
    torch.testing.assert_close(vision.preprocess(images(64)), images(64))
    scaled = F.interpolate(images(96), (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(vision.preprocess(images(96)), scaled)


def test_its_own_input_is_normalised_as_it_was_trained() -> None:
    """Black and white are (0 - mean) / std and (1 - mean) / std of the model's data configuration."""
    model = create_model_at_random(RESNET)
    vision = VisionModel(model, grid=2)
    for value, shown in ((-1.0, 0.0), (1.0, 1.0)):
        seen = vision.preprocess(torch.full((1, 3, 40, 40), value))
        for channel, (mean, std) in enumerate(
            zip(model.pretrained_cfg["mean"], model.pretrained_cfg["std"], strict=True)
        ):
            torch.testing.assert_close(seen[0, channel], torch.full((64, 64), (shown - mean) / std))


def create_model_at_random(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0)


def test_a_convolutional_network_has_a_grid_too() -> None:
    vision = VisionModel(create_model_at_random(RESNET), grid=3)
    assert (vision.side, vision.width) == (96, vision.model.num_features)
    assert vision(images(48)).shape == (2, vision.width, 3, 3)


def test_a_grid_of_another_stride_is_resampled(vit_file: Path) -> None:
    """The mean of a map is kept by an antialiased halving; a size of 96 pixels gives a grid of 6."""
    model = create_model(VIT, vit_file)
    fine, coarse = VisionModel(model, grid=6, size=96), VisionModel(model, grid=3, size=96)
    assert (fine.side, coarse.side) == (96, 96)
    known = fine(images(96))
    expected = F.interpolate(known, (3, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(coarse(images(96)), expected)
    constant = F.interpolate(torch.ones(1, 1, 6, 6), (3, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(constant, torch.ones(1, 1, 3, 3))


def test_a_model_of_one_size_gets_that() -> None:
    torch.manual_seed(0)
    fixed = timm.create_model(VIT, num_classes=0, dynamic_img_size=False)
    side = fixed.pretrained_cfg["input_size"][-1]
    vision = VisionModel(fixed, grid=4)
    assert vision.side == side
    assert vision(images(64)).shape == (2, 64, 4, 4)
    with pytest.raises(LightningDiTError, match=f"vision_size is 64; VisionTransformer takes only {side} pixels"):
        VisionModel(fixed, grid=4, size=64)


def test_it_is_frozen_and_stays_in_evaluation(vit_file: Path) -> None:
    vision = VisionModel(create_model(VIT, vit_file), grid=2).train()
    assert not vision.training
    assert not vision.model.training
    assert not any(parameter.requires_grad for parameter in vision.parameters())


def test_the_published_models_give_the_published_grids() -> None:
    """DINOv2 ViT-L/14 sees 224 pixels and MAE ViT-L/16 256 for a latent grid of 16; both are 1024 wide."""
    for name, side in (("dinov2", 224), ("mae", 256)):
        model = timm.create_model(PUBLISHED_MODELS[name], num_classes=0, dynamic_img_size=True, depth=1)
        vision = VisionModel(model, grid=16)
        assert (vision.side, vision.width) == (side, 1024)


def test_wrong_or_missing_weights_are_one_line(vit_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LightningDiTError, match=r"timm .* knows no model 'test_vti'; fix: set train.vision_model to"):
        create_model("test_vti", None)
    with pytest.raises(LightningDiTError, match="gone.pth does not exist; fix: set train.vision_weights to a file"):
        create_model(VIT, tmp_path / "gone.pth")
    with pytest.raises(LightningDiTError, match="does not fit ResNet: .*fix: set train.vision_weights to a file"):
        create_model(RESNET, vit_file)
    with pytest.raises(LightningDiTError, match="weights of test_vit.none cannot be had"):
        create_model("test_vit.none", None)


def test_a_model_without_feature_maps_is_named() -> None:
    with pytest.raises(LightningDiTError, match="timm's Linear gives no feature map"):
        VisionModel(nn.Linear(2, 2), grid=2)
