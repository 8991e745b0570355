"""Time grids and solvers: from noise to data, back, and the log-likelihood of data.

A solver is a function of velocity, state and time grid. Time runs from 0 (noise) to 1 (data).
The state is float32 (float64 if it came so) whatever precision the model computes in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objective import Model, Transport
from .path import DIFFUSION_FORMS, check_choice, expand_time
from .solvers import OWN_METHODS, StepCallback, Velocity, check_method, solve

#: One generator for the whole batch, one per image, or None for torch's default generator.
Generators = torch.Generator | Sequence[torch.Generator] | None

#: torchdiffeq's methods. The fixed ones step exactly on the grid; the adaptive ones choose their
#: steps by atol and rtol, and the grid says only where the trajectory is kept.
FIXED_METHODS = (
    "euler",
    "midpoint",
    "heun2",
    "heun3",
    "rk4",
    "explicit_adams",
    "implicit_adams",
    "fixed_adams",
)
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
#: Every method of the ODE: those of torchdiffeq, and ours.
ODE_METHODS = FIXED_METHODS + ADAPTIVE_METHODS + OWN_METHODS


def time_grid(
    num_steps: int,
    t0: float = 0.0,
    t1: float = 1.0,
    timestep_shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `num_steps` grid points (num_steps,) from t0 to t1: num_steps - 1 steps.

    A shift s > 0 maps t to s t / (1 + (s - 1) t) (Esser et al., 2024, equation 23, with time
    running the other way); s < 1 puts more points near the noise, 0 is off.

    Raises:
        ValueError: fewer than 2 points, or a shift that is negative or not finite.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps!r} is too small, expected at least 2 grid points")
    if not 0 <= timestep_shift < math.inf:
        raise ValueError(f"timestep_shift={timestep_shift!r} is invalid, expected 0 (off) or more")
    t = torch.linspace(t0, t1, num_steps, dtype=dtype)
    if timestep_shift == 0:
        return t
    # The same fraction, written so that it is exactly 1 at t = 1.
    return timestep_shift * t / (timestep_shift * t + (1 - t))


def draw_noise(
    shape: Sequence[int],
    generators: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise (N, ...) on the generators' device, then move it to `device`.

    Drawn on the CPU, the numbers are the same on every machine; with one generator per image
    they are the same in every batch too.

    Raises:
        ValueError: a list of generators that has not one for each image.
    """
    if generators is None or isinstance(generators, torch.Generator):
        source = generators.device if generators is not None else "cpu"
        noise = torch.randn(tuple(shape), generator=generators, device=source)
        return noise.to(device, dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators given, expected one per image: {shape[0]}")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generators]
    return torch.stack([row.to(device, dtype) for row in rows])


def _full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _solve(
    field: Callable[[Tensor, Any], Any],
    state: Any,
    times: Tensor,
    method: str,
    atol: float,
    rtol: float,
    *,
    keep_all: bool = False,
    exact_end: bool = True,
) -> Any:
    """Call torchdiffeq; return the states at all grid points, or at the first and last one.

    `exact_end` ends an adaptive method's last step on the last time. Without it the method steps
    beyond and interpolates, which asks the model at times where it may be undefined and costs
    accuracy (0.002 to 0.04 against 0.00001 on the unit model, dopri5, rtol 1e-3).
    """
    from torchdiffeq import odeint  # brings SciPy along, which our own solvers do without

    check_choice("sampling_method", method, FIXED_METHODS + ADAPTIVE_METHODS)
    ends = times[[0, -1]]
    kept = times if keep_all else ends
    if method in FIXED_METHODS:
        options: dict[str, Any] = {"grid_constructor": lambda func, y0, t: times}
        return odeint(field, state, kept, method=method, atol=atol, rtol=rtol, options=options)
    options = {"step_t": ends[1:]} if exact_end else {}
    try:
        return odeint(field, state, kept, method=method, atol=atol, rtol=rtol, options=options)
    except AssertionError as error:
        raise FloatingPointError(
            f"{method} found no step that meets atol={atol}, rtol={rtol} ({error}), expected "
            "finite velocities; try a larger tolerance or a fixed-step method such as euler"
        ) from error


def _as_field(velocity: Velocity) -> Callable[[Tensor, Tensor], Tensor]:
    def field(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.expand(x.shape[0])).to(x.dtype)

    return field


def integrate_ode(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    method: str = "euler",
    atol: float = 1e-6,
    rtol: float = 1e-3,
    callback: StepCallback | None = None,
    jumps: Sequence[float] = (),
) -> Tensor:
    """Solve dx/dt = velocity(x, t) along `times` (rising or falling) and return the last state.

    Keeps only what the method itself needs, no trajectory, and ends exactly on the last time
    (`exact_end` of `Sampler.sample_ode`). `callback` is called after each step,
    which for adaptive methods means each step that they accept. `jumps` are the times at which the velocity jumps;
    the methods of `OWN_METHODS` heed them, the others keep the grid as it is.

    Raises:
        ValueError: the method is unknown.
        FloatingPointError: an adaptive method finds no step that meets the tolerances.
    """
    x = _full_precision(x)
    if method in OWN_METHODS:
        return solve(velocity, x, times.to(x), method, jumps, callback)
    field = _as_field(velocity)
    reached = 0

    def starts(t: Tensor, state: Tensor, dt: Tensor) -> None:
        # torchdiffeq reports the start of each step, which is where the step before it ended.
        nonlocal reached
        if callback is not None and reached > 0:
            callback(reached - 1, float(t), state)
        reached += 1

    if callback is not None:
        hook = "callback_step" if method in FIXED_METHODS else "callback_accept_step"
        setattr(field, hook, starts)
    last = _solve(field, x, times.to(x.device), method, atol, rtol)[-1]
    if callback is not None:
        callback(reached - 1, float(times[-1]), last)
    return last


def integrate_with_divergence(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    probe: Tensor,
    method: str = "dopri5",
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Return the last state (N, ...) and the integral of div(velocity) along the way (N,).

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

    x = _full_precision(x)
    start = (x, x.new_zeros(x.shape[0]))
    states, integrals = _solve(field, start, times.to(x.device), method, atol, rtol)
    return states[-1], integrals[-1]


# One step of the SDE dx = drift dt + sqrt(2 diffusion) dB, from (x, t) by dt, with the standard
# normal noise given.
SdeField = Callable[[Tensor, Tensor], Tensor]


def euler_maruyama_step(
    drift: SdeField, diffusion: SdeField, x: Tensor, t: Tensor, dt: Tensor, noise: Tensor
) -> Tensor:
    """Advance x (N, ...) from times t (N,) by dt with the Euler-Maruyama method."""
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
    diffusion_norm: float = 1.0  # factor on the diffusion
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
    """Yield the state (N, ...) after each of `num_steps` steps of the reverse SDE (SiT, eq. 4).

    The SDE is dx = (v + w s) dt + sqrt(2 w) dB with velocity v, score s and a diffusion w of
    `DIFFUSION_FORMS`; velocity and score come from one evaluation of the model.
    """
    last_step_size = settings.last_step_size if settings.last_step is not None else 0.0
    t0, t1 = transport.interval(
        transport.sample_eps,
        sde=True,
        diffusion_form=settings.diffusion_form,
        last_step_size=last_step_size,
    )
    x = _full_precision(x)
    form = DIFFUSION_FORMS[settings.diffusion_form]

    def diffusion(x: Tensor, t: Tensor) -> Tensor:
        return form(transport.path, expand_time(t, x), settings.diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        v, score = transport.velocity_and_score(model, x, t, **model_kwargs)
        return (v + diffusion(x, t) * score).to(x.dtype)

    times = time_grid(settings.num_steps, t0, t1, dtype=x.dtype).to(x.device)
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


def standard_normal_logp(z: Tensor) -> Tensor:
    """Return the log-density (N,) of z (N, ...) under the standard normal, in nats."""
    z = z.flatten(1)
    return -0.5 * (z**2).sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


class Sampler:
    """Samplers of one `Transport` under SiT's published names; each method returns a function."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def _velocity(self, model: Model, model_kwargs: dict[str, Any]) -> Velocity:
        return lambda x, t: self.transport.velocity(model, x, t, **model_kwargs)

    def times(
        self,
        num_steps: int,
        timestep_shift: float = 0.0,
        reverse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the time grid (num_steps,) on which `sample_ode` samples."""
        t0, t1 = self.transport.interval(self.transport.sample_eps)
        ends = (t1, t0) if reverse else (t0, t1)
        return time_grid(num_steps, *ends, timestep_shift=timestep_shift, dtype=dtype)

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        timestep_shift: float = 0.0,
        exact_end: bool = False,
        jumps: Sequence[float] = (),
    ) -> Callable[..., Tensor]:
        """Return ``fn(x, model, **model_kwargs)`` -> states (num_steps, N, ...) at grid points.

        `num_steps` counts grid points, so Euler evaluates the model num_steps - 1 times. With
        `reverse` x is data and the last state is its noise.

        Where the interval is all of [0, 1], adaptive methods step beyond it and interpolate, as
        published; `exact_end` makes them end on it, which is more accurate. Backwards, and where
        the interval is shorter, they always do. `jumps` is that of `integrate_ode`.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        check_choice("sampling_method", sampling_method, ODE_METHODS)
        check_method(sampling_method, self.transport.path_type, reverse)
        self.times(num_steps, timestep_shift, reverse)
        # An interval that is kept short of [0, 1] is so because the model is undefined beyond it.
        whole = self.transport.interval(self.transport.sample_eps) == (0.0, 1.0)
        exact_end = exact_end or reverse or not whole

        def sample(x: Tensor, model: Model, **model_kwargs: Any) -> Tensor:
            x = _full_precision(x)
            times = self.times(num_steps, timestep_shift, reverse, x.dtype).to(x.device)
            if sampling_method in OWN_METHODS:
                states = [x]
                velocity = self._velocity(model, model_kwargs)
                solve(velocity, x, times, sampling_method, jumps, lambda i, t, state: states.append(state))
                return torch.stack(states)
            field = _as_field(self._velocity(model, model_kwargs))
            return _solve(field, x, times, sampling_method, atol, rtol, keep_all=True, exact_end=exact_end)

        return sample

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
    ) -> Callable[..., list[Tensor]]:
        """Return ``fn(x, model, generator=None, **model_kwargs)`` -> the num_steps states.

        Settings are those of `SdeSettings`; `generator` is one torch.Generator, or a list of one
        per image.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        settings = SdeSettings(sampling_method, diffusion_form, diffusion_norm, last_step, last_step_size, num_steps)

        def sample(x: Tensor, model: Model, generator: Generators = None, **model_kwargs: Any) -> list[Tensor]:
            return list(sde_states(self.transport, model, x, settings, generator, **model_kwargs))

        return sample

    def sample_ode_likelihood(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """Return ``fn(x, model, generator=None, **model_kwargs)`` -> (logp (N,), noise (N, ...)).

        logp is the log-density of the data x in nats, by the change of variables
        log p(x) = log N(z) - integral of div(v) over [0, 1] (Song et al., 2021).

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        check_choice("sampling_method", sampling_method, FIXED_METHODS + ADAPTIVE_METHODS)
        self.times(num_steps)

        def sample(x: Tensor, model: Model, generator: Generators = None, **model_kwargs: Any) -> tuple[Tensor, Tensor]:
            x = _full_precision(x)
            times = self.times(num_steps, reverse=True, dtype=x.dtype)
            noise = draw_noise(x.shape, generator, x.device, x.dtype)
            probe = torch.where(noise < 0, -1.0, 1.0).to(x.dtype)
            z, backwards = integrate_with_divergence(
                self._velocity(model, model_kwargs), x, times, probe, sampling_method, atol, rtol
            )
            return standard_normal_logp(z) + backwards, z

        return sample
