"""A training step beside the published one, the share of a run that waits for data, and the parts of an extraction.

Our step is that of `Trainer`, from shards on the disk. The step of `published_loop` is given each
batch ready-made: it reads and draws nothing.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from LightningDiT.checkpoint import save_weights, without_values
from LightningDiT.config import Config, load_config
from LightningDiT.console import Progress
from LightningDiT.data.image_sets import open_folder
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.device import (
    PRECISIONS,
    gpu_free_bytes,
    release_memory,
    synchronise,
    training_dtype,
)
from LightningDiT.errors import is_out_of_memory
from LightningDiT.loading import model_settings
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import TokenizerConfig, load_tokenizer_config, tokenizer_config_path
from LightningDiT.tokenizer.latents import Moments
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from LightningDiT.training.extraction import STATS_NAME, ExtractionSettings, default_workers, extract
from LightningDiT.training.latent_batches import LatentBatch
from LightningDiT.training.memory import training_need
from LightningDiT.training.transformer_training import Trainer

from .forward import WEIGHT_STD, random_weights
from .machine import PROJECT, free_memory_bytes, lack_of
from .published_loop import Block, PublishedLoop
from .rounds import Setting, seconds_of

OURS = "ours"
PUBLISHED = "published"
COMPILED = "published, layers compiled"
LATENTS = 1024  # of the random shard that is trained on
CONFIG = "config.yaml"
BUNDLED = PROJECT / "models" / "fashion-mnist" / CONFIG
B1 = PROJECT / "LightningDiT" / "configs" / "lightningdit_b1_train.yaml"
DETAIL = 8  # pixels between random values; a picture interpolated from them resembles a photograph


@dataclass(frozen=True)
class StepPlan:
    """Steps of one model in one precision: batches and rounds, in full and with --quick (no rounds: skipped)."""

    name: str
    config: Path
    precision: str  # a key of `device.PRECISIONS`
    batch: int
    rounds: int
    quick_batch: int
    quick_rounds: int


@dataclass(frozen=True)
class WaitingPlan:
    """A training whose share of waiting is measured: its steps, in full and with --quick (0: skipped)."""

    name: str
    config: Path
    batch: int
    steps: int
    quick_steps: int


@dataclass(frozen=True)
class ExtractionPlan:
    """An extraction: files of `size` (width, height), their number, in full and with --quick (0: skipped)."""

    name: str
    config: Path
    ending: str
    size: tuple[int, int]
    images: int
    quick_images: int


@dataclass(frozen=True)
class Step:
    """The time of a step of one loop.

    Attributes:
        loop: its name.
        seconds: median over rounds.
        ratio: median of its seconds over ours in the same round; above 1 ours is faster.
    """

    loop: str
    seconds: float
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """Steps of all loops from the same weights on the same batches.

    Attributes:
        case: model, batch and precision.
        batch: images.
        steps: ours first.
        loss_difference: of the published loop's first loss from ours, relative.
    """

    case: str
    batch: int
    steps: list[Step]
    loss_difference: float


@dataclass(frozen=True)
class Waiting:
    """The share of a training's time in which its steps waited for batches; `seconds` is the mean of a step."""

    case: str
    steps: int
    seconds: float
    share: float


@dataclass(frozen=True)
class Extraction:
    """Seconds of an extraction, and their shares as in `ExtractionResult`."""

    case: str
    images: int
    seconds: float
    shares: dict[str, float]


STEP_PLANS = (StepPlan("B/1", B1, "fp32", 8, 7, 1, 2), StepPlan("B/1", B1, "bf16", 8, 7, 0, 0))
#: The small model has the shortest steps, so the least time to make its batches.
WAITING_PLANS = (WaitingPlan("B/1", B1, 8, 8, 0), WaitingPlan("bundled model", BUNDLED, 128, 60, 5))
EXTRACTION_PLANS = (
    ExtractionPlan("VA-VAE f16d32 at 256x256", B1, "jpg", (500, 375), 64, 0),
    ExtractionPlan("bundled tokenizer at 32x32", BUNDLED, "png", (32, 32), 4000, 400),
)


