"""Sampling by the reverse SDE dx = (v + w s) dt + sqrt(2 w) dB of velocity v, score s and diffusion w (SiT, eq. 4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objective import Model, Transport
from .path import DIFFUSION_FORMS, check_choice, expand_time
from .sampler import Generators, draw_noise, full_precision, time_grid

#: drift(x (N, ...), t (N,)) -> (N, ...), and diffusion likewise, of dx = drift dt + sqrt(2 diffusion) dB.
SdeField = Callable[[Tensor, Tensor], Tensor]


def euler_maruyama_step(
    drift: SdeField, diffusion: SdeField, x: Tensor, t: Tensor, dt: Tensor, noise: Tensor
) -> Tensor:
    """Advance x (N, ...) from times t (N,) by dt with the Euler-Maruyama method and standard normal noise (N, ...)."""
    return x + drift(x, t) * dt + torch.sqrt(2 * diffusion(x, t) * dt) * noise


def heun_sde_step(drift: SdeField, diffusion: SdeField, x: Tensor, t: Tensor, dt: Tensor, noise: Tensor) -> Tensor:
    """Advance x (N, ...) by dt: all the noise first, then a Heun step of the drift (SiT)."""
    x = x + torch.sqrt(2 * diffusion(x, t) * dt) * noise
    first = drift(x, t)
    second = drift(x + first * dt, t + dt)
    return x + 0.5 * dt * (first + second)


SDE_STEPS = {"Euler": euler_maruyama_step, "Heun": heun_sde_step}
LAST_STEPS = ("Mean", "Tweedie", "Euler")


@dataclass(frozen=True)
class SdeSettings:
    """Settings of the stochastic sampler, with SiT's names and defaults.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    sampling_method: str = "Euler"  # a row of SDE_STEPS
    diffusion_form: str = "SBDM"  # a row of DIFFUSION_FORMS
    diffusion_norm: float = 1.0  # factor on the diffusion; of `decreasing`, on the cosine in it
    last_step: str | None = "Mean"  # noiseless step to t = 1: Mean, Tweedie, Euler or None
    last_step_size: float = 0.04  # the time that it covers; not used with None
    num_steps: int = 250  # states after the first one: num_steps - 1 noisy steps, one last step

    def __post_init__(self) -> None:
        check_choice("sampling_method", self.sampling_method, SDE_STEPS)
        check_choice("diffusion_form", self.diffusion_form, DIFFUSION_FORMS)
        if self.last_step is not None:
            check_choice("last_step", self.last_step, LAST_STEPS)
            if not 0 < self.last_step_size < 1:
                raise ValueError(
                    f"last_step_size={self.last_step_size!r} is out of range, expected 0 < last_step_size < 1"
                )
        if not 0 <= self.diffusion_norm < math.inf:
            raise ValueError(f"diffusion_norm={self.diffusion_norm!r} is invalid, expected 0 or more")
        if self.num_steps < 2:
            raise ValueError(f"num_steps={self.num_steps!r} is too small, expected at least 2")


def sde_states(
    transport: Transport,
    model: Model,
    x: Tensor,
    settings: SdeSettings,
    generators: Generators = None,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """Yield the state (N, ...) after each of `num_steps` steps of the reverse SDE from noise x (N, ...).

    The diffusion is a row of `DIFFUSION_FORMS`; velocity and score come from one evaluation of the model.
    """
    last_step_size = settings.last_step_size if settings.last_step is not None else 0.0
    form, eps = DIFFUSION_FORMS[settings.diffusion_form], transport.sample_eps
    t0, t1 = transport.interval(eps, sde=True, diffusion_form=settings.diffusion_form, last_step_size=last_step_size)
    x = full_precision(x)

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return form(transport.path, expand_time(t, x), settings.diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v, score = transport.velocity_and_score(model, x, t, **model_kwargs)
        return (v + diffusion(x, t) * score).to(x.dtype)

    times = time_grid(settings.num_steps, t0, t1, dtype=x.dtype)
    step = SDE_STEPS[settings.sampling_method]
    for t, t_next in itertools.pairwise(times):
        noise = draw_noise(x.shape, generators, x.device, x.dtype)
        x = step(drift, diffusion, x, t.expand(x.shape[0]), t_next - t, noise)
        yield x
    t_last = times[-1].expand(x.shape[0])
    if settings.last_step == "Mean":
        x = x + drift(x, t_last) * last_step_size
    elif settings.last_step == "Euler":
        x = x + transport.velocity(model, x, t_last, **model_kwargs) * last_step_size
    elif settings.last_step == "Tweedie":
        _, score = transport.velocity_and_score(model, x, t_last, **model_kwargs)
        t = expand_time(t_last, x)
        # E[x_1 | x_t] = (x_t + sigma^2 score) / alpha (Efron, 2011).
        x = (x + transport.path.sigma(t) ** 2 * score) / transport.path.alpha(t)
    yield x
