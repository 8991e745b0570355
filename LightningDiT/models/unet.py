"""A U-Net that predicts the velocity of latents: diffusers' `UNet2DModel` in the place of the transformer.

Convolutions look at neighbours from the first step on, which a transformer has to learn from the data. Time, class,
condition and augmentation reach each residual block as one vector, which scales and shifts its second norm (Dhariwal
and Nichol, arXiv 2105.05233).

The presets cost what a transformer costs, at the latents that they are meant for: sides 8 and 16, 4 channels, 31
classes, patch side 2. Parameters in millions; GFLOP of one state at both sides, and over those of the transformer; time
of a training step in bf16 over the transformer's (`python -m studies.unet_cost` on 2 cores of an AMD EPYC; in float32
0.85, 0.72, 0.92 and 0.78):

| preset | parameters | GFLOP 8 | GFLOP 16 | transformer | its parameters | ratio 8 | ratio 16 | time 8 | time 16 |
|---|--:|--:|--:|---|--:|--:|--:|--:|--:|
| UNet-S | 4.19 | 0.103 | 0.414 | LightningDiT-XS/2 | 4.85 | 0.99 | 0.98 | 1.09 | 0.87 |
| UNet-B | 31.50 | 0.673 | 2.678 | LightningDiT-S/2 | 32.51 | 0.95 | 0.95 | 1.02 | 0.86 |

diffusers is imported when a U-Net is built, not before: settings and shapes need no package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LabelEmbedder
from .lightningdit import AUGMENTATION_WEIGHT, CONDITION_TABLE, INITIAL_STD, check_labels, null_labels

PACKAGE = "diffusers"
TIME_SCALE = 1000.0  # the embedding's waves have periods from 6 to 60,000: they tell apart 1,000 steps, not 0 from 1
EMBEDDING = 4  # width of the embedding over that of the first level
GROUPS = 16  # of each group norm
HEAD_WIDTH = 32
NORM_EPS = 1e-5
PREFIX = "unet."  # of the names of diffusers' tensors
CLASS_TABLE = "y_embedder.embedding_table.weight"
#: Settings that no tensor shows. A U-Net computes latents of every size.
UNET_WITHOUT_TENSORS = ("input_size", "dropout", "class_dropout_prob")
#: Channels of each level, the largest first, residual blocks of a level on the way down, and levels with attention.
UNET_PRESETS = {
    "S": ((64, 96, 128), 1, (False, True, True)),
    "B": ((128, 192, 320), 2, (False, True, True)),
}


@dataclass(frozen=True)
class UNetSettings:
    """Sizes and switches of the U-Net."""

    input_size: int = 16  # side of the latent
    in_channels: int = 4  # channels of the latent
    num_classes: int = 1000
    num_conditions: int = 0  # values of the second label; 0: there is none
    augmentation: int = 0  # values that tell how a latent was augmented; 0: none
    widths: tuple[int, ...] = UNET_PRESETS["S"][0]  # channels of each level, each half as large as the one before
    layers: int = UNET_PRESETS["S"][1]  # residual blocks of a level on the way down; one more on the way up
    attends: tuple[bool, ...] = UNET_PRESETS["S"][2]  # whether a level has attention after each residual block
    dropout: float = 0.0  # share of a residual block's activations that are set to zero in training
    class_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        halved = 2 ** (len(self.widths) - 1)
        if self.input_size % halved:
            raise ValueError(
                f"latent side {self.input_size} is no multiple of {halved}, which a U-Net of {len(self.widths)} levels"
                " needs"
            )

    @property
    def embedding_width(self) -> int:
        """Width of the vector of time and labels."""
        return EMBEDDING * self.widths[0]

    @property
    def gflop(self) -> float:
        """Work of one state in 10^9 operations, a product and its sum counted as two."""
        width, first = self.embedding_width, self.widths[0]
        pixels = self.input_size**2
        total = first * width + width**2 + pixels * 9 * self.in_channels * first * 2  # time, first and last convolution
        for level, old, new, attends in self._residual_blocks():
            pixels = (self.input_size >> level) ** 2
            total += pixels * (9 * (old + new) + (old if old != new else 0)) * new + width * 2 * new
            total += pixels * (4 * new + 2 * pixels) * new if attends else 0
        for level, channels in enumerate(self.widths[:-1]):  # to the next level and back
            total += (self.input_size >> (level + 1)) ** 2 * 9 * channels**2
            total += (self.input_size >> level) ** 2 * 9 * self.widths[level + 1] ** 2
        return 2 * total / 1e9

    @property
    def working_values(self) -> int:
        """Values of all maps that the largest block makes of one state, and of the maps that wait for the way up.

        A residual block makes its input, norm and SiLU (`old` channels), and eight maps of `new` channels: convolution,
        norm, scaled, shifted, SiLU, convolution, shortcut, sum. Attention: norm, q, k, v, output, projection, sum, and
        a copy.
        """
        blocks = [
            (self.input_size >> level) ** 2 * (3 * old + (16 if attends else 8) * new)
            for level, old, new, attends in self._residual_blocks()
        ]
        waiting = [(self.input_size >> level) ** 2 * width * self.layers for level, width in enumerate(self.widths)]
        halved = [(self.input_size >> (level + 1)) ** 2 * width for level, width in enumerate(self.widths[:-1])]
        return max(blocks) + self.input_size**2 * self.widths[0] + sum(waiting) + sum(halved)

    def _residual_blocks(self) -> Iterator[tuple[int, int, int, bool]]:
        """Yield level, channels in and out, and whether attention follows, of each residual block."""
        skips, channels, last = [self.widths[0]], self.widths[0], len(self.widths) - 1
        for level, width in enumerate(self.widths):
            for _ in range(self.layers):
                yield level, channels, width, self.attends[level]
                skips.append(channels := width)
            if level < last:
                skips.append(width)
        yield last, channels, channels, True
        yield last, channels, channels, False
        for level, width in reversed(list(enumerate(self.widths))):
            for _ in range(self.layers + 1):
                yield level, channels + skips.pop(), width, self.attends[level]
                channels = width


class UNet(nn.Module):
    """The U-Net; keyword arguments are the fields of `UNetSettings`.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """

    def __init__(self, settings: UNetSettings | None = None, **kwargs: Any) -> None:
        super().__init__()
        settings = replace(settings or UNetSettings(), **kwargs)
        self.settings = settings
        width, dropout = settings.embedding_width, settings.class_dropout_prob
        self.y_embedder = LabelEmbedder(settings.num_classes, width, dropout)
        if settings.num_conditions:
            self.c_embedder = LabelEmbedder(settings.num_conditions, width, dropout)
        if settings.augmentation:
            self.a_embedder = nn.Linear(settings.augmentation, width, bias=False)
        self.unet = _diffusers_unet(settings)
        self._initialise()

    def _initialise(self) -> None:
        """Zero the last layer of every residual branch and the output, so that the model starts at zero."""
        for name, module in self.unet.named_modules():
            if name.endswith((".conv2", ".to_out.0")) or name == "conv_out":
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        for name in ("y_embedder", "c_embedder"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name).embedding_table.weight, std=INITIAL_STD)
        if self.settings.augmentation:
            nn.init.zeros_(self.a_embedder.weight)

    @property
    def null_class(self) -> int:
        """The label that stands for no class."""
        return self.settings.num_classes

    def null_labels(self, y: Tensor) -> Tensor:
        """Return the labels of no class, and of no condition, in the shape (N,) or (N, 2) of labels y."""
        return null_labels(y, self.settings.num_classes, self.settings.num_conditions)

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Heads, tokens and width of a head of the largest attention, by which its kernel is chosen."""
        settings = self.settings
        level = settings.attends.index(True) if any(settings.attends) else len(settings.widths) - 1
        return settings.widths[level] // HEAD_WIDTH, (settings.input_size >> level) ** 2, HEAD_WIDTH

    def forward(self, x: Tensor, t: Tensor, y: Tensor, a: Tensor | None = None) -> Tensor:
        """Return the prediction (N, C, H, W) for latents x (N, C, H, W).

        Args:
            t: times (N,), or (1,) if all are equal; on the CPU or on the device of x.
            y: labels (N,), or with conditions (N, 2): class and condition.
            a: how each latent was augmented, (N, A); None: not at all, as all zeros.

        Raises:
            ValueError: y or a does not have the shape that the settings ask for.
        """
        check_labels(y, a, len(x), self.settings.num_conditions, self.settings.augmentation)
        dtype = self.unet.conv_in.weight.dtype
        times = TIME_SCALE * t.to(x.device, torch.float32, non_blocking=True)  # (N,) or (1,)
        embedded = self._embedded(y, a).to(dtype)  # (N, width)
        return self.unet(x.to(dtype), times, class_labels=embedded, return_dict=False)[0]  # (N, C, H, W)

    def _embedded(self, y: Tensor, a: Tensor | None) -> Tensor:
        """Return the sum (N, width) of the embeddings of class, condition and augmentation."""
        if not self.settings.num_conditions:
            total = self.y_embedder(y)  # (N, width)
        else:
            total = self.y_embedder(y[:, 0]) + self.c_embedder(y[:, 1])  # (N, width)
        if a is not None:
            total = total + self.a_embedder(a.to(self.a_embedder.weight.dtype))  # (N, width)
        return total


