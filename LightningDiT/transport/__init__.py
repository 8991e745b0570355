"""The transport between noise and data: paths, losses, solvers and guidance."""

from .guidance import GuidanceSettings, GuidedVelocity, guided_velocity
from .objective import Transport, create_transport
from .path import PATHS, Path
from .sampler import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    Sampler,
    SdeSettings,
    draw_noise,
    integrate_ode,
    sde_states,
    time_grid,
)

__all__ = [
    "ADAPTIVE_METHODS",
    "FIXED_METHODS",
    "PATHS",
    "GuidanceSettings",
    "GuidedVelocity",
    "Path",
    "Sampler",
    "SdeSettings",
    "Transport",
    "create_transport",
    "draw_noise",
    "guided_velocity",
    "integrate_ode",
    "sde_states",
    "time_grid",
]
