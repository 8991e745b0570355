"""What is looked at while a network trains: validation loss, samples and their worth, all of the averaged weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from LightningDiT.compiling import PLAIN
from LightningDiT.config import Config
from LightningDiT.device import best_device
from LightningDiT.distributed import Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import image_grid, save_png
from LightningDiT.loading import Network, build_transport, check_latent_shape
from LightningDiT.sampling.null_row import null_failure_of
from LightningDiT.sampling.pipeline import LightningDiTPipeline, captions_of
from LightningDiT.sampling.views import views
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.training.judged_samples import JudgedSamples, Looks
from LightningDiT.training.latent_batches import (
    LatentBatches,
    has_cosine_loss,
    labels_of,
    not_augmented,
    open_shards,
    training_labels,
)
from LightningDiT.training.loop import Monitor

TIME_BINS = 10
LISTED = 4  # latents that are not finite
EXTRACT = "python -m LightningDiT.extract_features --help"
VALIDATION_STREAM = 3  # a second seed, beside those of latent_batches


def configured_monitors(
    config: Config,
    data: LatentBatches,
    averaged_model: Callable[[], Network],
    folder: Path,
    processes: Processes,
) -> list[Monitor]:
    """Return the monitors that the configuration asks for.

    Raises:
        LightningDiTError: a validation loss is asked for and there are no latents for it; or samples are to be judged
            and there are no windows for it.
    """
    train, monitors = config.train, []
    if train.valid_every:
        validation = Validation(config, data, averaged_model(), processes)
        monitors.append(Monitor(train.valid_every, validation.observe))
    if train.sample_every and processes.is_main:
        grids = SampleGrids(config, data, averaged_model(), folder / "samples")
        monitors.append(Monitor(train.sample_every, grids.observe))
    if train.judge_every:
        looks = Looks(lambda: _judged(config, data, averaged_model()), processes)
        monitors.append(Monitor(train.judge_every, looks.observe))
    return monitors


def _judged(config: Config, data: LatentBatches, model: Network) -> tuple[JudgedSamples, LightningDiTPipeline]:
    """Return the samples that looks judge, and the pipeline that draws them."""
    pipe = training_pipeline(config, data, model)
    if isinstance(pipe.tokenizer, LatentView):
        raise LightningDiTError(
            f"{config.source}: train.judge_every is {config.train.judge_every}, and no tokenizer draws the samples",
            "set vae.ckpt_path",
        )
    if pipe.config.sample.cfg_scale != 1 and (reason := _no_guidance(config)):
        print(f"note: looks sample without guidance: {reason}", flush=True)
        pipe = pipe.with_sample(replace(pipe.config.sample, cfg_scale=1.0))
    return JudgedSamples(config, pipe, config.train.judge_samples, config.train.global_seed), pipe


def _no_guidance(config: Config) -> str:
    """Return why a run's own samples cannot be guided by the null class, empty if they can."""
    if config.sample.guide_ckpt:
        return "that of sample.guide_ckpt is not used in a training"
    if config.train.label_dropout:
        return ""
    if not (source := config.train.weight_init):
        return "train.label_dropout 0 never trains the null class"
    return null_failure_of(Config(ckpt_path=source)) if Path(source).exists() else ""


class Validation:
    """The loss on latents that are not trained on, with times and noise that never change.

    Times are spread evenly over [0, 1], so that every bin has equally many; labels are never dropped.
    """

    def __init__(self, config: Config, data: LatentBatches, model: Network, processes: Processes) -> None:
        self.model, self.processes = model, processes
        self.transport, self.has_cosine_loss = build_transport(config), has_cosine_loss(config)
        self.chunk = config.train.micro_batch_size or len(data.rows)
        latents, self.labels = _validation_samples(config, data, processes)
        self.latents = data.stats.normalise(latents)
        self.times = (torch.arange(len(latents)) + 0.5) / len(latents)
        self.seed = config.train.global_seed

    def observe(self, step: int) -> dict[str, float]:
        """Return the mean loss, and its mean over each tenth of the times."""
        sums = torch.stack(self.processes.share(self._sums)).sum(0)  # (3, TIME_BINS): loss, cosine loss, count
        rows = {"valid_loss": sums[0].sum() / sums[2].sum()}
        if self.has_cosine_loss:
            rows["valid_cos_loss"] = sums[1].sum() / sums[2].sum()
        for index in range(TIME_BINS):
            if sums[2, index]:
                rows[f"valid_loss_t{index / TIME_BINS:.1f}"] = sums[0, index] / sums[2, index]
        return {name: float(value) for name, value in rows.items()}

    @torch.no_grad()
    def _sums(self) -> Tensor:
        """Return this process's sums (3, TIME_BINS) float64."""
        sums = torch.zeros(3, TIME_BINS, dtype=torch.float64)
        device = next(self.model.parameters()).device
        mine = torch.arange(self.processes.rank, len(self.times), self.processes.count)
        for rows in mine.split(self.chunk):
            noise = torch.stack([self._noise(int(row)) for row in rows]).to(device)
            losses = self.transport.training_losses(
                self.model,
                self.latents[rows].to(device),
                {"y": self.labels[rows].to(device)},
                x0=noise,
                t=self.times[rows],
            )
            bins = (self.times[rows] * TIME_BINS).long()
            values = [losses["loss"], losses.get("cos_loss", torch.zeros(len(rows))), torch.ones(len(rows))]
            for kind, value in enumerate(values):
                sums[kind].index_add_(0, bins, value.double().cpu())
        return sums

    def _noise(self, row: int) -> Tensor:
        return torch.randn(self.latents.shape[1:], generator=generator_for(self.seed, VALIDATION_STREAM, row))


