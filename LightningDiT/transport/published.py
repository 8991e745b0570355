"""SiT's published calls: samplers of the ODE and the SDE that keep every state, and the log-likelihood of data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .objective import Model, Transport
from .path import check_choice
from .sampler import (
    ADAPTIVE_METHODS,
    ATOL,
    FIXED_METHODS,
    ODE_METHODS,
    RTOL,
    Generators,
    as_field,
    draw_noise,
    full_precision,
    odeint_on,
    sampling_times,
)
from .sde import SdeSettings, sde_states
from .solvers import OWN_METHODS, Velocity, check_method, solve


class Sampler:
    """Samplers of one `Transport` under SiT's published names; each method returns a function."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def _velocity(self, model: Model, model_kwargs: dict[str, Any]) -> Velocity:
        return lambda x, t: self.transport.velocity(model, x, t, **model_kwargs)

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = ATOL,
        rtol: float = RTOL,
        reverse: bool = False,
        timestep_shift: float = 0.0,
    ) -> Callable[..., Tensor]:
        """Return ``fn(x, model, **model_kwargs)`` -> states (num_steps, N, ...) at grid points.

        `num_steps` counts grid points, so Euler evaluates the model num_steps - 1 times. With
        `reverse` x is data and the last state is its noise.

        From noise to data on all of [0, 1], adaptive methods step beyond the end and interpolate, as
        published; `integrate_ode` ends on it exactly. In reverse, and on a shorter interval, so does this call.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        check_choice("sampling_method", sampling_method, ODE_METHODS)
        check_method(sampling_method, self.transport.path_type, reverse)
        sampling_times(self.transport, num_steps, timestep_shift, reverse)
        # The interval is shorter than [0, 1] if the model is undefined beyond it.
        exact_end = reverse or self.transport.interval(self.transport.sample_eps) != (0.0, 1.0)

        def sample(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            x = full_precision(x)
            times = sampling_times(self.transport, num_steps, timestep_shift, reverse, x.dtype).to(x.device)
            velocity = self._velocity(model, model_kwargs)
            if sampling_method in OWN_METHODS:
                states = [x]
                solve(velocity, x, times, sampling_method, callback=lambda i, t, state: states.append(state))
                return torch.stack(states)
            field = as_field(velocity)
            return odeint_on(field, x, times, sampling_method, atol, rtol, keep_all=True, exact_end=exact_end)

        return sample

    def sample_sde(self, **settings: Any) -> Callable[..., list[Tensor]]:
        """Return ``fn(x, model, generator=None, **model_kwargs)`` -> the num_steps states.

        The keywords are the fields of `SdeSettings`; `generator` is one torch.Generator, or one per image.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        checked = SdeSettings(**settings)

        def sample(x: Tensor, model: Model, generator: Generators = None, **model_kwargs: Any) -> list[Tensor]:
            def timed(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
                return model(x, t.to(x.device), **kwargs)  # where models of others expect it

            return list(sde_states(self.transport, timed, x, checked, generator, **model_kwargs))

        return sample

    def sample_ode_likelihood(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = ATOL,
        rtol: float = RTOL,
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return ``fn(x, model, generator=None, **model_kwargs)`` -> (logp (N,), noise (N, ...)).

        logp is the log-density of the data x in nats, by the change of variables
        log p(x) = log N(z) - integral of div(v) over [0, 1] (Song et al., 2021).

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        check_choice("sampling_method", sampling_method, FIXED_METHODS + ADAPTIVE_METHODS)
        sampling_times(self.transport, num_steps)

        def sample(x: Tensor, model: Model, generator: Generators = None, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
            x = full_precision(x)
            times = sampling_times(self.transport, num_steps, reverse=True, dtype=x.dtype).to(x.device)
            noise = draw_noise(x.shape, generator, x.device, x.dtype)
            probe = torch.where(noise < 0, -1.0, 1.0).to(x.dtype)
            field = _with_divergence(self._velocity(model, model_kwargs), probe)
            states, integrals = odeint_on(field, (x, x.new_zeros(len(x))), times, sampling_method, atol, rtol)
            return standard_normal_logp(states[-1]) + integrals[-1], states[-1]

        return sample


def _with_divergence(
    velocity: Velocity, probe: Tensor
) -> Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Return the field of a state (N, ...) and of the integral of div(velocity) along its way (N,).

    The divergence is Hutchinson's estimate probe^T J probe with one probe (N, ...) of signs for
    the whole solve (Grathwohl et al., "FFJORD", 2019), so that the field stays a smooth function
    of time; it is exact where the Jacobian is diagonal.
    """

    def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            x = state[0].detach().clone().requires_grad_()
            v = velocity(x, t.clone().expand(x.shape[0])).to(x.dtype)
            (product,) = torch.autograd.grad(v, x, grad_outputs=probe.clone())  # J^T probe
        return v.detach(), (product * probe).flatten(1).sum(dim=1)

    return field


def standard_normal_logp(z: Tensor) -> Tensor:
    """Return the log-density (N,) of z (N, ...) under the standard normal, in nats."""
    z = z.flatten(1)
    return -0.5 * (z**2).sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