def measure_training(setting: Setting) -> dict[str, Any]:
    """Return steps of both loops, shares of waiting and of extractions, and the skipped cases."""
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        comparisons = measure_steps(STEP_PLANS, setting, folder / "steps", skipped)
        waiting = [
            measure_waiting(plan, steps, folder / f"waiting {number}")
            for number, plan in enumerate(WAITING_PLANS)
            if (steps := wanted(f"training of {plan.name}", plan.steps, plan.quick_steps, setting, skipped))
        ]
        extractions = [
            measure_extraction(plan, images, folder / f"extraction {number}", setting.device)
            for number, plan in enumerate(EXTRACTION_PLANS)
            if (images := wanted(plan.name, plan.images, plan.quick_images, setting, skipped))
        ]
    return {"comparisons": comparisons, "waiting": waiting, "extractions": extractions, "skipped": skipped}


def wanted(name: str, full: int, quick: int, setting: Setting, skipped: list[str]) -> int:
    """Return the size of a measurement; if that is 0, `skipped` takes its name."""
    if setting.quick and not quick:
        skipped.append(f"{name}: not with --quick")
    return quick if setting.quick else full


def write_latents(config: Config, folder: Path, batch: int, precision: str) -> Config:
    """Write random latents of a configuration's shape, their statistics and a YAML that trains on them.

    Args:
        config: gives model, optimizer and loss.

    Returns:
        the configuration in that YAML.
    """
    data, optimizer, transport = config.data, config.optimizer, config.transport
    latents, side = folder / "latents", data.image_size // config.vae.downsample_ratio
    latents.mkdir(parents=True)
    shape = (LATENTS, config.model.in_chans, side, side)
    plain, mirrored = (torch.randn(shape, generator=generator_for(seed)) for seed in range(2))
    labels = torch.randint(data.num_classes, (LATENTS,), generator=generator_for(2))
    write_shard(shard_path(latents, 0, 0), plain, labels, mirrored)
    moments = Moments()
    moments.add(plain)
    moments.stats().save(latents / STATS_NAME, LATENTS)
    values = {
        "data": {"data_path": str(latents), "image_size": data.image_size, "num_classes": data.num_classes},
        "vae": {"downsample_ratio": config.vae.downsample_ratio},
        "model": asdict(config.model),
        "train": {"global_batch_size": batch, "precision": precision},
        "optimizer": asdict(optimizer),
        "transport": asdict(transport),
    }
    path = folder / CONFIG
    path.write_text(json.dumps(values), encoding="utf-8")  # YAML reads JSON
    return load_config(path)


def trainer_of(config: Config) -> Trainer:
    """Return the trainer with small random weights: at the usual start, zero, most gradients are zero."""
    trainer, generator = Trainer(config), generator_for(0)
    for value in trainer.model.parameters():
        if value.requires_grad and value.dim() > 1:
            value.data.copy_(WEIGHT_STD * torch.randn(value.shape, generator=generator))
    return trainer


def our_step(trainer: Trainer, step: int) -> float:
    """Take a step as a training does, with its figures for the log, and return its loss."""
    row = {name: float(value) for name, value in trainer.step(step).items()}
    return row["loss"] + row.get("cos_loss", 0.0)


def measure_steps(plans: Sequence[StepPlan], setting: Setting, folder: Path, skipped: list[str]) -> list[Comparison]:
    """Return the steps of every plan; `skipped` takes the skipped ones with the reason."""
    found: list[Comparison] = []
    for plan in plans:
        batch, rounds = (plan.quick_batch, plan.quick_rounds) if setting.quick else (plan.batch, plan.rounds)
        case = f"{plan.name}, batch {batch or plan.batch}, {plan.precision}"
        config = load_config(plan.config)
        if reason := lack_for_steps(config, plan, batch, rounds, setting):
            skipped.append(f"{case}: {reason}")
            continue
        trainer = trainer_of(write_latents(config, folder / plan.precision, batch, plan.precision))
        found.append(compare(case, trainer, PublishedLoop(trainer), rounds, skipped, compiles=not setting.quick))
        del trainer
        release_memory()
    return found


def lack_for_steps(config: Config, plan: StepPlan, batch: int, rounds: int, setting: Setting) -> str | None:
    """Return why a plan is skipped, or None."""
    dtype, device = PRECISIONS[plan.precision], setting.device
    if not rounds:
        return "not with --quick"
    if dtype not in (torch.float32, training_dtype(device)):
        return "emulated on this machine"
    need = training_need(model_settings(config), dtype, device.type != "cpu").peak(batch)
    there = free_memory_bytes() if device.type == "cpu" else gpu_free_bytes(device)
    return lack_of({"memory": (2 * need, there)})  # both loops are there at once


