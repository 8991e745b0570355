"""Fit few-step solvers to a model: `python -m LightningDiT.tools.calibrate_solver --config C --evaluations 8 12`.

A solver of n evaluations is n + 1 times and a triangle of coefficients, x_n+1 = x_n + sum_j<=n c_nj v_j (idea: Wang et
al., "Differentiable Solver Search for Fast Diffusion Sampling", arXiv 2505.21114). The fit starts from the
Adams-Bashforth method on a graded grid, or from coefficients of least squares to reference trajectories if these are
better. Then Adam moves coefficients and times together through the model. The solver that is best on noises unseen by
the fit is kept. The file belongs to the weights and their guidance; a second run goes on from the file, and never
replaces a solver by a worse one.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from LightningDiT.console import Progress, importing, positive, run_main, seed_number

with importing(__name__):
    import torch
    from torch import Tensor

    from LightningDiT.config import SampleConfig, load_config, with_overrides
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.loading import guidance_of
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.sampling.calibrated import (
        CalibratedSolver,
        SolverFile,
        guide_fingerprint,
        load_solvers,
        save_solvers,
        weights_fingerprint,
    )
    from LightningDiT.sampling.dry_run import verify_config
    from LightningDiT.sampling.pipeline import LightningDiTPipeline
    from LightningDiT.seeds import generator_for
    from LightningDiT.transport import Velocity, draw_noise, graded_grid, integrate_ode, jumps_of, linear_multistep
    from LightningDiT.transport.solvers import velocity_coefficients

FILE_NAME = "solvers.yaml"
REFERENCE_METHOD = "ab3"
FIT_STREAM, CHECK_STREAM = 1, 2  # noises come from (seed, stream, index), those of images from (seed, index)
CHECK_EVERY = 5  # steps of Adam
LEAST_EVALUATIONS, LEAST_REFERENCE_STEPS = 3, 20
ORDERS = (2, 3)  # of the Adams-Bashforth methods to start from
GRADES = (1.2, 1.5)  # powers of the grids to start from
COEFFICIENT_RATE, TIME_RATE = 1e-3, 4e-3  # of Adam: rms change of a state; logarithms of the step sizes


@dataclass(frozen=True)
class Problem:
    """Noises, their velocity and their reference trajectories.

    Attributes:
        noise: (N, C, h, w).
        velocity: its classes are dealt over the noises in turn.
        times: (T,) of the reference.
        states: (T, N, C, h, w), the reference trajectories.
        jumps: times at which guidance sets in or ends.
    """

    noise: Tensor
    velocity: Velocity
    times: Tensor
    states: Tensor
    jumps: tuple[float, ...] = ()

    def grid(self, points: int, power: float) -> tuple[Tensor, tuple[int, ...]]:
        """Return a graded grid (points,) over the times of the reference, and its nodes: one at each jump."""
        times, nodes = graded_grid(points, self.jumps, power, (float(self.times[0]), float(self.times[-1])))
        return times.to(self.times), nodes

    def target(self, t: float) -> Tensor:
        """Return the reference states (N, C, h, w) at time t, by linear interpolation."""
        above = int((self.times < t).sum().clamp(1, len(self.times) - 1))
        below = above - 1
        share = (t - float(self.times[below])) / float(self.times[above] - self.times[below])
        return torch.lerp(self.states[below], self.states[above], share)

    def error(self, last: Tensor) -> Tensor:
        """Return the mean relative error of final states (N, C, h, w), a scalar."""
        return relative_error(last, self.states[-1])


@dataclass(frozen=True)
class Candidate:
    """Times (K,) and coefficients (K - 1, K - 1) of a solver, and its error on noises unseen by the fit."""

    times: Tensor
    coefficients: Tensor
    error: float


def relative_error(states: Tensor, reference: Tensor) -> Tensor:
    """Return the mean over states (N, ...) of |x - r| / |r| in the Euclidean norm, a scalar."""
    return ((states - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).mean()


@torch.no_grad()
def make_problem(pipe: LightningDiTPipeline, seeds: Sequence[int], count: int, steps: int) -> Problem:
    """Draw noises of (*seeds, index) and follow each to its end in `steps` of the reference method; shows progress."""
    noise = draw_noise((count, *pipe.latent_shape), [generator_for(*seeds, index) for index in range(count)])
    sample, transport, noise = pipe.config.sample, pipe.transport, noise.to(pipe.device)
    guided = pipe.guided([index % pipe.config.data.num_classes for index in range(count)], sample)
    jumps = jumps_of(guidance_of(sample))
    times = graded_grid(steps + 1, jumps, GRADES[-1], transport.interval(transport.sample_eps))[0].to(noise)
    print(f"Following {count} noises in {steps} steps of {REFERENCE_METHOD}", flush=True)
    states, progress = [noise], Progress(steps, "step")

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return transport.velocity(guided, x, t)

    def keep(step: int, t: float, state: Tensor) -> None:
        states.append(state)
        progress.update()

    integrate_ode(velocity, noise, times, REFERENCE_METHOD, callback=keep, jumps=jumps)
    progress.close()
    return Problem(noise, velocity, times, torch.stack(states), jumps)


@torch.no_grad()
def candidate(problem: Problem, times: Tensor, coefficients: Tensor) -> Candidate:
    """Return times and coefficients with their error on `problem`."""
    last = linear_multistep(problem.velocity, problem.noise, times, coefficients)
    return Candidate(times.clone(), coefficients.clone(), float(problem.error(last)))


@torch.no_grad()
def least_squares(problem: Problem, times: Tensor) -> Tensor:
    """Return the coefficients (K - 1, K - 1) with which each step in turn comes nearest to the reference."""
    steps = len(times) - 1
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    x, values = problem.noise, []
    for index in range(steps):
        values.append(problem.velocity(x, times[index].expand(len(x))))
        basis = torch.stack([value.flatten() for value in values], dim=1).double()  # (N C h w, index + 1)
        wanted = (problem.target(float(times[index + 1])) - x).flatten().double()
        matrix[index, : index + 1] = torch.linalg.lstsq(basis, wanted[:, None]).solution[:, 0].cpu()
        x = x + (basis @ matrix[index, : index + 1].to(basis)).view_as(x).to(x.dtype)
    return matrix.to(times)


@torch.no_grad()
def start_of(steps: int, fit: Problem, check: Problem) -> Candidate:
    """Return the best of the Adams-Bashforth methods and of the same grids with least-squares coefficients."""
    found = []
    for power in GRADES:
        times, nodes = fit.grid(steps + 1, power)
        found += [candidate(check, times, velocity_coefficients(times, order, nodes).to(times)) for order in ORDERS]
        found.append(candidate(check, times, least_squares(fit, times)))
    return min(found, key=lambda one: one.error)


class Times:
    """A grid as unbounded numbers: logarithms of step sizes, normalised between fixed nodes."""

    def __init__(self, times: Tensor, jumps: Sequence[float]) -> None:
        fixed = [0, *(int((times - jump).abs().argmin()) for jump in jumps), len(times) - 1]
        self.parts = list(itertools.pairwise(sorted(set(fixed))))
        self.ends = times.clone()
        self.logarithms = times.diff().log().requires_grad_()

    def grid(self) -> Tensor:
        """Return the times (K,), differentiable."""
        pieces = [self.ends[:1]]
        for begin, end in self.parts:
            first, last = self.ends[begin], self.ends[end]
            shares = self.logarithms[begin:end].softmax(0).cumsum(0)[:-1]
            pieces += [first + (last - first) * shares, last[None]]
        return torch.cat(pieces)


@torch.no_grad()
def whitening(problem: Problem, start: Candidate) -> list[Tensor]:
    """Return for each step the matrix that turns independent directions of unit size into coefficients.

    The velocities of one trajectory are nearly equal; in their own coordinates Adam would move all of them at once.
    """
    asked: list[Tensor] = []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        asked.append(problem.velocity(x, t))
        return asked[-1]

    linear_multistep(spy, problem.noise, start.times, start.coefficients)
    flat = torch.stack([value.flatten() for value in asked], dim=1).double()  # (N C h w, K - 1)
    gram = flat.T @ flat / len(flat)
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factors = [torch.linalg.cholesky(gram[:size, :size]) for size in range(1, len(gram) + 1)]
    return [torch.linalg.inv(factor).T.to(start.times) for factor in factors]


def refine(start: Candidate, fit: Problem, check: Problem, steps: int, kept: Callable[[Candidate], None]) -> None:
    """Move coefficients and times by `steps` steps of Adam; `kept` gets every new best on the noises of `check`."""
    times, directions = Times(start.times, fit.jumps), whitening(fit, start)
    moves = [torch.zeros(len(matrix), device=matrix.device, requires_grad=True) for matrix in directions]
    optimizer = torch.optim.Adam(
        [{"params": moves, "rate": COEFFICIENT_RATE}, {"params": [times.logarithms], "rate": TIME_RATE}],
        betas=(0.8, 0.95),
    )
    best = start.error
    print(f"Moving coefficients and times, {best:.4f} at the start", flush=True)
    progress = Progress(steps, "step")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        grid, matrix = times.grid(), _moved(start.coefficients, directions, moves)
        loss = fit.error(linear_multistep(fit.velocity, fit.noise, grid, matrix))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            with torch.no_grad():
                now = candidate(check, times.grid(), _moved(start.coefficients, directions, moves))
            if now.error < best:
                best = now.error
                kept(now)
        progress.update()
    progress.close()


def _moved(coefficients: Tensor, directions: list[Tensor], moves: list[Tensor]) -> Tensor:
    """Return the coefficients (K - 1, K - 1), each row moved by its directions."""
    width = coefficients.shape[1]
    rows = [
        torch.nn.functional.pad(matrix @ move, (0, width - len(move)))
        for matrix, move in zip(directions, moves, strict=True)
    ]
    return coefficients + torch.stack(rows)


def as_solver(found: Candidate, sample: SampleConfig, path_type: str, noises: int) -> CalibratedSolver:
    """Return a candidate as an entry of the file."""
    rows = tuple(tuple(row[: index + 1]) for index, row in enumerate(found.coefficients.tolist()))
    times, guide = tuple(found.times.tolist()), guide_fingerprint(sample)
    return CalibratedSolver(guidance_of(sample), path_type, times, rows, found.error, noises, guide)


def calibrate(pipe: LightningDiTPipeline, args: argparse.Namespace, output: Path) -> None:
    """Fit a solver for each of `args.evaluations`, and write each one that is better than the file's."""
    file = opened(output, weights_fingerprint(pipe.config.ckpt_path or "", pipe.config.adapter_path))
    sample, path_type = pipe.config.sample, pipe.transport.path_type
    check = make_problem(pipe, (args.seed, CHECK_STREAM), args.checks, args.reference_steps)
    fit = make_problem(pipe, (args.seed, FIT_STREAM), args.noises, args.reference_steps)

    def kept(found: Candidate) -> None:
        nonlocal file
        file = file.with_solver(as_solver(found, sample, path_type, args.noises))
        save_solvers(file, output)

    for steps in args.evaluations:
        known = file.best(sample, path_type, steps)
        if known is not None and known.evaluations == steps:
            start = candidate(check, *(tensor.to(pipe.device) for tensor in known.tensors()))
        else:
            start = start_of(steps, fit, check)
        kept(start)
        refine(start, fit, check, args.iterations, kept)
        best = file.best(sample, path_type, steps)
        print(f"{steps} evaluations: mean relative error {best.error if best else start.error:.4f}", flush=True)