def _diffusers_unet(settings: UNetSettings) -> nn.Module:
    """Return diffusers' `UNet2DModel` of these sizes."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    def blocks(way: str) -> tuple[str, ...]:
        return tuple(f"{'Attn' if attends else ''}{way}Block2D" for attends in settings.attends)

    return UNet2DModel(
        sample_size=settings.input_size,
        in_channels=settings.in_channels,
        out_channels=settings.in_channels,
        down_block_types=blocks("Down"),
        up_block_types=blocks("Up")[::-1],
        block_out_channels=settings.widths,
        layers_per_block=settings.layers,
        dropout=settings.dropout,
        attention_head_dim=HEAD_WIDTH,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        norm_eps=NORM_EPS,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",  # class_labels are a vector, which is added to that of the time
    )


def unet_settings(name: str, **kwargs: Any) -> UNetSettings:
    """Return the settings of a preset such as `UNet-S`, with other fields from `kwargs`.

    Raises:
        ValueError: an unknown name, or a latent side that cannot be halved.
    """
    if name not in unet_names():
        raise ValueError(f"model_type {name!r} is unknown; {', '.join(unet_names())} are expected")
    widths, layers, attends = UNET_PRESETS[name.removeprefix("UNet-")]
    return UNetSettings(**{"widths": widths, "layers": layers, "attends": attends, **kwargs})


def unet_names() -> list[str]:
    """Return the names of all presets."""
    return [f"UNet-{size}" for size in UNET_PRESETS]


def unet_name(settings: UNetSettings) -> str | None:
    """Return the preset that has these sizes, or None."""
    sizes = (settings.widths, settings.layers, settings.attends)
    return next((f"UNet-{name}" for name, preset in UNET_PRESETS.items() if preset == sizes), None)


def is_unet(shapes: Mapping[str, object]) -> bool:
    """Return whether tensors of these names are those of a U-Net."""
    return f"{PREFIX}conv_in.weight" in shapes


def unet_settings_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> UNetSettings:
    """Return the settings of the U-Net that tensors of these names and shapes belong to, but for the latent's side.

    Raises:
        ValueError: the names are not those of a U-Net.
    """
    missing = [name for name in (f"{PREFIX}conv_in.weight", CLASS_TABLE) if name not in shapes]
    if missing:
        raise ValueError(f"no UNet: tensors {', '.join(missing)} are missing")
    levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith(f"{PREFIX}down_blocks."))
    down = [f"{PREFIX}down_blocks.{level}." for level in range(levels)]
    return UNetSettings(
        input_size=2 ** (levels - 1),
        in_channels=shapes[f"{PREFIX}conv_in.weight"][1],
        num_classes=shapes[CLASS_TABLE][0] - 1,
        num_conditions=shapes[CONDITION_TABLE][0] - 1 if CONDITION_TABLE in shapes else 0,
        augmentation=shapes[AUGMENTATION_WEIGHT][1] if AUGMENTATION_WEIGHT in shapes else 0,
        widths=tuple(shapes[f"{level}resnets.0.conv1.weight"][0] for level in down),
        layers=sum(name.startswith(f"{down[0]}resnets.") and name.endswith("conv1.weight") for name in shapes),
        attends=tuple(f"{level}attentions.0.to_q.weight" in shapes for level in down),
    )
