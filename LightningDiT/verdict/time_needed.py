"""How long step 6 takes on this machine, by a step of each kind that is timed here, and the plan that fits a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch

from LightningDiT.config import Config, DataConfig, ModelConfig, SampleConfig, VaeConfig, resolved_solver
from LightningDiT.console import duration
from LightningDiT.device import autocast, best_device, synchronise, training_dtype
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import make_model, model_settings
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.radar.split import Split
from LightningDiT.radar.training_file import DOWNSAMPLING
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.verdict.adapting import TOKENIZER_TEMPLATE, counts_of, jobs_of, validating
from LightningDiT.verdict.plan import Plan

CHANNELS = 6  # of a latent of the template's tokenizer
JUDGED = 8  # samples of a person in a look
TOKENIZER_BATCH = 16
FORWARD = 1 / 3  # of a training step: the backward pass costs two forward passes
PASSES = 4  # that are timed, the first one left out
UPKEEP = 1.2  # a training step over its two passes: optimizer, average, reading
PROCESS = 6.0  # seconds until a process has its libraries and weights
LOOK = 10.0  # seconds of a look beside its samples: the judge's share, a classifier, distances to training windows
LEAST = 0.2  # of the preset's steps: a budget that leaves fewer is refused


@dataclass(frozen=True)
class Costs:
    """Seconds of one training step: of the tokenizer, and of each network of a plan by its name."""

    tokenizer: float
    networks: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """Seconds of a plan: trainings, whose steps can be fewer, and everything else."""

    trainings: float
    rest: float

    @property
    def total(self) -> float:
        return self.trainings + self.rest


def measure(plan: Plan, split: Split) -> Costs:
    """Time a training step of the tokenizer and of each network, with random weights and windows."""
    autoencoder = AutoencoderKL(autoencoder_settings(load_tokenizer_config(TOKENIZER_TEMPLATE)))
    windows = torch.randn(TOKENIZER_BATCH, 1, plan.size, plan.size)
    tokenizer = _step_seconds(autoencoder, lambda x: autoencoder.decode(autoencoder.encode(x).mode()), windows)
    networks, side = {}, plan.size // DOWNSAMPLING
    for model in plan.models:
        config = Config(
            data=DataConfig(image_size=plan.size, num_classes=len(split.people)),
            vae=VaeConfig(downsample_ratio=DOWNSAMPLING),
            model=ModelConfig(model_type=model.model_type, in_chans=CHANNELS, augmentation=len(NAMES)),
        )
        network, x = make_model(model_settings(config)), torch.randn(plan.batch, CHANNELS, side, side)

        def forward(x: torch.Tensor, network: torch.nn.Module = network) -> torch.Tensor:
            return network(x, x[:, 0, 0, 0].sigmoid(), torch.zeros(len(x), dtype=torch.long, device=x.device))

        networks[model.name] = _step_seconds(network, forward, x)
    return Costs(tokenizer, networks)


def _step_seconds(network: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Return the seconds of a forward and a backward pass with what a step needs beside them.

    The first pass prepares; of the others the fastest counts, since a moment of other work says nothing of an hour.
    """
    device, found = best_device(), []
    network.to(device).train()
    x = x.to(device)
    for _ in range(PASSES):
        synchronise(device)
        started = time.perf_counter()
        with autocast(device, training_dtype(device)):
            loss = forward(x).float().square().mean()
        loss.backward()
        synchronise(device)
        found.append(time.perf_counter() - started)
    return UPKEEP * min(found[1:])


def estimate(plan: Plan, split: Split, costs: Costs, there: Collection[tuple[int, int | None]] = ()) -> Estimate:
    """Return the seconds of a plan, without those of the cells that are there."""
    cells = [cell for cell in plan.cells if cell not in there]
    counts = counts_of(plan, split)
    points = resolved_solver(SampleConfig(sampling_method="fast")).num_sampling_steps
    asked = 1 if plan.guidance == 1 else 2  # guidance asks the network twice
    per_pixels = FORWARD * costs.tokenizer / TOKENIZER_BATCH  # of encoding and decoding a window together
    trainings = rest = 0.0
    for fold, images in cells:
        real, generated = counts[fold, images], plan.generated * counts[fold, images]
        trainings += plan.tokenizer_steps * costs.tokenizer
        valid = validating(plan, split, fold)
        rest += per_pixels * (plan.draws * real + valid)
        for seconds in costs.networks.values():
            sample = asked * points * FORWARD * seconds / plan.batch + per_pixels
            looks = plan.looks if valid else 0
            trainings += plan.steps * seconds
            rest += generated * sample + looks * (LOOK + JUDGED * len(split.people) * sample)
    return Estimate(trainings, rest + PROCESS * len(jobs_of(plan, plan.levels, split)) * len(cells) / len(plan.cells))


def fitted(plan: Plan, found: Estimate, minutes: float) -> Plan:
    """Return a plan whose trainings are as much shorter as the budget asks for.

    Raises:
        LightningDiTError: less than `LEAST` of their steps would be left.
    """
    share = (60 * minutes - found.rest) / found.trainings
    if share >= 1:
        return plan
    if share < LEAST:
        needed = (LEAST * found.trainings + found.rest) / 60
        raise LightningDiTError(
            f"{minutes:g} min leave {max(0.0, share):.0%} of the trainings' steps, and less than {LEAST:.0%} is of no"
            " use",
            f"give --time-budget {needed + 1:.0f} or fewer --images, --folds and --models",
        )
    steps, tokenizer_steps = (max(1, int(share * number)) for number in (plan.steps, plan.tokenizer_steps))
    return replace(plan, steps=steps, tokenizer_steps=tokenizer_steps)


def within(plan: Plan, split: Split, minutes: float | None, there: Collection[tuple[int, int | None]] = ()) -> Plan:
    """Print how long a plan takes; return it, or one with shorter trainings that takes the given time.

    Args:
        there: cells that take no time.

    Raises:
        LightningDiTError: see `fitted`.
    """
    costs = measure(plan, split)
    found = estimate(plan, split, costs, there)
    shorter = plan if minutes is None else fitted(plan, found, minutes)
    if shorter is not plan:
        print(f"note: all of it would take {duration(found.total)}; --time-budget {minutes:g} shortens the trainings")
        found = estimate(shorter, split, costs)
    print(
        f"time           about {duration(found.total)} on this machine, of which trainings {duration(found.trainings)};"
        " other work at the same time makes it longer",
        flush=True,
    )
    return shorter
