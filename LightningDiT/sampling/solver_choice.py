"""The solver that sampling settings choose: a method on its grid of times, a calibrated solver, or the SDE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.config import NAMED_SOLVERS, Config, SampleConfig, describe_solver, resolved_solver
from LightningDiT.errors import LightningDiTError, warn_user
from LightningDiT.loading import as_user_error, build_transport, guidance_of, required
from LightningDiT.sampling.calibrated import CalibratedSolver, OtherWeightsError, find_solver, weights_fingerprint
from LightningDiT.transport import (
    ADAPTIVE_METHODS,
    ODE_METHODS,
    SdeSettings,
    StepCallback,
    Transport,
    Velocity,
    check_choice,
    check_method,
    graded_grid,
    integrate_ode,
    jumps_of,
    kumaraswamy_grid,
    linear_multistep,
    sampling_times,
    sde_states,
)

CALIBRATED, FAST, PUBLISHED, UCGM = "calibrated", "fast", "published", "ucgm"
SHIFTED, GRADED = "shifted", "graded"  # the third grid is Kumaraswamy's
SOLVER_NAMES = (*NAMED_SOLVERS, CALIBRATED, *ODE_METHODS)


@dataclass(frozen=True)
class Solver:
    """The way from noise to latents.

    Attributes:
        sample: the settings, a named solver spelt out.
        transport: of the model.
        calibrated: the calibrated solver that replaces the method, if any.
        note: why `fast` has none, if the solver file belongs to other weights; `describe` says it.
    """

    sample: SampleConfig
    transport: Transport
    calibrated: CalibratedSolver | None = None
    note: str = ""

    @classmethod
    def of(cls, sample: SampleConfig, transport: Transport, fingerprint: Callable[[], str]) -> Solver:
        """Return the solver of sampling settings; a solver file is read here and not again.

        `calibrated` is the solver with the most evaluations that `num_sampling_steps` points allow. `fast` is the one
        with the most that the file has. If none fits the guidance, a warning says so and the named method is used. A
        file of other weights, such as that of a copied configuration, gives no warning.

        Args:
            fingerprint: returns the `weights_fingerprint` of the transformer; called if a solver file is read.

        Raises:
            LightningDiTError: no such solver, or `calibrated`, and the file has none that fits.
            ValueError: a grid of too few points.
        """
        check_solver(sample, transport.path_type)
        solver, name = cls(resolved_solver(sample), transport), sample.sampling_method
        if sample.mode == "ODE" and name == CALIBRATED:
            calibrated = find_solver(sample, transport.path_type, fingerprint, sample.num_sampling_steps - 1)
            return replace(solver, calibrated=calibrated)
        if sample.mode == "ODE" and name == FAST and sample.solver_file:
            try:
                return replace(solver, calibrated=find_solver(sample, transport.path_type, fingerprint))
            except OtherWeightsError:
                solver = replace(solver, note=f"; {Path(sample.solver_file).name} belongs to other weights")
            except LightningDiTError as error:
                reason = error.message.partition(";")[0].replace(sample.solver_file, Path(sample.solver_file).name)
                method, points, _ = NAMED_SOLVERS[FAST]
                warn_user(f"{reason}; {method} with {points} points is used instead")
        if sample.mode == "ODE":
            solver.times()
        return solver

    @property
    def steps(self) -> int:
        """Steps of a batch; an adaptive method, whose number is not known before, counts those of its grid."""
        if self.sample.mode == "SDE":
            return self.sample.num_sampling_steps
        return self.calibrated.evaluations if self.calibrated else self.sample.num_sampling_steps - 1

    @property
    def is_adaptive(self) -> bool:
        """Whether the method chooses its steps by the states that it meets."""
        return self.sample.mode == "ODE" and not self.calibrated and self.sample.sampling_method in ADAPTIVE_METHODS

    def describe(self) -> str:
        """Return the solver in a few words."""
        if self.calibrated:
            return f"calibrated, {self.calibrated.evaluations} evaluations"
        if self.is_adaptive:
            return f"{self.sample.sampling_method}, atol {self.sample.atol:g}, rtol {self.sample.rtol:g}"
        return describe_solver(self.sample) + self.note

    def times(self) -> Tensor:
        """Return the grid of times, from noise to data unless in reverse."""
        sample, transport = self.sample, self.transport
        if sample.time_grid == SHIFTED:
            return sampling_times(transport, sample.num_sampling_steps, sample.timestep_shift, sample.reverse)
        ends = transport.interval(transport.sample_eps)
        if sample.time_grid != GRADED:
            times = kumaraswamy_grid(sample.num_sampling_steps)
            if times[0] < ends[0] or times[-2] > ends[1]:
                raise ValueError(
                    f"time_grid {sample.time_grid} evaluates the model from t = {float(times[0]):.2g} to"
                    f" {float(times[-2]):.4g}, and transport.sample_eps keeps it in {ends[0]:g} to {ends[1]:g}"
                )
            return times
        times, _ = graded_grid(sample.num_sampling_steps, jumps_of(guidance_of(sample)), ends=ends)
        return times.flip(0) if sample.reverse else times

    def integrate(
        self, model: Velocity, x: Tensor, generators: Sequence[torch.Generator], callback: StepCallback | None = None
    ) -> tuple[Tensor, int]:
        """Return the final state (N, C, h, w), and how many times the model was evaluated.

        Args:
            model: guided prediction of state and time.
            x: noise (N, C, h, w), or data in reverse.
            generators: one per image, for the noise of the SDE.
            callback: called as callback(step, t, state) after each step.

        Raises:
            FloatingPointError: an adaptive method finds no step that meets its tolerances.
        """
        sample, evaluations = self.sample, 0

        def counted(x: Tensor, t: Tensor) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return model(x, t)

        velocity = partial(self.transport.velocity, counted)
        if sample.mode == "SDE":
            states = sde_states(self.transport, counted, x, sde_settings(sample), generators)
            for step, x in enumerate(states):
                if callback is not None:
                    callback(step, (step + 1) / sample.num_sampling_steps, x)
        elif self.calibrated:
            x = linear_multistep(velocity, x, *self.calibrated.tensors(), callback)
        else:
            method, jumps = sample.sampling_method, jumps_of(guidance_of(sample))
            x = integrate_ode(velocity, x, self.times(), method, sample.atol, sample.rtol, callback, jumps)
        return x, evaluations


def solver_of(config: Config, sample: SampleConfig) -> Solver:
    """Return the solver of sampling settings, for the weights that the configuration names.

    Raises:
        LightningDiTError: no such solver, none that fits, or a grid of too few points.
    """
    with as_user_error(f"{config.source}: sample"):
        fingerprint = partial(weights_fingerprint, required(config, "ckpt_path"), config.adapter_path)
        return Solver.of(sample, build_transport(config), fingerprint)


def check_solver(sample: SampleConfig, path_type: str = "Linear") -> None:
    """Refuse a solver that the mode does not have, options that do not go with it, or with one another.

    Raises:
        LightningDiTError: names the value and the known ones.
    """
    try:
        if sample.mode == "SDE":
            sde_settings(sample)
        else:
            check_choice("sampling_method", sample.sampling_method, SOLVER_NAMES)
            check_method(resolved_solver(sample).sampling_method, path_type, sample.reverse)
            if sample.time_grid != SHIFTED and sample.timestep_shift:
                raise ValueError(f"timestep_shift goes with time_grid shifted, not with {sample.time_grid}")
            if resolved_solver(sample).time_grid not in (SHIFTED, GRADED) and sample.reverse:
                raise ValueError(f"time_grid {resolved_solver(sample).time_grid} runs from noise to data only")
        if sample.deterministic and sample.compile == "on":
            raise ValueError("deterministic goes without compile, since torch.compile chooses kernels by timing them")
    except ValueError as error:
        raise LightningDiTError(f"sample: {error}", "edit that value, or choose another option") from error


def sde_settings(sample: SampleConfig) -> SdeSettings:
    """Return the stochastic sampler's settings.

    Raises:
        ValueError: an unknown name, or an option that only the ODE has.
    """
    if sample.sampling_method in (*NAMED_SOLVERS, CALIBRATED):
        raise ValueError(f"sampling_method {sample.sampling_method} goes with mode ODE, not with SDE")
    if sample.timestep_shift or sample.reverse or sample.time_grid != SHIFTED:
        raise ValueError("timestep_shift, reverse and time_grid graded or kumaraswamy go with mode ODE, not with SDE")
    return SdeSettings(
        sampling_method=sample.sampling_method.capitalize(),  # SiT writes Euler and Heun
        diffusion_form=sample.diffusion_form,
        diffusion_norm=sample.diffusion_norm,
        last_step=sample.last_step,
        last_step_size=sample.last_step_size,
        num_steps=sample.num_sampling_steps,
    )
