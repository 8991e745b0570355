"""Sampling by the ODE dx/dt = velocity(x, t): time grids, noise, and solvers from torchdiffeq and of our own.

A solver is a function of velocity, state and time grid. Time runs from 0 (noise) to 1 (data).
The state is float32 (float64 if it came so) whatever precision the model computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .objective import Transport
from .path import check_choice
from .solvers import OWN_METHODS, StepCallback, Velocity, euler, solve

#: One generator for the whole batch, one per image, or None for torch's default generator.
Generators = torch.Generator | Sequence[torch.Generator] | None

#: torchdiffeq's methods. The fixed ones step exactly on the grid; the adaptive ones choose their
#: steps by atol and rtol, and the grid says only where the trajectory is kept. `integrate_ode` has its own euler.
FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
ADAPTIVE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
#: Every method of the ODE: those of torchdiffeq, and ours.
ODE_METHODS = FIXED_METHODS + ADAPTIVE_METHODS + OWN_METHODS
ATOL, RTOL = 1e-6, 1e-3  # of the adaptive methods, as published


def time_grid(
    num_steps: int,
    t0: float = 0.0,
    t1: float = 1.0,
    timestep_shift: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `num_steps` grid points (num_steps,) from t0 to t1: num_steps - 1 steps.

    A shift s > 0 maps t to s t / (1 + (s - 1) t) (Esser et al., 2024, equation 23, with time
    running the other way); s < 1 puts more points near the noise, 0 is off. As published, it maps 0 and 1 onto
    themselves, and other ends not: the grid then ends beside them.

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


def sampling_times(
    transport: Transport,
    num_steps: int,
    timestep_shift: float = 0.0,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the `time_grid` (num_steps,) over the transport's interval, from noise to data unless `reverse`."""
    t0, t1 = transport.interval(transport.sample_eps)
    ends = (t1, t0) if reverse else (t0, t1)
    return time_grid(num_steps, *ends, timestep_shift=timestep_shift, dtype=dtype)


def draw_noise(
    shape: Sequence[int],
    generators: Generators = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise (N, ...) in float32 on the generators' device, then move it to `device`.

    Drawn on the CPU, the numbers are the same on every machine; with one generator per image
    they are the same in every batch too.

    Raises:
        ValueError: the number of generators in a list is not the number of images.
    """
    if generators is None or isinstance(generators, torch.Generator):
        source = generators.device if generators is not None else "cpu"
        noise = torch.randn(tuple(shape), generator=generators, device=source, dtype=torch.float32)
        return noise.to(device, dtype)
    if len(generators) != shape[0]:
        raise ValueError(f"{len(generators)} generators given, expected one per image: {shape[0]}")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return torch.stack(rows).to(device, dtype)


def full_precision(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it came so."""
    return x if x.dtype == torch.float64 else x.float()


def odeint_on(
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
    """Return torchdiffeq's states at all grid points, or at the first and the last one.

    Args:
        field: called as field(t, state).
        state: a tensor, or a tuple of tensors.
        exact_end: end an adaptive method's last step on the last time. Without it the method steps beyond and
            interpolates, which evaluates the model at times where it may be undefined and costs accuracy (0.002 to
            0.04 against 0.00001 on the unit model, dopri5, rtol 1e-3).

    Raises:
        ValueError: the method is unknown.
        FloatingPointError: an adaptive method finds no step that meets the tolerances.
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


def as_field(velocity: Velocity) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the velocity as torchdiffeq calls it: field(t (), x (N, ...)) -> (N, ...)."""

    def field(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.expand(x.shape[0])).to(x.dtype)

    return field


def integrate_ode(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    method: str = "euler",
    atol: float = ATOL,
    rtol: float = RTOL,
    callback: StepCallback | None = None,
    jumps: Sequence[float] = (),
) -> Tensor:
    """Return the state (N, ...) at the last of `times` (rising or falling), from x (N, ...) at the first.

    Keeps only what the method itself needs, no trajectory, and ends exactly on the last time. euler and the methods of
    `OWN_METHODS` give `velocity` times on the CPU; those of torchdiffeq give it times on the device of x.

    Args:
        callback: called after each step, for adaptive methods after each step that they accept.
        jumps: times at which the velocity jumps; the multistep methods and heun of `OWN_METHODS` begin anew there, the
            other methods keep the grid.

    Raises:
        ValueError: the method is unknown.
        FloatingPointError: an adaptive method finds no step that meets the tolerances.
    """
    x = full_precision(x)
    times = times.to("cpu", x.dtype)
    if method == "euler":
        return euler(velocity, x, times, callback)
    if method in OWN_METHODS:
        return solve(velocity, x, times, method, jumps, callback)
    field = as_field(velocity)
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
    last = odeint_on(field, x, times.to(x.device), method, atol, rtol)[-1]
    if callback is not None:
        callback(reached - 1, float(times[-1]), last)
    return last
