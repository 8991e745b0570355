"""Probability paths between noise and data: x_t = alpha(t) x_1 + sigma(t) x_0.

Time runs from 0 (x_0, standard normal noise) to 1 (x_1, data). Names and equations follow
Ma et al., "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers" (2024), section 2 and appendix A; a dot there is the prefix ``d_`` here.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]

#: VP's noise rate beta grows linearly from the first to the second value, from data to noise.
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


def check_choice(setting: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a ValueError that names the setting, its value, the choices and the nearest one."""
    choices = list(allowed)
    if value in choices:
        return
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), list(lower), n=1)
    hint = f"; nearest is {lower[near[0]]!r}" if near else ""
    raise ValueError(f"{setting}={value!r} is unknown, expected one of {', '.join(choices)}{hint}")


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Return times (N,) as (N, 1, ..., 1) on the device of a state (N, ...), over which they broadcast."""
    return t.reshape(-1, *[1] * (x.dim() - 1)).to(x.device, non_blocking=True)


@dataclass(frozen=True)
class Path:
    """One interpolant. Every method takes times (N,) and states (N, ...) and keeps their shape."""

    name: str
    alpha: Schedule  # weight of the data: 0 at t = 0 (VP: 0.0066), 1 at t = 1
    sigma: Schedule  # weight of the noise: 1 at t = 0, 0 at t = 1
    d_alpha: Schedule  # time derivative of alpha
    d_sigma: Schedule  # time derivative of sigma

    def plan(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state x_t and its time derivative u_t for noise x0 and data x1."""
        t = expand_time(t, x1)  # (N, 1, ...)
        x_t = self.alpha(t) * x1 + self.sigma(t) * x0  # (N, ...)
        u_t = self.d_alpha(t) * x1 + self.d_sigma(t) * x0  # (N, ...)
        return x_t, u_t

    def d_log_alpha(self, t: Tensor) -> Tensor:
        """Return d_alpha / alpha; infinite at t = 0 for Linear and GVP."""
        return self.d_alpha(t) / self.alpha(t)

    def score_weight(self, t: Tensor) -> Tensor:
        """Return w(t) in v = d_log_alpha x + w score (SiT, appendix A)."""
        sigma = self.sigma(t)
        return self.d_log_alpha(t) * sigma**2 - sigma * self.d_sigma(t)

    def wronskian(self, t: Tensor) -> Tensor:
        """Return d_alpha sigma - alpha d_sigma: positive, and finite where w(t) is not."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def velocity_from_score(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity whose score is given; singular at t = 0 for Linear and GVP."""
        t = expand_time(t, x)
        return self.d_log_alpha(t) * x + self.score_weight(t) * score

    def velocity_from_noise(self, noise: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity for the expected noise E[x_0 | x_t]."""
        return self.velocity_from_score(self.score_from_noise(noise, t), x, t)

    def noise_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t], from x = alpha x_1 + sigma x_0, v = d_alpha x_1 + d_sigma x_0."""
        t = expand_time(t, x)
        return (self.d_alpha(t) * x - self.alpha(t) * velocity) / self.wronskian(t)

    def score_from_velocity(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the score that belongs to a velocity; singular at t = 1, where sigma is 0."""
        return self.score_from_noise(self.noise_from_velocity(velocity, x, t), t)

    def score_from_noise(self, noise: Tensor, t: Tensor) -> Tensor:
        """Return the score -E[x_0 | x_t] / sigma."""
        return -noise / self.sigma(expand_time(t, noise))


def _vp_log_alpha(t: Tensor) -> Tensor:
    return -0.25 * (1 - t) ** 2 * (VP_BETA_MAX - VP_BETA_MIN) - 0.5 * (1 - t) * VP_BETA_MIN


def _vp_d_log_alpha(t: Tensor) -> Tensor:
    return 0.5 * (1 - t) * (VP_BETA_MAX - VP_BETA_MIN) + 0.5 * VP_BETA_MIN


def _vp_sigma(t: Tensor) -> Tensor:
    # expm1, because 1 - alpha^2 loses every digit in float32 as t comes near 1.
    return torch.sqrt(-torch.expm1(2 * _vp_log_alpha(t)))


def _vp_d_sigma(t: Tensor) -> Tensor:
    return -torch.exp(2 * _vp_log_alpha(t)) * _vp_d_log_alpha(t) / _vp_sigma(t)


_QUARTER = math.pi / 2

#: The paths by their published names. LightningDiT's weights are trained on Linear.
PATHS: dict[str, Path] = {
    path.name: path
    for path in (
        Path(
            "Linear",
            alpha=lambda t: t,
            sigma=lambda t: 1 - t,
            d_alpha=torch.ones_like,
            d_sigma=lambda t: -torch.ones_like(t),
        ),
        Path(
            "GVP",
            alpha=lambda t: torch.sin(_QUARTER * t),
            sigma=lambda t: torch.cos(_QUARTER * t),
            d_alpha=lambda t: _QUARTER * torch.cos(_QUARTER * t),
            d_sigma=lambda t: -_QUARTER * torch.sin(_QUARTER * t),
        ),
        Path(
            "VP",
            alpha=lambda t: torch.exp(_vp_log_alpha(t)),
            sigma=_vp_sigma,
            d_alpha=lambda t: torch.exp(_vp_log_alpha(t)) * _vp_d_log_alpha(t),
            d_sigma=_vp_d_sigma,
        ),
    )
}

#: Diffusion w(t) of the reverse SDE dx = (v + w s) dt + sqrt(2 w) dB (SiT, table 3), for a norm.
#: Any w >= 0 keeps the marginals. The last row is the published, misspelt name of the row above.
DIFFUSION_FORMS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: torch.full_like(t, norm),
    "SBDM": lambda path, t, norm: norm * path.score_weight(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
    "inccreasing-decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}
