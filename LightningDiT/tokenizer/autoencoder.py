"""The KL autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752).

VA-VAE (Yao, Yang and Wang, arXiv 2501.01423) keeps this network and changes its training. Tensor names and shapes are
those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGVAR_RANGE = (-30.0, 20.0)
NORM_GROUPS = 32


@dataclass(frozen=True)
class AutoencoderSettings:
    """Sizes of the autoencoder, named as in `model.params` of the published tokenizer YAML; defaults: VA-VAE f16d32."""

    embed_dim: int = 32  # channels of the latent
    z_channels: int = 32  # channels inside, before quant_conv
    resolution: int = 256  # of training: sets which levels have attention, and does not limit the input
    in_channels: int = 3  # of the images: 3, or 1 for levels
    out_ch: int = 3  # of the decoded images
    ch: int = 128  # channels of the first level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # a factor per level; the resolution is halved between levels
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    attn_resolutions: tuple[int, ...] = (16,)  # sides of the feature maps that have attention
    dropout: float = 0.0  # share of activations that are set to zero in training
    double_z: bool = True  # the encoder returns mean and log-variance

    def __post_init__(self) -> None:
        for name in ("embed_dim", "z_channels", "resolution", "in_channels", "out_ch", "ch", "num_res_blocks"):
            least = 0 if name == "num_res_blocks" else 1
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} is {value}; {least} or more is expected")
        if not self.ch_mult or min(self.ch_mult) < 1:
            raise ValueError(f"ddconfig.ch_mult is {list(self.ch_mult)}; a positive factor per level is expected")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ddconfig.dropout is {self.dropout}; a share from 0 to below 1 is expected")
        if self.ch % NORM_GROUPS:
            raise ValueError(f"ddconfig.ch is {self.ch}; a multiple of {NORM_GROUPS} is expected (GroupNorm groups)")
        if not self.double_z:
            raise ValueError(
                "ddconfig.double_z is false; a KL autoencoder needs mean and log-variance (double_z: true)"
            )
        if self.resolution % self.downsample_factor:
            raise ValueError(
                f"ddconfig.resolution is {self.resolution}; a multiple of {self.downsample_factor} is"
                f" expected with {len(self.ch_mult)} levels"
            )

    @property
    def downsample_factor(self) -> int:
        """Image side divided by latent side."""
        return 2 ** (len(self.ch_mult) - 1)

    def level_channels(self, level: int) -> int:
        """Return the channels of a level; level 0 has the full resolution."""
        return self.ch * self.ch_mult[level]


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the group normalisation of all blocks."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the resolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution, plus a shortcut (He et al., arXiv 1603.05027)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (N, out, H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (N, out, H, W)
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h  # (N, out, H, W)


class AttnBlock(nn.Module):
    """Single-head attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (N, C, H, W)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (N, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (N, HW, C)
        h = h.transpose(1, 2).reshape(x.shape)  # (N, C, H, W)
        return x + self.proj_out(h)  # (N, C, H, W)


class Downsample(nn.Module):
    """Strided convolution that halves the resolution, padded on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (N, C, H/2, W/2)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (N, C, 2H, 2W)


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, optional attention after each, and an optional resampler."""

    def __init__(self, settings: AutoencoderSettings, index: int, channels_in: int, blocks: int) -> None:
        super().__init__()
        channels = settings.level_channels(index)
        widths = [channels_in] + [channels] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, channels, settings.dropout) for width in widths)
        attentions = blocks if settings.resolution >> index in settings.attn_resolutions else 0
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in range(attentions))

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)  # (N, C, H, W)
            if self.attn:
                x = self.attn[index](x)  # (N, C, H, W)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)  # (N, C, H/2, W/2) or (N, C, 2H, 2W)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))  # (N, C, h, w)


class Encoder(nn.Module):
    """Network from images to the moments of the latent before `quant_conv`."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        levels = len(settings.ch_mult)
        self.conv_in = conv3x3(settings.in_channels, settings.ch)
        self.down = nn.ModuleList()
        width = settings.ch
        for index in range(levels):
            level = Level(settings, index, width, settings.num_res_blocks)
            width = settings.level_channels(index)
            if index < levels - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, settings.dropout)
        self.norm_out = group_norm(width)
        self.conv_out = conv3x3(width, 2 * settings.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (N, ch, H, W)
        for level in self.down:
            h = level(h)  # (N, ch * mult, H / 2^i, W / 2^i)
        h = self.mid(h)  # (N, C, h, w)
        return self.conv_out(F.silu(self.norm_out(h)))  # (N, 2 * z_channels, h, w)


class Decoder(nn.Module):
    """Network from latents after `post_quant_conv` to images."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        levels = len(settings.ch_mult)
        width = settings.level_channels(levels - 1)
        self.conv_in = conv3x3(settings.z_channels, width)
        self.mid = Middle(width, settings.dropout)
        built = []
        for index in reversed(range(levels)):
            level = Level(settings, index, width, settings.num_res_blocks + 1)
            width = settings.level_channels(index)
            if index > 0:
                level.upsample = Upsample(width)
            built.append(level)
        self.up = nn.ModuleList(reversed(built))  # index 0 has the full resolution
        self.norm_out = group_norm(width)
        self.conv_out = conv3x3(width, settings.out_ch)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (N, C, h, w)
        for level in reversed(self.up):
            h = level(h)  # (N, ch * mult, H / 2^i, W / 2^i)
        return self.conv_out(F.silu(self.norm_out(h)))  # (N, out_ch, H, W)


@dataclass(frozen=True)
class DiagonalGaussian:
    """The encoder's posterior q(z | image), a normal distribution with diagonal covariance.

    Attributes:
        mean: (N, C, h, w).
        logvar: (N, C, h, w), natural logarithm of the variance.
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        """Return the most probable latent, (N, C, h, w)."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return a latent drawn from the posterior, (N, C, h, w); the noise is drawn on the CPU."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Return KL(q || N(0, 1)) in nats per image, (N,) (Kingma and Welling, arXiv 1312.6114)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class AutoencoderKL(nn.Module):
    """Encoder, decoder, and 1x1 convolutions between them and the latent."""

    def __init__(self, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)
        self.quant_conv = nn.Conv2d(2 * settings.z_channels, 2 * settings.embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(settings.embed_dim, settings.z_channels, kernel_size=1)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Return the posterior for `images` (N, in_channels, H, W) in [-1, 1]."""
        moments = self.quant_conv(self.encoder(images))  # (N, 2 * embed_dim, h, w)
        mean, logvar = moments.chunk(2, dim=1)  # (N, embed_dim, h, w) each
        return DiagonalGaussian(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, out_ch, H, W), about in [-1, 1], for `latents` (N, embed_dim, h, w)."""
        return self.decoder(self.post_quant_conv(latents))
