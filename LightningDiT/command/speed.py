"""How fast sampling is on this machine: real steps of a model, and a prediction for the published transformer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from LightningDiT.config import NAMED_SOLVERS, Config
from LightningDiT.device import best_device, resolve_precision, synchronise
from LightningDiT.loading import NetworkSettings, make_model, model_settings
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.solver_choice import FAST, solver_of
from LightningDiT.seeds import generator_for

SHORT_POINTS = 4  # of the first, short run: the fewest that every solver takes under guidance
LONGEST_SECONDS = 20.0  # of an image that is measured as a whole
DEPTHS = (1, 3)  # blocks of the two networks whose difference gives the time of a block
STATES = 2  # of an image under guidance: with its class and without
REPEATS = 3


@dataclass(frozen=True)
class Speed:
    """The time of one image.

    Attributes:
        seconds: of sampling and decoding it alone.
        evaluations: of the velocity in it.
        measured: whether the whole image was made, or a few evaluations of it.
    """

    seconds: float
    evaluations: int
    measured: bool


def speed_of(config: Config) -> Speed:
    """Sample one image of class 0 by a short grid, then by the configuration's own solver unless that takes long."""
    pipeline = LightningDiTPipeline.from_config(config)
    pipeline(0, num_inference_steps=SHORT_POINTS)  # the first run warms up
    short = pipeline(0, num_inference_steps=SHORT_POINTS)
    each = short.seconds / short.nfe
    steps = solver_of(config, config.sample).steps
    evaluations = round(steps * short.nfe / (SHORT_POINTS - 1))
    if each * evaluations > LONGEST_SECONDS:
        return Speed(each * evaluations, evaluations, measured=False)
    whole = pipeline(0)
    return Speed(whole.seconds, whole.nfe, measured=True)


def predicted_speed(config: Config) -> Speed:
    """Predict the time of one image by `fast` without decoding it, of a transformer whose weights need not be here.

    Networks of 1 and of 3 of its blocks are timed with random weights, in the precision that sampling takes by itself;
    the difference is the time of two blocks.
    """
    device, settings = best_device(), model_settings(config)
    dtype = resolve_precision("auto", device).dtype
    few, more = (_forward_seconds(settings, depth, device, dtype) for depth in DEPTHS)
    block = max(0.0, more - few) / (DEPTHS[1] - DEPTHS[0])
    _, points, _ = NAMED_SOLVERS[FAST]
    return Speed((points - 1) * (few + (settings.depth - DEPTHS[0]) * block), points - 1, measured=False)


def _forward_seconds(settings: NetworkSettings, depth: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the least seconds, of a few forwards of one image's states, that a network of `depth` blocks takes."""
    model = make_model(replace(settings, depth=depth)).eval().requires_grad_(False).to(device, dtype)
    shape = (STATES, settings.in_channels, settings.input_size, settings.input_size)
    state = torch.randn(shape, generator=generator_for(0)).to(device)  # (2, C, h, w)
    times, labels = torch.full((STATES,), 0.5, device=device), torch.zeros(STATES, dtype=torch.long, device=device)
    return least_seconds(lambda: model(state, times, labels), device)


def least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a few calls behind one that warms up; what else runs only adds to them."""
    seconds = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            call()
            synchronise(device)
            seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