def opened(path: Path, fingerprint: str) -> SolverFile:
    """Return the file at `path`, or a new one.

    Raises:
        LightningDiTError: it belongs to other weights.
    """
    if not path.exists():
        return SolverFile(fingerprint)
    file = load_solvers(path)
    if file.weights != fingerprint:
        raise LightningDiTError(
            f"{path} belongs to weights {file.weights}, and these are {fingerprint}", "name another --output"
        )
    return file


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.calibrate_solver", description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="YAML of the model and its guidance")
    parser.add_argument(
        "--evaluations", nargs="+", type=int, default=[6, 8, 10, 12], help="of each solver; default: 6 8 10 12"
    )
    parser.add_argument("--output", help=f"solver file; default: {FILE_NAME} beside the configuration")
    parser.add_argument("--noises", type=positive, default=32, help="of the fit; default: %(default)s")
    parser.add_argument("--checks", type=positive, default=40, help="noises that choose the best; default: %(default)s")
    parser.add_argument("--reference-steps", type=positive, default=160, help="of the reference; default: %(default)s")
    parser.add_argument("--iterations", type=positive, default=80, help="of Adam, a solver; default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0)
    parser.add_argument("--guidance-scale", type=float, help="default: the configuration's")
    parser.add_argument("--guidance-start", type=float, help="default: the configuration's cfg_interval_start")
    args = parser.parse_args(argv)
    if min(args.evaluations) < LEAST_EVALUATIONS or args.reference_steps < LEAST_REFERENCE_STEPS:
        parser.error(
            f"--evaluations of {LEAST_EVALUATIONS} or more and --reference-steps of {LEAST_REFERENCE_STEPS} or more"
            " are expected"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_config(args.config)
    verify_config(args.config)
    sample = with_overrides(config.sample, cfg_scale=args.guidance_scale, cfg_interval_start=args.guidance_start)
    if sample.mode != "ODE" or sample.reverse:
        raise LightningDiTError(f"{args.config} samples by the SDE or in reverse", "set mode: ODE and reverse: false")
    output = Path(args.output) if args.output else Path(config.source).parent / FILE_NAME
    pipe = LightningDiTPipeline.from_config(replace(config, sample=replace(sample, sampling_method="euler")))
    pipe.transformer.requires_grad_(False)
    calibrate(pipe, args, output)
    print(f"wrote {output}; sample it by `sampling_method: calibrated` and `solver_file: {output.name}`")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
