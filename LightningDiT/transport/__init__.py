"""The transport between noise and data: paths, losses, solvers and guidance."""

from .guidance import GuidanceSettings, GuidedVelocity, jumps_of
from .objective import Transport, create_transport
from .path import PATHS, Path, check_choice
from .published import Sampler
from .sampler import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    ODE_METHODS,
    draw_noise,
    integrate_ode,
    sampling_times,
    time_grid,
)
from .sde import SdeSettings, sde_states
from .solvers import OWN_METHODS, StepCallback, Velocity, check_method, graded_grid, kumaraswamy_grid, linear_multistep

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "ODE_METHODS",
    "OWN_METHODS",
    "PATHS",
    "GuidanceSettings",
    "GuidedVelocity",
    "Path",
    "Sampler",
    "SdeSettings",
    "StepCallback",
    "Transport",
    "Velocity",
    "check_choice",
    "check_method",
    "create_transport",
    "draw_noise",
    "graded_grid",
    "integrate_ode",
    "jumps_of",
    "kumaraswamy_grid",
    "linear_multistep",
    "sampling_times",
    "sde_states",
    "time_grid",
]
