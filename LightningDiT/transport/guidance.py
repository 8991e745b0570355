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

#: A conditional network: model(x (N, C, ...), t (N,), y=labels (N,) or (N, 2)) -> (N, C, ...).
ConditionalModel = Callable[..., Tensor]


@dataclass(frozen=True)
class GuidanceSettings:
    """How strongly, when and where guidance acts; the names are those of the published configuration.

    Raises:
        ValueError: a setting is out of range.
    """

    cfg_scale: float = 1.0  # 1 is off; v = weak + scale (strong - weak)
    cfg_interval_start: float = 0.0  # no guidance at times below it (t = 0 is noise)
    cfg_interval_end: float = 1.0  # nor above this one
    guided_channels: int | str = 3  # the number of first channels that are guided, or "all"

    def __post_init__(self) -> None:
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale={self.cfg_scale!r} is not finite, expected a number")
        if not 0 <= self.cfg_interval_start <= self.cfg_interval_end <= 1:
            raise ValueError(
                f"guidance interval [{self.cfg_interval_start!r}, {self.cfg_interval_end!r}] is invalid, "
                "expected 0 <= start <= end <= 1"
            )
        if self.guided_channels != "all" and not (isinstance(self.guided_channels, int) and self.guided_channels > 0):
            raise ValueError(f'guided_channels={self.guided_channels!r} is out of range, expected at least 1, or "all"')

    def __str__(self) -> str:
        return (
            f"{self.cfg_scale:g} on {self.guided_channels} channels"
            f" from {self.cfg_interval_start:g} to {self.cfg_interval_end:g}"
        )

    def acts_at(self, t: Tensor) -> bool:
        """Tell whether guidance acts at the time that every entry of `t` (N,) holds.

        Solvers keep times on the CPU, so that nothing waits here for a GPU.
        """
        if self.cfg_scale == 1 or t.numel() == 0:
            return False
        # Compared in the dtype of t: a bound of 0.7 includes the grid point float32(0.7).
        now = t.flatten()[0]
        return bool(now >= self.cfg_interval_start) and bool(now <= self.cfg_interval_end)


def jumps_of(guidance: GuidanceSettings) -> tuple[float, ...]:
    """Return the times strictly between 0 and 1 at which guidance sets in or ends, so that the velocity jumps."""
    if guidance.cfg_scale == 1:
        return ()
    bounds = dict.fromkeys((guidance.cfg_interval_start, guidance.cfg_interval_end))
    return tuple(t for t in bounds if 0 < t < 1)


@dataclass(frozen=True)
class GuidedVelocity:
    """A guided model as a function of state and time, velocity(x, t).

    Where guidance does not act the model is called once on the N states, else once on 2N: conditional and null halves
    stacked. With a guide, the model and the guide are each called once on N there. Outputs that are noise or score are
    guided the same way.
    """

    model: ConditionalModel
    y: Tensor  # labels (N,), or with a second label (N, 2)
    null_y: Tensor  # null labels in the shape of y, for classifier-free guidance
    settings: GuidanceSettings
    guide: ConditionalModel | None = None  # a weaker network for autoguidance, which sees the same labels as the model

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided output (N, C, ...) at states x (N, C, ...) and times t (N,), which are all equal.

        Raises:
            ValueError: more channels are guided than there are.
        """
        guided = self.settings.guided_channels
        if guided != "all" and guided > x.shape[1]:
            raise ValueError(
                f"guided_channels={guided} is out of range, expected at most the {x.shape[1]} "
                'channels of the state, or "all"'
            )
        if not self.settings.acts_at(t):
            return self.model(x, t, y=self.y)
        return self.mix(*self.both(x, t))

    def both(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the strong and the weak prediction (N, C, ...) at states x (N, C, ...) and times t (N,)."""
        if self.guide is not None:
            return self.model(x, t, y=self.y), self.guide(x, t, y=self.y)
        labels = torch.cat([self.y, self.null_y])  # (2N,) or (2N, 2)
        strong, weak = self.model(torch.cat([x, x]), torch.cat([t, t]), y=labels).chunk(2)
        return strong, weak

    def mix(self, strong: Tensor, weak: Tensor) -> Tensor:
        """Return the guided output (N, C, ...) of a strong and a weak prediction."""
        channels = self.settings.guided_channels
        mixed = weak + self.settings.cfg_scale * (strong - weak)  # (N, C, ...)
        if channels == "all":
            return mixed
        return torch.cat([mixed[:, :channels], strong[:, channels:]], dim=1)  # (N, C, ...)
