"""Solvers that evaluate the velocity once per step and remember the last few values, Euler's and Heun's method.

Along the straight path x_t = t x_1 + (1 - t) x_0 two quantities are smooth functions of time: the velocity v, and
the prediction of the data D = x + (1 - t) v. A multistep method puts a polynomial in t through the last values of
one of them and integrates it exactly over the next step. With sigma = 1 - t:

- velocity, the Adams-Bashforth method of variable step: x_t = x_s + int_s^t v(u) du;
- data, the exponential integrator of DPM-Solver++ (Lu et al., 2022, arXiv 2211.01095):
  x_t = sigma_t / sigma_s x_s + int_s^t sigma_t / sigma_u^2 D(u) du.

A corrector (UniPC, Zhao et al., 2023, arXiv 2302.04867) redoes each step with the value at its end, which the next
step needs anyway. Where the velocity jumps, at the bounds of a guidance interval, the grid has a node (`with_nodes`);
no value from before a node is used after it.

Times lie on the CPU wherever the states are: a GPU takes them as numbers, and nothing waits for it to read one back.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: velocity(x (N, ...), t (N,)) -> dx/dt (N, ...); t is on the device of the time grid.
Velocity = Callable[[Tensor, Tensor], Tensor]
#: callback(step_index, t, x): after each step, with the time and the state that it reached.
StepCallback = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class Multistep:
    """One method: a row of `MULTISTEP_METHODS`."""

    quantity: str  # velocity or data: what the polynomial goes through
    order: int  # number of values that it goes through; fewer in the first steps
    corrector: bool = False  # each step is redone with the value at its end


MULTISTEP_METHODS = {
    "ab2": Multistep("velocity", 2),
    "ab3": Multistep("velocity", 3),
    "ab4": Multistep("velocity", 4),
    "dpmpp2m": Multistep("data", 2),
    "dpmpp3m": Multistep("data", 3),
    "unipc2": Multistep("data", 2, corrector=True),
    "unipc3": Multistep("data", 3, corrector=True),
}
HEUN, EXTRAPOLATED = "heun", "extrapolated"
OWN_METHODS = (HEUN, *MULTISTEP_METHODS, EXTRAPOLATED)
GRADE = 1.5  # power of `graded_grid`; measured in docs/sampling.md
#: The sampler that UCGM released for LightningDiT (Sun et al., arXiv 2505.07447): exponents of its grid, the distance
#: that the grid's variable keeps from 0 and 1, and the share of the last change by which predictions are extrapolated.
KUMARASWAMY, GAP, EXTRAPOLATION = (1.17, 0.8, 1.1), 0.001, 0.5


def check_method(method: str, path_type: str, reverse: bool) -> None:
    """Refuse a method of this module if its formula does not hold.

    Raises:
        ValueError: the data prediction of a path that is not linear, or from data to noise.
    """
    if method == EXTRAPOLATED or (method in MULTISTEP_METHODS and MULTISTEP_METHODS[method].quantity == "data"):
        if path_type != "Linear":
            raise ValueError(f"sampling_method={method!r} needs path_type Linear, not {path_type}; ab3 takes any path")
        if reverse:
            raise ValueError(
                f"sampling_method={method!r} runs from noise to data only; ab3 and heun also run in reverse"
            )


def solve(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    method: str,
    jumps: Sequence[float] = (),
    callback: StepCallback | None = None,
) -> Tensor:
    """Return the state (N, ...) at the last of `times` by a method of `OWN_METHODS`.

    Args:
        jumps: times at which the velocity jumps; the grid gets a node at each, except for `extrapolated`.
    """
    if method == EXTRAPOLATED:
        return extrapolated(velocity, x, times, callback)
    times, nodes = with_nodes(times, jumps)
    if method == HEUN:
        return heun(velocity, x, times, nodes, callback)
    return multistep(velocity, x, times, MULTISTEP_METHODS[method], nodes, callback)


def with_nodes(times: Tensor, points: Sequence[float]) -> tuple[Tensor, frozenset[int]]:
    """Return the grid with an inner point moved onto each of `points`, and the indices of those nodes.

    The nearest inner point moves, so the number of steps stays. A point that does not lie strictly inside the grid
    needs no node. If there are more points than inner ones, the later ones get none.

    Args:
        times: (K,), rising or falling.
    """
    low, high = sorted((float(times[0]), float(times[-1])))
    inner = times[1:-1].clone()
    moved: list[int] = []
    for point in points:
        distance = (inner - point).abs()
        distance[moved] = math.inf
        if low < point < high and len(moved) < len(inner):
            nearest = int(distance.argmin())
            inner[nearest] = point
            moved.append(nearest)
    nodes = inner[moved]
    inner = inner.sort(descending=bool(times[0] > times[-1])).values
    indices = frozenset(1 + int((inner == node).nonzero()[0]) for node in nodes)
    return torch.cat([times[:1], inner, times[-1:]]), indices


def graded_grid(
    num_steps: int,
    jumps: Sequence[float] = (),
    power: float = GRADE,
    ends: tuple[float, float] = (0.0, 1.0),
) -> tuple[Tensor, frozenset[int]]:
    """Return a rising grid (num_steps,) in float32 with short steps after its start and after each jump, and the
    indices of the jumps.

    A multistep method starts at first order there, which is where most of its error arises. Between two jumps the
    points lie at u^power for equally spaced u; each part gets steps in proportion to the square root of its length.

    Raises:
        ValueError: fewer steps than parts.
    """
    low, high = ends
    parts = list(itertools.pairwise([low, *sorted({jump for jump in jumps if low < jump < high}), high]))
    if num_steps <= len(parts):
        raise ValueError(
            f"num_sampling_steps (--steps) is {num_steps}, expected at least {len(parts) + 1} for this guidance"
        )
    weights = [math.sqrt(end - begin) for begin, end in parts]
    bounds = [round((num_steps - 1) * sum(weights[:k]) / sum(weights)) for k in range(len(parts) + 1)]
    for k in range(1, len(parts)):  # one step at least in every part
        bounds[k] = min(max(bounds[k], bounds[k - 1] + 1), num_steps - 1 - (len(parts) - k))
    pieces = [torch.tensor([low])]
    for (begin, end), steps in zip(parts, (b - a for a, b in itertools.pairwise(bounds)), strict=True):
        piece = begin + (end - begin) * torch.linspace(0, 1, steps + 1)[1:] ** power
        pieces.append(torch.cat([piece[:-1], torch.tensor([end])]))
    return torch.cat(pieces), frozenset(bounds[1:-1])


def kumaraswamy_grid(num_steps: int) -> Tensor:
    """Return UCGM's times (num_steps - 1,), and 1 behind them: a rising grid (num_steps,) in float64.

    With K = num_steps - 1 values u, evenly from `GAP` to 1 - `GAP`, the times are (1 - (1 - u^a)^b)^c, the distribution
    function of Kumaraswamy with a third exponent (arXiv 2505.07447, section 3.3 and the released settings).

    Raises:
        ValueError: fewer than 2 points.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps!r} is too small, expected at least 2 grid points")
    a, b, c = KUMARASWAMY
    u = torch.linspace(GAP, 1 - GAP, num_steps - 1, dtype=torch.float64)
    return torch.cat([(1 - (1 - u**a) ** b) ** c, u.new_ones(1)])