def _validation_samples(config: Config, data: LatentBatches, processes: Processes) -> tuple[Tensor, Tensor]:
    """Return latents (N, C, h, w) and labels (N,) or (N, 2), spread evenly over those for validation.

    Augmented latents are left out, and those that are not finite, which a line names.
    """
    if config.data.valid_path:
        shards = open_shards(config, config.data.valid_path)
        numbers = torch.arange(len(shards))
    else:
        shards, numbers = data.shards, data.held_out
    numbers = not_augmented(shards, numbers)
    if not len(numbers):
        raise LightningDiTError(
            f"{config.source}: train.valid_every is {config.train.valid_every}; there are no latents to validate on",
            "set data.valid_path, or train.valid_share: 0.01",
        )
    count = min(len(numbers), config.train.valid_samples)
    numbers = numbers[torch.arange(count) * len(numbers) // count]
    latents, labels = shards.batch(numbers)[0], labels_of(config, shards, numbers)
    if config.data.valid_path:
        labels = training_labels(config, labels, processes.say)
    finite = latents.isfinite().flatten(1).all(1)  # (N,)
    if bool(finite.all()):
        return latents, labels
    names = ", ".join(shards.origin(number) for number in numbers[~finite].tolist()[:LISTED])
    if not bool(finite.any()):
        raise LightningDiTError(f"no latent for the validation loss is finite ({names})", EXTRACT)
    processes.say(f"note: {int((~finite).sum())} latents that are not finite are not validated on ({names})")
    return latents[finite], labels[finite]


class LatentView:
    """Stands in for a missing tokenizer: shows the first three channels, white at three standard deviations."""

    model = SimpleNamespace(decoder=nn.Identity())  # has nothing to compile

    def to(self, device: torch.device) -> LatentView:
        """Do nothing: there are no weights to move."""
        return self

    def decode(self, latents: Tensor, half: bool = False, tf32: bool = False) -> Tensor:
        """Return images (N, 3, h, w) of normalised latents (N, C, h, w), in float32 whatever is asked."""
        return (latents[:, torch.arange(3) % latents.shape[1]] / 3).clamp(-1, 1)


def training_pipeline(config: Config, data: LatentBatches, model: Network) -> LightningDiTPipeline:
    """Return the pipeline of a run's averaged weights, by the solver `fast`."""
    sample = replace(config.sample, mode="ODE", sampling_method="fast", solver_file=None, guide_ckpt=None)
    # a model in `ckpt_path` is that of an earlier run, whose classes may be others
    settings = replace(config, sample=replace(sample, reverse=False, compile="off"), ckpt_path=None, adapter_path=None)
    return LightningDiTPipeline(
        model, open_tokenizer(config, data), build_transport(config), settings, best_device(), torch.float32
    )


class SampleGrids:
    """Images from noise, classes and conditions that never change, by the solver `fast`."""

    def __init__(self, config: Config, data: LatentBatches, model: Network, folder: Path) -> None:
        self.folder = folder
        count = config.train.sample_count
        self.classes = [index * config.data.num_classes // count for index in range(count)]
        self.pipe = training_pipeline(config, data, model)
        many = config.data.num_conditions
        self.conditions = [index % many for index in range(count)] if many else None
        self.captions = captions_of(self.pipe, self.classes, self.conditions)
        self.seed = config.train.global_seed

    def observe(self, step: int) -> dict[str, float]:
        """Write the grid of `step`; if samples are not finite, say so and go on."""
        try:
            with warnings.catch_warnings(), self.pipe.settled(PLAIN, "training"):  # no graph keeps a training's memory
                warnings.simplefilter("ignore")
                drawn = self.pipe(self.classes, seed=self.seed, output_type="pt", conditions=self.conditions).images
        except LightningDiTError as error:
            print(f"note: no samples at step {step}: {error.message}", flush=True)
            return {}
        grid = image_grid(views(drawn), self.captions, spares=[f"class {label}" for label in self.classes])
        save_png(grid, self.folder / f"step-{step:07d}.png")
        return {}


def open_tokenizer(config: Config, data: LatentBatches) -> Any:
    """Return the tokenizer whose weights the configuration names, or without weights a `LatentView`."""
    tokenizer = load_tokenizer_config(tokenizer_config_path(config))
    weights = config.vae.ckpt_path or tokenizer.ckpt_path
    if not weights or not Path(weights).is_file():
        print("note: no tokenizer weights are named (vae.ckpt_path); samples show latents", flush=True)
        return LatentView()
    check_latent_shape(config, tokenizer)
    return VA_VAE(tokenizer, config.data.image_size, config.vae.ckpt_path, data.stats, best_device())
