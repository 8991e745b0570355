"""The terms of the tokenizer's loss as functions of tensors.

VA-VAE (Yao, Yang and Wang, arXiv 2501.01423) adds an alignment with a frozen vision model to the loss of latent
diffusion's autoencoder (Rombach et al., arXiv 2112.10752). The adversarial part of that loss is VQGAN's (Esser, Rombach
and Ommer, arXiv 2012.09841).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ADAPTIVE_OFFSET = 1e-4  # keeps the ratio of two gradient norms finite
TEXTURE_WINDOW, TEXTURE_STRIDE = 8, 4  # pixels of the patches whose energies are compared
SMALLEST_TEXTURE_SIDE = TEXTURE_WINDOW + 1  # pixels
TEXTURE_FLOOR = 0.25e-4  # the energy of white noise with a standard deviation of 0.01, which nobody sees
GAN_CEILING, ALIGNMENT_CEILING = 1e4, 1e8  # of the two adaptive weights


def negative_log_likelihood(distance: Tensor, logvar: Tensor, values: int) -> Tensor:
    """Return `values * (distance / exp(logvar) + logvar)`, a scalar.

    Args:
        distance: scalar, weighted distance between images and reconstructions, mean over values.
        logvar: scalar, logarithm of the scale that all values share.
        values: number of values in an image for the published loss (sum over an image, mean over images); 1 for the
            mean over values.
    """
    return values * (distance * torch.exp(-logvar) + logvar)


def cosine_alignment(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """Return the mean over positions of `relu(1 - margin - cos(z', f))` (arXiv 2501.01423, marginal cosine similarity).

    Args:
        latents: z', (N, D, h, w).
        features: f, (N, D, h, w).
        margin: similarities above 1 - margin are not increased.
    """
    similarity = F.cosine_similarity(latents.float(), features.float(), dim=1)  # (N, h, w)
    return F.relu(1.0 - margin - similarity).mean()


def distance_matrix_alignment(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """Return the mean over pairs of positions of `relu(|S_z' - S_f| - margin)` (arXiv 2501.01423, distance matrix).

    S is the matrix of cosine similarities between all positions of an image.

    Args:
        latents: z', (N, D, h, w).
        features: f, (N, E, h, w).
        margin: largest difference without a loss.
    """
    difference = similarity_matrix(latents) - similarity_matrix(features)  # (N, hw, hw)
    return F.relu(difference.abs() - margin).mean()


def similarity_matrix(maps: Tensor) -> Tensor:
    """Return the cosine similarities (N, hw, hw) between the positions of maps (N, D, h, w)."""
    unit = F.normalize(maps.float().flatten(2), dim=1)  # (N, D, hw)
    return unit.transpose(1, 2) @ unit


def high_pass(images: Tensor) -> Tensor:
    """Return images (N, C, H, W) less their binomial mean over 3x3 pixels, weights (1, 2, 1) / 4 along each axis.

    The gain is `1 - cos^2(pi f) cos^2(pi g)` at f and g cycles per pixel: 0 for flat images, 1 for alternating pixels.
    """
    weights = images.new_tensor([0.25, 0.5, 0.25])
    kernel = (weights[:, None] * weights).expand(images.shape[1], 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    return images - F.conv2d(padded, kernel, groups=images.shape[1])


def texture_distance(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the mean of `|log(E(x') + e) - log(E(x) + e)|` over places and three subbands, a scalar.

    E is the mean square, over 8x8 pixels every 4 pixels, of a subband of the undecimated Haar transform: differences
    along time, along Doppler, and along both. By Parseval's theorem that is the power spectrum around a place, summed
    over the frequencies of the subband. Such local energies of oriented subbands are what texture models keep (Portilla
    and Simoncelli, 2000). A distance of pixels prefers a smooth mean to speckle in other places; this one asks for as
    much speckle in each direction, wherever its grains lie. With one energy for all directions, stripes would do.

    Args:
        images, reconstructions: (N, C, H, W) in [-1, 1], with sides of `SMALLEST_TEXTURE_SIDE` or more.
    """
    return (texture_energies(reconstructions).log() - texture_energies(images).log()).abs().mean()


def texture_energies(images: Tensor) -> Tensor:
    """Return the local energies of three subbands (N C, 3, h, w), with `TEXTURE_FLOOR` added.

    White noise of standard deviation s has `s^2 / 4` in each.
    """
    images = images.float().flatten(0, 1)  # (N C, H, W)
    above, below = images[:, :-1], images[:, 1:]
    mean, difference = (above + below) / 2, (above - below) / 2  # (N C, H - 1, W)
    along_time = (mean[..., :-1] - mean[..., 1:]) / 2  # (N C, H - 1, W - 1)
    along_doppler = (difference[..., :-1] + difference[..., 1:]) / 2
    along_both = (difference[..., :-1] - difference[..., 1:]) / 2
    squares = torch.stack([along_time, along_doppler, along_both], 1).square()  # (N C, 3, H - 1, W - 1)
    return F.avg_pool2d(squares, TEXTURE_WINDOW, TEXTURE_STRIDE) + TEXTURE_FLOOR


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return `(E relu(1 - D(x)) + E relu(1 + D(x'))) / 2` (Lim and Ye, arXiv 1705.02894) of logits of any shape."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """Return `-E D(x')` of logits of any shape."""
    return -fake.float().mean()


def adaptive_weight(reference: Tensor, term: Tensor, weight: Tensor, ceiling: float) -> Tensor:
    """Return the factor that makes the gradient of `term` at one layer as large as that of `reference`, a scalar.

    `|d reference / d weight| / (|d term / d weight| + 1e-4)`, at most `ceiling`, without a gradient of its own
    (arXiv 2012.09841, equation 7; arXiv 2501.01423, adaptive weighting).

    Args:
        reference: scalar, the reconstruction loss.
        term: scalar.
        weight: parameter of the last layer that both depend on: the decoder's for the adversarial term, the encoder's
            for the alignment.
    """
    (wanted,) = torch.autograd.grad(reference, weight, retain_graph=True)
    (own,) = torch.autograd.grad(term, weight, retain_graph=True)
    return (wanted.norm() / (own.norm() + ADAPTIVE_OFFSET)).clamp(max=ceiling).detach()
