"""What sampling does, settled once: a method on its grid of times, a calibrated solver, or the SDE."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from LightningDiT.config import NAMED_SOLVERS, SampleConfig, resolved_solver
from LightningDiT.errors import LightningDiTError
from LightningDiT.sampling.calibrated import CalibratedSolver, find_solver
from LightningDiT.transport import (
    ADAPTIVE_METHODS,
    ODE_METHODS,
    GuidanceSettings,
    Sampler,
    SdeSettings,
    Transport,
    Velocity,
    check_method,
    graded_grid,
    integrate_ode,
    jumps_of,
    linear_multistep,
)

CALIBRATED, FAST, PUBLISHED = "calibrated", "fast", "published"
GRADED = "graded"
SOLVER_NAMES = (*NAMED_SOLVERS, CALIBRATED, *ODE_METHODS)
#: callback(step, t, state): after each step of a solver.
Callback = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class Procedure:
    """The way from noise to latents.

    Attributes:
        sample: the settings, a named solver spelt out.
        transport: of the model.
        guidance: when guidance acts; the grid follows it.
        solver: the calibrated solver that takes the method's place, if any.
    """

    sample: SampleConfig
    transport: Transport
    guidance: GuidanceSettings
    solver: CalibratedSolver | None = None

    @classmethod
    def of(cls, sample: SampleConfig, transport: Transport, fingerprint: Callable[[], str]) -> Procedure:
        """Return the procedure of sampling settings; files are read here and not again.

        Args:
            fingerprint: gives that of the transformer's weights (`calibrated.weights_fingerprint`); called where a
                solver file is looked at.

        Raises:
            LightningDiTError: no such solver, or the file has none that fits.
            ValueError: a grid of too few points.
        """
        check_solver(sample, transport.path_type)
        solver = calibrated_solver(sample, transport.path_type, fingerprint)
        procedure = cls(resolved_solver(sample), transport, guidance_of(sample), solver)
        if sample.mode == "ODE" and solver is None:
            procedure.times()
        return procedure

    @property
    def steps(self) -> int:
        """Steps of a batch; those of an adaptive method, unknown before, count as its grid's."""
        if self.sample.mode == "SDE":
            return self.sample.num_sampling_steps
        return self.solver.evaluations if self.solver else self.sample.num_sampling_steps - 1

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its steps by the states that it meets."""
        return self.sample.mode == "ODE" and self.solver is None and self.sample.sampling_method in ADAPTIVE_METHODS

    def describe(self) -> str:
        """Return a few words for people."""
        if self.solver:
            return f"calibrated, {self.solver.evaluations} evaluations"
        if self.is_adaptive:
            return f"{self.sample.sampling_method}, atol {self.sample.atol:g}, rtol {self.sample.rtol:g}"
        grid = "graded grid" if self.sample.time_grid == GRADED else f"shift {self.sample.timestep_shift:g}"
        name = f"SDE {self.sample.sampling_method}" if self.sample.mode == "SDE" else self.sample.sampling_method
        return f"{name}, {self.sample.num_sampling_steps} points, {grid}"

    def times(self) -> Tensor:
        """Return the grid of times, from noise to data unless in reverse."""
        sample, sampler = self.sample, Sampler(self.transport)
        if sample.time_grid != GRADED:
            return sampler.times(sample.num_sampling_steps, sample.timestep_shift, sample.reverse)
        ends = self.transport.interval(self.transport.sample_eps)
        times, _ = graded_grid(sample.num_sampling_steps, jumps_of(self.guidance), ends=ends)
        return times.flip(0) if sample.reverse else times

    def integrate(self, velocity: Velocity, state: Tensor, callback: Callback | None = None) -> Tensor:
        """Return the final state (N, C, h, w) of the ODE."""
        if self.solver:
            times, coefficients = (tensor.to(state.device) for tensor in self.solver.tensors())
            return linear_multistep(velocity, state, times, coefficients, callback)
        sample, jumps = self.sample, jumps_of(self.guidance)
        method, tolerances = sample.sampling_method, (sample.atol, sample.rtol)
        return integrate_ode(velocity, state, self.times(), method, *tolerances, callback, jumps)


def guidance_of(sample: SampleConfig) -> GuidanceSettings:
    """Return how strongly, when and where guidance acts."""
    channels = None if sample.guided_channels == "all" else int(sample.guided_channels)
    return GuidanceSettings(sample.cfg_scale, sample.cfg_interval_start, sample.cfg_interval_end, channels)


def calibrated_solver(sample: SampleConfig, path_type: str, fingerprint: Callable[[], str]) -> CalibratedSolver | None:
    """Return the calibrated solver that sampling settings ask for.

    `calibrated` takes the most evaluations that `num_sampling_steps` points allow; `fast` the most that there are, and
    None, with a warning, where the file has none that fits.

    Raises:
        LightningDiTError: `calibrated`, and the file has none that fits.
    """
    if sample.mode != "ODE" or sample.sampling_method not in (CALIBRATED, FAST):
        return None
    if sample.sampling_method == CALIBRATED:
        return find_solver(sample, path_type, fingerprint, sample.num_sampling_steps - 1)
    if not sample.solver_file:
        return None
    try:
        return find_solver(sample, path_type, fingerprint)
    except LightningDiTError as error:
        method, points, _ = NAMED_SOLVERS[FAST]
        reason = error.message.partition(";")[0].replace(sample.solver_file, Path(sample.solver_file).name)
        warnings.warn(f"{reason}; {method} with {points} points takes its place", stacklevel=2)
        return None


def check_solver(sample: SampleConfig, path_type: str = "Linear") -> None:
    """Refuse a solver that the mode does not have, or options that do not go with it.

    Raises:
        LightningDiTError: names the value and the known ones.
    """
    try:
        if sample.mode == "SDE":
            sde_settings(sample)
        elif sample.sampling_method not in SOLVER_NAMES:
            near = difflib.get_close_matches(sample.sampling_method, SOLVER_NAMES, 1, 0.0)
            raise ValueError(
                f"sampling_method {sample.sampling_method!r} is unknown; {', '.join(SOLVER_NAMES)} are expected,"
                f" the nearest is {near[0]}"
            )
        else:
            check_method(sample.sampling_method, path_type, sample.reverse)
            if sample.time_grid == GRADED and sample.timestep_shift:
                raise ValueError("timestep_shift goes with time_grid shifted, not with graded")
    except ValueError as error:
        raise LightningDiTError(f"sample: {error}", "edit that value, or choose another option") from error


def sde_settings(sample: SampleConfig) -> SdeSettings:
    """Return the stochastic sampler's settings.

    Raises:
        ValueError: an unknown name, or an option that only the ODE has.
    """
    if sample.sampling_method in (*NAMED_SOLVERS, CALIBRATED):
        raise ValueError(f"sampling_method {sample.sampling_method} goes with mode ODE, not with SDE")
    if sample.timestep_shift or sample.reverse or sample.time_grid == GRADED:
        raise ValueError("timestep_shift, reverse and time_grid graded go with mode ODE, not with SDE")
    return SdeSettings(
        sampling_method=sample.sampling_method.capitalize(),  # SiT writes Euler and Heun
        diffusion_form=sample.diffusion_form,
        diffusion_norm=sample.diffusion_norm,
        last_step=sample.last_step,
        last_step_size=sample.last_step_size,
        num_steps=sample.num_sampling_steps,
    )
