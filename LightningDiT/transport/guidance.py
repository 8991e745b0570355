"""Classifier-free guidance and autoguidance, on an interval of times and some channels.

Both extrapolate from a weaker prediction to the model's, v = weak + scale (strong - weak). The weak one is the model's
own without a label (classifier-free guidance, Ho and Salimans, 2022), or that of a weaker network with the same label
(autoguidance, Karras et al., arXiv 2406.02507). The interval follows Kynkaanniemi et al., "Applying Guidance in a
Limited Interval" (2024). LightningDiT's published figures guide the first 3 latent channels only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: A conditional network: model(x (N, C, ...), t (N,), y=labels (N,)) -> (N, C, ...).
ConditionalModel = Callable[..., Tensor]


@dataclass(frozen=True)
class GuidanceSettings:
    """How strongly, when and where guidance acts.

    Raises:
        ValueError: a setting is out of range.
    """

    scale: float = 1.0  # 1 is off; v = weak + scale (strong - weak)
    interval_start: float = 0.0  # no guidance at times below it (t = 0 is noise)
    interval_end: float = 1.0  # nor above this one
    guided_channels: int | None = 3  # the first so many channels; None guides all

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale={self.scale!r} is not finite, expected a number")
        if not 0 <= self.interval_start <= self.interval_end <= 1:
            raise ValueError(
                f"guidance interval [{self.interval_start!r}, {self.interval_end!r}] is invalid, "
                "expected 0 <= start <= end <= 1"
            )
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ValueError(
                f"guided_channels={self.guided_channels!r} is out of range, expected at least 1, or None for all"
            )

    def acts_at(self, t: Tensor) -> bool:
        """Tell whether guidance acts at the time that every entry of `t` (N,) holds."""
        if self.scale == 1 or t.numel() == 0:
            return False
        # Compared in the dtype of t: a bound of 0.7 includes the grid point float32(0.7).
        now = t.flatten()[0]
        return bool(now >= self.interval_start) and bool(now <= self.interval_end)


def guided_velocity(
    model: ConditionalModel,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    null_y: Tensor,
    scale: float,
    interval_start: float = 0.0,
    interval_end: float = 1.0,
    guided_channels: int | None = 3,
    guide: ConditionalModel | None = None,
) -> Tensor:
    """Return the guided output (N, C, ...) of `model` for N states.

    Where guidance does not act the model is called once on the N states, else once on 2N:
    conditional and null halves stacked. With a guide the model and the guide are each called once
    on N there. Outputs that are noise or score are guided the same way.

    Args:
        x: states (N, C, ...); t: times (N,), all equal; y, null_y: labels (N,).
        scale, interval_start, interval_end, guided_channels: see `GuidanceSettings`.
        guide: a weaker network for autoguidance, called as guide(x, t, y=y): it sees the same
            labels as the model, and null_y is not used.

    Raises:
        ValueError: a setting is out of range, or more channels are guided than there are.
    """
    settings = GuidanceSettings(scale, interval_start, interval_end, guided_channels)
    return GuidedVelocity(model, y, null_y, settings, guide)(x, t)


@dataclass(frozen=True)
class GuidedVelocity:
    """A guided model as a function of state and time: ``velocity(x, t)``."""

    model: ConditionalModel
    y: Tensor  # labels (N,)
    null_y: Tensor  # null labels (N,), for classifier-free guidance
    settings: GuidanceSettings
    guide: ConditionalModel | None = None  # see `guided_velocity`

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided output (N, C, ...) at states x (N, C, ...) and times t (N,)."""
        guided = self.settings.guided_channels
        if guided is not None and guided > x.shape[1]:
            raise ValueError(
                f"guided_channels={guided} is out of range, expected at most the {x.shape[1]} "
                "channels of the state, or None for all"
            )
        if not self.settings.acts_at(t):
            return self.model(x, t, y=self.y)
        return self.mix(*self.both(x, t))

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the strong and the weak prediction (N, C, ...) at states x (N, C, ...) and times t (N,)."""
        if self.guide is not None:
            return self.model(x, t, y=self.y), self.guide(x, t, y=self.y)
        labels = torch.cat([self.y, self.null_y])  # (2N,)
        strong, weak = self.model(torch.cat([x, x]), torch.cat([t, t]), y=labels).chunk(2)
        return strong, weak

    def mix(self, strong: Tensor, weak: Tensor) -> Tensor:
        """Return the guided output (N, C, ...) of a strong and a weak prediction."""
        channels = self.settings.guided_channels
        mixed = weak + self.settings.scale * (strong - weak)  # (N, C, ...)
        if channels is None:
            return mixed
        return torch.cat([mixed[:, :channels], strong[:, channels:]], dim=1)  # (N, C, ...)