def compare(
    case: str, trainer: Trainer, published: PublishedLoop, rounds: int, skipped: list[str], compiles: bool
) -> Comparison:
    """Time the steps of all loops on the same batches in turn, `rounds` times after one to warm up.

    The published loop has one set of weights, which it trains with compiled layers and without by turns.
    """
    batches = [trainer.data.make(step) for step in range(rounds + 1)]
    loops: dict[str, Callable[[int], float]] = {
        OURS: lambda step: our_step(trainer, step),
        PUBLISHED: lambda step: published.step(batches[step]),
    }
    losses = {name: run(0) for name, run in loops.items()}
    if compiles and (blocks := compiled_blocks(published, batches[0], case, skipped)):
        loops[COMPILED] = lambda step: published.step(batches[step], blocks)
    times: dict[str, list[float]] = {name: [] for name in loops}
    progress = Progress(rounds * len(loops), "step")
    for step in range(1, rounds + 1):
        for name in loops if step % 2 else reversed(loops):  # none always comes after the same one
            run = partial(loops[name], step)
            times[name].append(seconds_of(run, trainer.device, trains=True))
            progress.update()
    progress.close()
    steps = [Step(name, statistics.median(own), _ratio(own, times[OURS])) for name, own in times.items()]
    return Comparison(case, len(batches[0]), steps, abs(losses[PUBLISHED] / losses[OURS] - 1))


def _ratio(seconds: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(other / own for other, own in zip(seconds, ours, strict=True))


def compiled_blocks(published: PublishedLoop, batch: LatentBatch, case: str, skipped: list[str]) -> list[Block] | None:
    """Return the published layers compiled, after a step that compiles them; None if this machine cannot."""
    try:
        blocks = published.compiled_blocks()
        published.step(batch, blocks)
    except RuntimeError as error:  # the base of torch's compiler errors
        if is_out_of_memory(error):
            raise
        skipped.append(f"{case}, layers compiled: torch.compile does not work here")
        return None
    return blocks


def measure_waiting(plan: WaitingPlan, steps: int, folder: Path) -> Waiting:
    """Return the time that steps waited for their batches; each is made while the step before it computes."""
    trainer = Trainer(write_latents(load_config(plan.config), folder, plan.batch, "auto"))
    our_step(trainer, 0)  # its batch was not prepared
    synchronise(trainer.device)
    progress, waited, started = Progress(steps, "step"), 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        waited += {name: float(value) for name, value in trainer.step(step).items()}["data_seconds"]
        progress.update()
    synchronise(trainer.device)
    seconds = time.perf_counter() - started
    progress.close()
    precision = str(trainer.dtype).removeprefix("torch.")
    return Waiting(f"{plan.name}, batch {plan.batch}, {precision}", steps, seconds / steps, waited / seconds)


def measure_extraction(plan: ExtractionPlan, images: int, folder: Path, device: torch.device) -> Extraction:
    """Write `images` files, extract them, and return how the seconds divide."""
    config = load_config(plan.config)
    known = load_tokenizer_config(tokenizer_config_path(config))
    write_pictures(folder / "images" / "class", plan, images)
    has_weights = known.ckpt_path is not None and Path(known.ckpt_path).is_file()
    weights = Path(known.ckpt_path) if has_weights else random_tokenizer(known, folder)
    tokenizer = VA_VAE(known, config.data.image_size, weights, device=device)
    tokenizer.encode_images(torch.zeros(1, 3, config.data.image_size, config.data.image_size))  # to warm up
    settings = ExtractionSettings(config.data.image_size, workers=default_workers(tokenizer.device, 1))
    result = extract(open_folder(folder / "images"), tokenizer, weights, folder / "latents", settings)
    return Extraction(f"{plan.name}, {plan.ending} files", result.made, result.seconds, result.shares)


def write_pictures(folder: Path, plan: ExtractionPlan, count: int) -> None:
    """Write `count` smooth random pictures."""
    folder.mkdir(parents=True)
    width, height = plan.size
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (height // DETAIL + 1, width // DETAIL + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(plan.size, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.{plan.ending}")


def random_tokenizer(config: TokenizerConfig, folder: Path) -> Path:
    """Write random weights of a tokenizer and return their file."""
    with without_values():
        model = AutoencoderKL(autoencoder_settings(config))
    path = folder / "tokenizer.safetensors"
    save_weights(random_weights(model).state_dict(), path)
    return path
