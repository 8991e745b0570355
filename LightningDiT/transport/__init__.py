"""The transport between noise and data: paths, losses, solvers and guidance."""

from .guidance import GuidanceSettings, GuidedVelocity, guided_velocity
from .objective import Transport, create_transport
from .path import PATHS, Path
from .sampler import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    ODE_METHODS,
    Sampler,
    SdeSettings,
    draw_noise,
    integrate_ode,
    sde_states,
    time_grid,
)
from .solvers import OWN_METHODS, Velocity, check_method, graded_grid, jumps_of, linear_multistep

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
    "Transport",
    "Velocity",
    "check_method",
    "create_transport",
    "draw_noise",
    "graded_grid",
    "guided_velocity",
    "integrate_ode",
    "jumps_of",
    "linear_multistep",
    "sde_states",
    "time_grid",
]
