"""The frozen vision model that latents are aligned with: any timm model as a function from images to a feature grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.checkpoint import load_into, load_weights
from LightningDiT.errors import LightningDiTError

#: The published vision models by the names that `use_vf` has for them: DINOv2 ViT-L/14 and MAE ViT-L/16.
PUBLISHED_MODELS = {"dinov2": "vit_large_patch14_dinov2.lvd142m", "mae": "vit_large_patch16_224.mae"}
PUBLISHED_PREFIX = "foundation_model.model."


class VisionModel(nn.Module):
    """A timm model, frozen and in evaluation, whose last feature map is resampled to the latent grid.

    Images are scaled so that the model's own grid has the latent grid's size where it takes any size (a stride of 14
    pixels and 16 positions: 224 pixels, as published); a model of a fixed size gets that.

    Args:
        model: from `timm.create_model`.
        grid: side of the latent grid.
        size: side in pixels of what the model sees, in place of the rule above.
        published_input: images go in as they are, in [-1, 1], scaled without a filter against aliasing, as the
            published code does; else they are normalised as the model was trained.

    Raises:
        LightningDiTError: the model gives no feature map, or does not take `size`.
    """

    def __init__(self, model: nn.Module, grid: int, size: int | None = None, published_input: bool = False) -> None:
        super().__init__()
        from timm.data import resolve_model_data_config

        name = type(model).__name__
        if not hasattr(model, "forward_intermediates") or not getattr(model, "feature_info", None):
            raise LightningDiTError(f"timm's {name} gives no feature map", "choose another train.vision_model")
        data = resolve_model_data_config(model)
        self.model = model.requires_grad_(False).eval()
        self.grid, self.published_input = grid, published_input
        self.width: int = model.feature_info[-1]["num_chs"]
        fixed = None if _takes_any_size(model) else data["input_size"][-1]
        if size and fixed and size != fixed:
            raise LightningDiTError(
                f"train.vision_size is {size}; {name} takes {fixed} pixels alone", f"set train.vision_size: {fixed}"
            )
        self.side: int = size or fixed or grid * model.feature_info[-1]["reduction"]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key])[:, None, None])

    def preprocess(self, images: Tensor) -> Tensor:
        """Return images (N, 3, side, side) as the model sees them, of images (N, 3, H, W) in [-1, 1]."""
        if self.published_input:
            return resized(images, self.side, antialias=False)
        return normalised(resized(images, self.side), self.mean, self.std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, width, grid, grid) of images (N, 3, H, W) in [-1, 1]."""
        seen = self.preprocess(images)
        maps = self.model.forward_intermediates(seen, indices=1, norm=True, intermediates_only=True)[-1]
        return resized(maps.float(), self.grid)  # (N, width, grid, grid)

    def train(self, mode: bool = True) -> VisionModel:
        """Stay in evaluation."""
        return super().train(False)


def resized(images: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Return images or feature maps (N, C, side, side) of those (N, C, H, W), bilinear."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=antialias)


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1] with this mean and standard deviation (3, 1, 1), stated for [0, 1]."""
    return (images * 0.5 + 0.5 - mean) / std


def create_model(name: str, weights: str | Path | None, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return timm's model `name` without its classifier.

    Args:
        name: `dinov2` or `mae` (the published ones), or a name of timm's.
        weights: file with timm's names for its tensors; the hub's where left out.
        tensors: the weights themselves, which came from the file `weights`.

    Raises:
        LightningDiTError: timm does not know the name, or the weights cannot be had or are another model's.
    """
    import timm

    name = PUBLISHED_MODELS.get(name, name)
    fix = f"set train.vision_weights to a file with the weights of timm's {name}"
    if not timm.is_model(name):
        raise LightningDiTError(
            f"timm {timm.__version__} knows no model {name!r}",
            f"set train.vision_model to {', '.join(PUBLISHED_MODELS)} or a name of timm.list_models()",
        )
    if weights is None:
        try:
            return _create(timm, name, pretrained=True)
        except Exception as error:  # no weights for it, no network, a full disk: timm and the hub have many errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LightningDiTError(f"weights of {name} cannot be had ({reason})", fix) from error
    model = _create(timm, name, pretrained=False)
    try:
        load_into(model, tensors or load_weights(weights), weights, ignored=_classifiers(model))
    except LightningDiTError as error:
        raise LightningDiTError(error.message, fix) from error
    return model


def _create(timm: Any, name: str, pretrained: bool) -> Any:
    """Return the model for images of any size where it can be had, without a classifier."""
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:  # a convolutional network takes any size as it is, and does not know the option
        return timm.create_model(name, pretrained=pretrained, num_classes=0)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the classifier's tensors, which a file may hold besides."""
    named = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))


def _takes_any_size(model: nn.Module) -> bool:
    """Whether the model is made for images of any size: its patches say so, or else timm's description of it."""
    patches = getattr(model, "patch_embed", None)
    return not getattr(patches, "strict_img_size", bool(model.pretrained_cfg.get("fixed_input_size")))