def extrapolated(velocity: Velocity, x: Tensor, times: Tensor, callback: StepCallback | None = None) -> Tensor:
    """Return the state (N, ...) at the last of `times` (K,) with K - 1 evaluations, as UCGM's sampler of order 1 does.

    Each evaluation at s gives the predictions D = x + (1 - s) v of the data and E = x - s v of the noise. From the
    third on both are moved on by `EXTRAPOLATION` of their change since the evaluation before, which is kept as it was.
    The next state is t D + (1 - t) E, the last one as predicted: D on a grid that ends on 1. The order is 1: on an even
    grid the extrapolation adds h^2 dv/dt in the end, twice what Euler's method lacks.
    """
    before: tuple[Tensor, Tensor] | None = None
    for index, (s, t) in enumerate(itertools.pairwise(times)):
        value = _at(velocity, x, s)
        data, noise = predicted = (x + (1 - s) * value, x - s * value)
        if before is not None and 1 < index < len(times) - 2:
            data = data + EXTRAPOLATION * (data - before[0])
            noise = noise + EXTRAPOLATION * (noise - before[1])
        before = predicted
        x = t * data + (1 - t) * noise
        if callback is not None:
            callback(index, float(t), x)
    return x


def euler(velocity: Velocity, x: Tensor, times: Tensor, callback: StepCallback | None = None) -> Tensor:
    """Return the state (N, ...) at the last of `times` (K,) by Euler's method with K - 1 evaluations.

    The states are those of torchdiffeq's `euler` to the bit; that one asks the device for each time.
    """
    for index, (s, t) in enumerate(itertools.pairwise(times)):
        x = x + (t - s) * _at(velocity, x, s)
        if callback is not None:
            callback(index, float(t), x)
    return x


def heun(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    nodes: Collection[int] = (),
    callback: StepCallback | None = None,
) -> Tensor:
    """Return the state (N, ...) at the last of `times` (K,) by Heun's method: second order, 2 (K - 1) evaluations.

    `nodes` and `callback` are those of `multistep`.
    """
    for index, (s, t) in enumerate(itertools.pairwise(times)):
        first = _at(velocity, x, _beside(s, t) if index in nodes else s)
        ahead = x + (t - s) * first
        second = _at(velocity, ahead, _beside(t, s) if index + 1 in nodes else t)
        x = x + 0.5 * (t - s) * (first + second)
        if callback is not None:
            callback(index, float(t), x)
    return x


