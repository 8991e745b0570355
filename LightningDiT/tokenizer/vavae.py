"""VA-VAE: pixels to latents and back, with the normalisation that the transformer expects.

The class stands under its published name and with its published methods; `encode` and `decode` are the
normalised pair that the pipeline uses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from LightningDiT.checkpoint import check_shapes, inspect, load_into, load_weights
from LightningDiT.config import TokenizerConfig, load_tokenizer_config, typed
from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import centre_crop, to_uint8

from .autoencoder import AutoencoderKL, AutoencoderSettings
from .latents import LatentStats

#: What the published file holds besides the autoencoder: parts of its training.
TRAINING_PREFIXES = ("loss.", "foundation_model.", "linear_proj.")


def autoencoder_settings(config: TokenizerConfig) -> AutoencoderSettings:
    """Return the sizes that a tokenizer YAML gives."""
    values = {"embed_dim": config.embed_dim, **config.ddconfig}
    return typed(AutoencoderSettings, values, f"{config.source}: model.params.ddconfig")


def check_tokenizer_file(config: TokenizerConfig, path: str | Path) -> str:
    """Compare names and shapes in the weights file with the settings and return a line that says so."""
    with torch.device("meta"):
        model = AutoencoderKL(autoencoder_settings(config))
    info = inspect(path)
    check_shapes(model, info.shapes, path, TRAINING_PREFIXES)
    return f"tokenizer {path}: {len(info.shapes)} tensors fit {Path(config.source).name}"


def load_autoencoder(config: TokenizerConfig, path: str | Path) -> AutoencoderKL:
    """Return the autoencoder in eval mode with the weights in `path`, in the precision of the file."""
    with torch.device("meta"):
        model = AutoencoderKL(autoencoder_settings(config))
    load_into(model, load_weights(path), path, TRAINING_PREFIXES)
    return model.eval()


class VA_VAE:  # noqa: N801 - the published name
    """The tokenizer of a YAML file.

    Args:
        config: a tokenizer YAML (its `ckpt_path` names the weights), or settings that were read already.
        img_size: side of the images that `img_transform` gives; the YAML's resolution where left out.
        ckpt_path: weights to use instead of the YAML's.
        stats: statistics of the latents; without them `encode` and `decode` are refused.
        device: where to compute; as in the published code a GPU that works, else the CPU, where left out.
    """

    def __init__(
        self,
        config: str | Path | TokenizerConfig,
        img_size: int | None = None,
        ckpt_path: str | Path | None = None,
        stats: LatentStats | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config if isinstance(config, TokenizerConfig) else load_tokenizer_config(config)
        path = ckpt_path or self.config.ckpt_path
        if not path:
            raise LightningDiTError(
                f"{self.config.source} names no ckpt_path, the tokenizer's weights are expected there",
                "python step3_setup_configs.py",
            )
        self.model = load_autoencoder(self.config, path).float().to(device or best_device())
        self.embed_dim = self.model.settings.embed_dim
        self.downsample_factor = self.model.settings.downsample_factor
        self.img_size = img_size or self.model.settings.resolution
        self.stats = stats

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.quant_conv.weight.device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> VA_VAE:
        """Move the weights and return the tokenizer."""
        self.model = self.model.to(device=device, dtype=dtype)
        return self

    def img_transform(self, p_hflip: float = 0.0, img_size: int | None = None) -> Callable[[Image.Image], Tensor]:
        """Return the transform from a PIL image to (3, size, size) in [-1, 1]: crop, maybe flip, scale."""
        from torchvision import transforms

        size = img_size or self.img_size
        return transforms.Compose(
            [
                transforms.Lambda(lambda image: centre_crop(image.convert("RGB"), size)),
                transforms.RandomHorizontalFlip(p_hflip),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor, sample: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """Return raw latents (N, C, h, w) of images (N, 3, H, W) in [-1, 1].

        Args:
            sample: draw from the posterior, as published; false gives its mode.
        """
        weight = self.model.quant_conv.weight
        posterior = self.model.encode(images.to(device=weight.device, dtype=weight.dtype))
        return posterior.sample(generator) if sample else posterior.mode()

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, H, W), about [-1, 1], of raw latents (N, C, h, w)."""
        weight = self.model.quant_conv.weight
        return self.model.decode(latents.to(device=weight.device, dtype=weight.dtype))

    def decode_to_images(self, latents: Tensor) -> np.ndarray:
        """Return uint8 pixels (N, H, W, 3) of raw latents (N, C, h, w)."""
        return to_uint8(self.decode_latents(latents)).cpu().numpy()

    def encode(self, images: Tensor) -> Tensor:
        """Return normalised latents (the mode) of images (N, 3, H, W) in [-1, 1]."""
        return self._stats().normalise(self.encode_images(images, sample=False))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, H, W), about [-1, 1], of normalised latents (N, C, h, w)."""
        return self.decode_latents(self._stats().denormalise(latents))

    def _stats(self) -> LatentStats:
        if self.stats is None:
            raise LightningDiTError(
                "this tokenizer was made without latent statistics, which encode and decode need",
                "pass stats=LatentStats.load(path), or use encode_images and decode_to_images",
            )
        return self.stats
