"""The frozen vision model of the alignment: any timm model as a function from images to a grid of features."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.pretrained import timm_model

#: The published vision models by their names in `use_vf`: DINOv2 ViT-L/14 and MAE ViT-L/16.
PUBLISHED_MODELS = {"dinov2": "vit_large_patch14_dinov2.lvd142m", "mae": "vit_large_patch16_224.mae"}
PUBLISHED_PREFIX = "foundation_model.model."


class VisionModel(nn.Module):
    """A frozen timm model in evaluation mode, whose last feature map is resampled to the latent grid.

    Args:
        model: from `timm.create_model`.
        grid: side of the latent grid.
        size: side in pixels of the model's input. By default a model for any size gets the side at which its own grid
            is the latent grid (stride 14 and 16 positions: 224 pixels, as published).
        published_input: the model gets images in [-1, 1], resized without antialiasing, as in the published code;
            False: images normalised as in the model's training.

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
                f"train.vision_size is {size}; {name} takes only {fixed} pixels", f"set train.vision_size: {fixed}"
            )
        self.side: int = size or fixed or grid * model.feature_info[-1]["reduction"]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(data[key])[:, None, None])

    def preprocess(self, images: Tensor) -> Tensor:
        """Return the model's input (N, 3, side, side) for images (N, 3, H, W) in [-1, 1]."""
        if self.published_input:
            return resized(images, self.side, antialias=False)
        return normalised(resized(images, self.side), self.mean, self.std)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, width, grid, grid) of images (N, 3, H, W) in [-1, 1]."""
        images = self.preprocess(images)  # (N, 3, side, side)
        maps = self.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
        return resized(maps.float(), self.grid)  # (N, width, grid, grid)

    def train(self, mode: bool = True) -> VisionModel:
        """Stay in evaluation mode."""
        return super().train(False)


def resized(images: Tensor, side: int, antialias: bool = True) -> Tensor:
    """Return images or feature maps (N, C, H, W) resized to (N, C, side, side), bilinear."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=antialias)


def normalised(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in [-1, 1], standardised by mean and deviation (3, 1, 1) of images in [0, 1]."""
    return (images * 0.5 + 0.5 - mean) / std


def create_model(name: str, weights: str | Path | None, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a model of timm without its classifier, for images of any size if it allows that.

    Args:
        name: `dinov2` or `mae` (the published ones), or a name of timm's.
        weights: file with timm's names for its tensors; None: those of the hub.
        tensors: the content of `weights`, if it was read before.

    Raises:
        LightningDiTError: see `timm_model`.
    """
    name = PUBLISHED_MODELS.get(name, name)
    fixes = (
        f"set train.vision_model to {', '.join(PUBLISHED_MODELS)} or a name of timm.list_models()",
        f"set train.vision_weights to a file with the weights of timm's {name}",
    )
    return timm_model(name, weights, classifier=False, fixes=fixes, tensors=tensors, dynamic_img_size=True)


def _takes_any_size(model: nn.Module) -> bool:
    """Return whether the model takes images of any size, by its patch embedding or else timm's description."""
    patches = getattr(model, "patch_embed", None)
    return not getattr(patches, "strict_img_size", bool(model.pretrained_cfg.get("fixed_input_size")))
