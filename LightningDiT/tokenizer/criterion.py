"""The tokenizer's loss: the terms of `losses` with their weights and networks.

Trained tensors outside the autoencoder have the names of the published checkpoints:
`loss.discriminator.main.0.weight`, `loss.logvar`, `linear_proj.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from LightningDiT.images import with_channels
from LightningDiT.tokenizer.config import TokenizerTrainConfig

from .autoencoder import AutoencoderKL, DiagonalGaussian
from .discriminator import PatchDiscriminator
from .losses import (
    ALIGNMENT_CEILING,
    GAN_CEILING,
    adaptive_weight,
    cosine_alignment,
    distance_matrix_alignment,
    hinge_discriminator_loss,
    hinge_generator_loss,
    negative_log_likelihood,
    texture_distance,
)
from .perceptual import PerceptualDistance
from .vision import VisionModel

Terms = dict[str, Tensor]
COLOURS = 3  # channels that LPIPS, the discriminator and vision models take


@dataclass(frozen=True)
class Pass:
    """The result of one forward pass of the autoencoder.

    Attributes:
        images: (N, 3, H, W) or (N, 1, H, W) in [-1, 1].
        posterior: of the latents.
        latents: drawn from it, (N, C, h, w).
        reconstructions: float32, in the shape of `images`.
    """

    images: Tensor
    posterior: DiagonalGaussian
    latents: Tensor
    reconstructions: Tensor

    def coloured(self) -> tuple[Tensor, Tensor]:
        """Return images and reconstructions (N, 3, H, W), for networks of colours; one channel is replicated."""
        return with_channels(self.images, COLOURS), with_channels(self.reconstructions, COLOURS)


class Criterion(nn.Module):
    """The losses of the autoencoder and of its discriminator. Terms with weight 0 are not computed.

    Args:
        config: weights and margins.
        latent_width: channels of the latent.
        vision: frozen vision model, needed if the alignment has a weight.
        perceptual: LPIPS, needed if it has a weight.
        reverse_proj: project latents to the features' width (arXiv 2501.01423); False: features to the latents' width.
    """

    def __init__(
        self,
        config: TokenizerTrainConfig,
        latent_width: int,
        vision: VisionModel | None = None,
        perceptual: PerceptualDistance | None = None,
        reverse_proj: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.reverse_proj = config, reverse_proj
        self.loss = nn.Module()
        self.loss.logvar = nn.Parameter(torch.tensor(config.logvar_init), requires_grad=config.learn_logvar)
        if config.disc_weight:
            self.loss.discriminator = PatchDiscriminator(config.disc_layers)
        if vision is not None:
            widths = (latent_width, vision.width) if reverse_proj else (vision.width, latent_width)
            self.linear_proj = nn.Conv2d(*widths, kernel_size=1, bias=False)
        # a dictionary keeps frozen networks out of the state and of the average
        self._frozen: dict[str, nn.Module | None] = {"vision": vision, "perceptual": perceptual}

    @property
    def discriminator(self) -> PatchDiscriminator | None:
        """The discriminator; None if the adversarial term has no weight."""
        return getattr(self.loss, "discriminator", None)

    def to_device(self, device: torch.device) -> Criterion:
        """Move everything, frozen networks included, and return the criterion."""
        for network in self._frozen.values():
            if network is not None:
                network.to(device)
        return self.to(device)

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters to train with the autoencoder: the projection, and the scale if it is learnt."""
        parameters = [self.loss.logvar] if self.config.learn_logvar else []
        return parameters + (list(self.linear_proj.parameters()) if self._frozen["vision"] else [])

    def is_adversarial(self, step: int) -> bool:
        """Return whether the discriminator takes part in `step`, counted from 0."""
        return self.discriminator is not None and step + 1 >= self.config.disc_start

    def autoencoder_loss(self, result: Pass, model: AutoencoderKL, step: int) -> Terms:
        """Return `loss` and its terms for one forward pass, scalars.

        `l1` and `l2` are means over all values, `texture` over places, `lpips` and `kl` (nats) over images. The
        adaptive weights are among the terms (`gan_adaptive`, `vf_adaptive`).
        """
        config, terms = self.config, self._distances(result)
        weights = {"l1": config.l1_weight, "l2": config.l2_weight, "lpips": config.lpips_weight}
        if config.texture_weight:
            terms["texture"] = texture_distance(result.images, result.reconstructions)
            weights["texture"] = config.texture_weight
        distance = sum(weights[name] * term for name, term in terms.items())
        values = result.images[0].numel() if config.sum_values else 1
        likelihood = negative_log_likelihood(distance, self.loss.logvar, values)
        terms["kl"] = result.posterior.kl().mean()
        total = likelihood + config.kl_weight * terms["kl"]
        if self._frozen["vision"] is not None:
            alignment = self._alignment(result)
            aligned = config.cos_weight * alignment["vf_cos"] + config.distmat_weight * alignment["vf_distmat"]
            if config.adaptive_vf:
                layer = model.encoder.conv_out.weight
                alignment["vf_adaptive"] = adaptive_weight(likelihood, aligned, layer, ALIGNMENT_CEILING)
            total = total + config.vf_weight * alignment.get("vf_adaptive", 1.0) * aligned
            terms |= alignment
        if self.is_adversarial(step):
            terms["gan"] = hinge_generator_loss(self.discriminator(result.coloured()[1]))
            layer = model.decoder.conv_out.weight
            terms["gan_adaptive"] = adaptive_weight(likelihood, terms["gan"], layer, GAN_CEILING)
            total = total + config.disc_weight * terms["gan_adaptive"] * terms["gan"]
        return {"loss": total, **terms}

    def discriminator_loss(self, result: Pass) -> Terms:
        """Return the discriminator's hinge loss and the mean logits of real and reconstructed images, scalars."""
        images, reconstructions = result.coloured()
        real = self.discriminator(images)  # (N, 1, h, w)
        fake = self.discriminator(reconstructions.detach())  # (N, 1, h, w)
        terms = {"logits_real": real.float().mean(), "logits_fake": fake.float().mean()}
        return {"disc": hinge_discriminator_loss(real, fake), **terms}

    def _distances(self, result: Pass) -> Terms:
        """Return the reconstruction terms."""
        error = result.reconstructions - result.images  # (N, C, H, W)
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        perceptual = self._frozen["perceptual"]
        if perceptual is not None:
            terms["lpips"] = perceptual(*result.coloured()).mean()
        return terms

    def _alignment(self, result: Pass) -> Terms:
        """Return the two alignment terms."""
        features = self._frozen["vision"](result.coloured()[0])  # (N, D, h, w)
        latents = result.latents  # (N, C, h, w)
        if self.reverse_proj:
            latents = self.linear_proj(latents)  # (N, D, h, w)
        else:
            features = self.linear_proj(features)  # (N, C, h, w)
        return {
            "vf_cos": cosine_alignment(latents, features, self.config.cos_margin),
            "vf_distmat": distance_matrix_alignment(latents, features, self.config.distmat_margin),
        }
