"""VA-VAE: images to latents and back, with the normalisation that the transformer expects.

The class keeps its published name and methods; `encode` and `decode` are the normalised pair that the pipeline uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.checkpoint import check_kinds, check_shapes, inspect, load_file, without_values
from LightningDiT.compiling import uncompiled
from LightningDiT.config import typed
from LightningDiT.device import autocast, best_device, float32_products
from LightningDiT.errors import LightningDiTError, warn_user
from LightningDiT.formats import diffusers_vae
from LightningDiT.images import centre_crop, levels_of, to_uint8, with_channels
from LightningDiT.tokenizer.config import TokenizerConfig, load_tokenizer_config

from .autoencoder import AutoencoderKL, AutoencoderSettings, DiagonalGaussian
from .latents import LatentStats

#: Prefixes of the published file's tensors outside the autoencoder: parts of its training.
TRAINING_PREFIXES = ("loss.", "foundation_model.", "linear_proj.")
LAYOUT = torch.channels_last  # of weights and images: avoids a layout copy at every convolution
CHUNK_PIXELS = 256 * 256  # pixels computed at once: one image of 256x256 fills all cores in 0.2 GB; four take 0.7 GB
GPU_CHUNKS = 16  # times as many on a GPU, which they fill


def autoencoder_settings(config: TokenizerConfig) -> AutoencoderSettings:
    """Return the sizes in a tokenizer YAML."""
    values = {"embed_dim": config.embed_dim, **config.ddconfig}
    return typed(AutoencoderSettings, values, f"{config.source}: model.params.ddconfig")


def check_tokenizer_file(config: TokenizerConfig, path: str | Path) -> str:
    """Check that names and shapes in a weights file fit the settings, and return a line that says so."""
    with without_values():
        model = AutoencoderKL(autoencoder_settings(config))
    info = inspect(path)
    check_shapes(model, info.shapes, path, TRAINING_PREFIXES)
    check_kinds(model, info.kinds, path)
    return "; ".join([f"tokenizer {path}: {len(info.shapes)} tensors fit {Path(config.source).name}", *info.notes])


def images_at_once(pixels: int, on_gpu: bool = False) -> int:
    """Return how many images of `pixels` pixels each are encoded or decoded at once."""
    return max(1, CHUNK_PIXELS * (GPU_CHUNKS if on_gpu else 1) // pixels)


def load_autoencoder(config: TokenizerConfig, path: str | Path) -> AutoencoderKL:
    """Return the autoencoder with the weights in `path`, in evaluation mode, float32 and `LAYOUT`."""
    with without_values():
        model = AutoencoderKL(autoencoder_settings(config))
    load_file(model, path, torch.float32, LAYOUT, TRAINING_PREFIXES)
    return model.eval()


class VA_VAE:  # noqa: N801 - the published name
    """The tokenizer of a YAML file.

    Args:
        config: a tokenizer YAML, or its settings.
        img_size: side of the images from `img_transform`; default: the YAML's resolution.
        ckpt_path: weights; default: the YAML's `ckpt_path`.
        stats: statistics of the latents, which `encode` and `decode` need.
        device: default: a GPU that works, as in the published code, else the CPU.
        model: the network with its weights, if they are in memory already; no file is read then.
    """

    def __init__(
        self,
        config: str | Path | TokenizerConfig,
        img_size: int | None = None,
        ckpt_path: str | Path | None = None,
        stats: LatentStats | None = None,
        device: torch.device | str | None = None,
        model: AutoencoderKL | None = None,
    ) -> None:
        self.config = config if isinstance(config, TokenizerConfig) else load_tokenizer_config(config)
        path = diffusers_vae.weights_file(ckpt_path) if ckpt_path else self.config.ckpt_path
        if not path and model is None:
            raise LightningDiTError(
                f"{self.config.source} names no ckpt_path; the tokenizer's weights are expected there",
                "python step3_setup_configs.py",
            )
        self.model = (model or load_autoencoder(self.config, path)).to(device or best_device())
        self.embed_dim = self.model.settings.embed_dim
        self.downsample_factor = self.model.settings.downsample_factor
        self.img_size = img_size or self.model.settings.resolution
        self.stats = stats

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
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
        """Return raw latents (N, C, h, w) for images (N, 3, H, W) or levels (N, 1, H, W) in [-1, 1].

        Args:
            sample: draw from the posterior, as published; False: its mode.
        """
        posterior = self.posterior(images)
        return posterior.sample(generator) if sample else posterior.mode()

    @torch.no_grad()
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Return the posterior over raw latents for images (N, 3, H, W) or levels (N, 1, H, W) in [-1, 1].

        A tokenizer of three channels sees levels replicated, one of a single channel sees the mean of colours.
        """
        images = with_channels(images, self.model.settings.in_channels)
        posteriors = [self.model.encode(chunk) for chunk in self._chunks(images, self._most(images, 1))]
        mean, logvar = (torch.cat([getattr(one, name) for one in posteriors]) for name in ("mean", "logvar"))
        return DiagonalGaussian(mean.contiguous(), logvar.contiguous())

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, half: bool = False, tf32: bool = False) -> Tensor:
        """Return float32 images (N, out_ch, H, W), about in [-1, 1], for raw latents (N, C, h, w).

        Args:
            half: compute in fp16; images that are not finite then are computed in float32, which a warning says.
            tf32: let a GPU compute from TF32 inputs what it computes in float32.
        """
        count, size = len(latents), self._most(latents, self.downsample_factor)
        filled = latents
        if count > 1 and (half or self.device.type != "cpu"):  # one shape: compiled once, rounded alike
            size = math.ceil(count / math.ceil(count / size))
            filled = F.pad(latents, (0, 0, 0, 0, 0, 0, 0, -count % size))
        images = self._decoded(filled, size, torch.float16 if half else torch.float32, tf32)[:count]
        if not half:
            return images
        finite = images.isfinite().flatten(1).all(1)  # (N,)
        if not finite.all():
            wrong = int((~finite).sum())
            warn_user(f"decoding in fp16 gave {wrong} of {count} images that are not finite; they are made in float32")
            with uncompiled(self.model):  # each by itself, so that none depends on the others
                images[~finite] = self._decoded(latents[~finite.to(latents.device)], 1, torch.float32, tf32)
        return images

    def _decoded(self, latents: Tensor, size: int, dtype: torch.dtype, tf32: bool) -> Tensor:
        """Return the images of latents, `size` of them at once, with products and convolutions in `dtype`."""
        with float32_products(self.device, tf32), autocast(self.device, dtype):
            images = [self.model.decode(chunk).float() for chunk in self._chunks(latents, size)]
        return torch.cat(images).contiguous()

    def images_at_once(self, pixels: int) -> int:
        """Return how many images of `pixels` pixels each are computed at once: last bits depend on it on a GPU."""
        return images_at_once(pixels, self.device.type != "cpu")

    def _most(self, values: Tensor, scale: int) -> int:
        """Return how many images or latents (N, C, H, W) are computed at once.

        Args:
            scale: side of a position in pixels: 1 for images, the downsampling factor for latents.
        """
        return self.images_at_once(values.shape[-2] * values.shape[-1] * scale**2)

    def _chunks(self, values: Tensor, size: int) -> Iterator[Tensor]:
        """Yield images or latents (N, C, H, W), `size` of them at once, on the network's device and in `LAYOUT`."""
        weight = self.model.quant_conv.weight
        for chunk in values.split(size):
            yield chunk.to(device=weight.device, dtype=weight.dtype).contiguous(memory_format=LAYOUT)

    def decode_levels(self, latents: Tensor, half: bool = False, tf32: bool = False) -> Tensor:
        """Return float32 levels (N, 1, H, W), about in [-1, 1]: the mean of the channels of `decode_latents`."""
        return levels_of(self.decode_latents(latents, half, tf32))

    def decode_to_images(self, latents: Tensor) -> np.ndarray:
        """Return uint8 pixels (N, H, W, out_ch) for raw latents (N, C, h, w)."""
        return to_uint8(self.decode_latents(latents)).cpu().numpy()

    def encode(self, images: Tensor) -> Tensor:
        """Return normalised latents (the posterior's mode) for images (N, C, H, W) in [-1, 1]; see `posterior`."""
        return self._stats().normalise(self.encode_images(images, sample=False))

    def decode(self, latents: Tensor, half: bool = False, tf32: bool = False) -> Tensor:
        """Return images for normalised latents (N, C, h, w), as `decode_latents` does for raw ones."""
        return self.decode_latents(self._stats().denormalise(latents), half, tf32)

    def _stats(self) -> LatentStats:
        if self.stats is None:
            raise LightningDiTError(
                "this tokenizer has no latent statistics; encode and decode need them",
                "pass stats=LatentStats.load(path), or use encode_images and decode_to_images",
            )
        return self.stats