def multistep(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    method: Multistep,
    nodes: Collection[int] = (),
    callback: StepCallback | None = None,
) -> Tensor:
    """Return the state (N, ...) at the last of `times` (K,) with K - 1 evaluations of `velocity`.

    Args:
        x: state (N, ...) at times[0].
        times: rising; the velocity methods also take falling ones.
        nodes: indices of grid points at which the velocity jumps; the method starts anew there.
        callback: called after each step.
    """
    history: list[tuple[float, Tensor]] = []  # the newest first
    begin = x
    for index, (s, t) in enumerate(itertools.pairwise(times)):
        value = _at(velocity, x, _beside(s, t) if index in nodes else s)
        if method.quantity == "data":
            value = x + (1 - s) * value
        if index in nodes:
            history = []
        elif method.corrector and history:
            x = _advance(method.quantity, [(float(s), value), *history], begin, history[0][0], float(s))
        history = [(float(s), value), *history][: method.order]
        begin = x
        x = _advance(method.quantity, history, begin, float(s), float(t))
        if callback is not None:
            callback(index, float(t), x)
    return x


def linear_multistep(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    coefficients: Tensor,
    callback: StepCallback | None = None,
) -> Tensor:
    """Return the state (N, ...) at the last of `times` (K,) by x_n+1 = x_n + sum_j<=n coefficients[n, j] v_j.

    Every such method evaluates `velocity` K - 1 times. Gradients flow into `times` and `coefficients` (K - 1, K - 1).
    """
    values: list[Tensor] = []
    for index, (s, t) in enumerate(itertools.pairwise(times)):
        values.append(_at(velocity, x, s))
        row = coefficients[index, : index + 1]
        x = x + sum(weight * value for weight, value in zip(row, values, strict=True))
        if callback is not None:
            callback(index, float(t), x)
    return x


def velocity_coefficients(times: Tensor, order: int, nodes: Collection[int] = ()) -> Tensor:
    """Return the coefficients (K - 1, K - 1) with which `linear_multistep` is the Adams-Bashforth method."""
    grid = [float(t) for t in times]
    matrix = torch.zeros(len(grid) - 1, len(grid) - 1, dtype=torch.float64)
    start = 0
    for index, (s, t) in enumerate(itertools.pairwise(grid)):
        start = index if index in nodes else start
        used = range(index, max(start, index - order + 1) - 1, -1)
        _, weights = step_weights("velocity", [grid[j] for j in used], s, t)
        matrix[index, list(used)] = torch.from_numpy(weights)
    return matrix


def step_weights(quantity: str, nodes: Sequence[float], s: float, t: float) -> tuple[float, np.ndarray]:
    """Return (a, w) of the step x_t = a x_s + sum_j w[j] f(nodes[j]), which is exact for polynomials f in time of a
    degree below len(nodes).
    """
    scaled = (np.asarray(nodes, dtype=np.float64) - s) / (t - s)
    powers = np.vander(scaled, increasing=True).T  # row k: the nodes to the power k
    if quantity == "velocity":
        a, moments = 1.0, [(t - s) / (k + 1) for k in range(len(scaled))]
    else:
        a, moments = (1 - t) / (1 - s), list(_data_moments(len(scaled), 1 - s, 1 - t))
    return a, np.linalg.solve(powers, np.asarray(moments))


def _data_moments(count: int, sigma_s: float, sigma_t: float) -> Iterator[float]:
    """Yield int_s^t sigma_t / sigma_u^2 z^k du for k = 0, 1, ..., where z = (u - s) / (t - s)."""
    # With w = sigma_u: the integral of sigma_t w^(k - 2) from sigma_t to sigma_s, finite at sigma_t = 0 too.
    bare = [
        1 - sigma_t / sigma_s,
        sigma_t * math.log(sigma_s / sigma_t) if sigma_t > 0 else 0.0,
        *(sigma_t * (sigma_s ** (k - 1) - sigma_t ** (k - 1)) / (k - 1) for k in range(2, count)),
    ]
    for k in range(count):
        terms = (math.comb(k, i) * (-1) ** i * sigma_s ** (k - i) * bare[i] for i in range(k + 1))
        yield math.fsum(terms) / (sigma_s - sigma_t) ** k


def _advance(quantity: str, values: Sequence[tuple[float, Tensor]], x: Tensor, s: float, t: float) -> Tensor:
    a, weights = step_weights(quantity, [time for time, _ in values], s, t)
    state = a * x
    for weight, (_, value) in zip(weights, values, strict=True):
        state = state + float(weight) * value
    return state


def _at(velocity: Velocity, x: Tensor, t: Tensor) -> Tensor:
    return velocity(x, t.expand(x.shape[0])).to(x.dtype)


def _beside(t: Tensor, towards: Tensor) -> Tensor:
    """Return the number next to `t` towards another time, to take the velocity's limit from that side of a jump."""
    return torch.nextafter(t, towards)
