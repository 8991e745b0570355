"""The training of a tokenizer: its networks, one step of both optimizers, and a stage from its start to its files."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import inspect, save_weights, without_values
from LightningDiT.config import setting_differences
from LightningDiT.data.image_sets import ImageBatch, ImageSet, Unreadable, evenly_spaced
from LightningDiT.data.prefetching import StepPrefetcher, one_ahead
from LightningDiT.data.reading import ReadingProcesses
from LightningDiT.device import PRECISIONS, autocast, best_device, ready_for, sent_to_cpu, training_dtype
from LightningDiT.distributed import ALONE, Processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import save_reconstructions, to_float, to_uint8, with_channels
from LightningDiT.metrics.formulas import psnr, squared_error
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings, DiagonalGaussian
from LightningDiT.tokenizer.config import TokenizerConfig, TokenizerTrainConfig
from LightningDiT.tokenizer.criterion import Criterion, Pass
from LightningDiT.tokenizer.discriminator import smallest_side
from LightningDiT.tokenizer.losses import SMALLEST_TEXTURE_SIDE
from LightningDiT.tokenizer.perceptual import PUBLISHED_PREFIX as PERCEPTUAL_PREFIX
from LightningDiT.tokenizer.perceptual import SMALLEST_SIDE, PerceptualDistance, load_perceptual
from LightningDiT.tokenizer.starting_weights import StartingWeights, read_starting_weights, start_from
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.tokenizer.vision import VisionModel, create_model
from LightningDiT.training.ema import Ema
from LightningDiT.training.extraction import default_workers
from LightningDiT.training.guard import NotFiniteError, fetched
from LightningDiT.training.loop import LoopSettings, Monitor
from LightningDiT.training.loop import train as run_loop
from LightningDiT.training.run_dir import RunDir, load_optimizer, step_of
from LightningDiT.training.schedule import BatchOrder, learning_rate, process_rows, schedule_lengths

AVERAGE, BEST, TRAINED = "tokenizer.safetensors", "best.safetensors", "training.safetensors"
STEPS, SETTINGS = "steps", "settings"  # in the metadata of TRAINED
VALID = "valid_psnr"  # in the log and in the metadata of BEST, which has STEPS too
VALID_IMAGES = 256  # of a validation, at most, evenly spaced
PICTURE, PICTURE_IMAGES = "reconstructions.png", 8
LISTED_FILES = 5
IMAGE_CHANNELS = (1, 3)  # levels; red, green and blue
NOISE_STREAM, FLIP_STREAM = 1, 2  # second seeds; BatchOrder has 0
#: Fields that may change within a run; all others are compared with the checkpoint's.
FREE_FIELDS = {
    *("max_steps", "epochs", "weight_init", "lr", "beta1", "beta2", "warmup_steps", "decay_steps", "max_grad_norm"),
    *("ema_decay", "lpips_weights", "vision_weights", "log_every", "ckpt_every", "batch_size", "seed"),
}


@dataclass(frozen=True)
class Networks:
    """The networks of a training: the autoencoder, and the loss with its own networks."""

    model: AutoencoderKL
    criterion: Criterion


def build_networks(
    tokenizer: TokenizerConfig, config: TokenizerTrainConfig, processes: Processes = ALONE, starts: bool = True
) -> Networks:
    """Return the networks of a training, with random weights or those of `config.weight_init`.

    Args:
        starts: the run has no checkpoint yet. A resumed run does not need the file of `weight_init`.

    Raises:
        LightningDiTError: weights cannot be had, or do not fit the settings.
    """
    settings = autoencoder_settings(tokenizer)
    check_sizes(settings, config)
    path = config.weight_init
    if config.trainable == "decoder" and starts and not path:
        raise LightningDiTError(
            "train.trainable: decoder keeps an encoder, and no weights are named that have one",
            "give --init FILE, or set train.weight_init",
        )
    start = read_starting_weights(path) if path and (starts or Path(path).exists()) else None
    torch.manual_seed(config.seed)  # initial weights
    model = AutoencoderKL(settings)
    perceptual, vision = _perceptual(config, start), _vision(settings, config, start)
    criterion = Criterion(config, settings.embed_dim, vision, perceptual, tokenizer.reverse_proj)
    if start and starts:
        taken = [PERCEPTUAL_PREFIX] if perceptual and not config.lpips_weights and start.perceptual() else []
        taken += ["foundation_model."] if vision and not config.vision_weights and start.vision() else []
        lines = start_from(start, model, criterion, tuple(taken))
        processes.say("\n  ".join([f"starting from {path}", *lines]))
    return Networks(model, criterion)


def _perceptual(config: TokenizerTrainConfig, start: StartingWeights | None) -> PerceptualDistance | None:
    """Return LPIPS if it has a weight: from the file in the settings, else from the starting weights."""
    if not config.lpips_weight:
        return None
    inside = start.perceptual() if start and not config.lpips_weights else None
    return PerceptualDistance(inside, start.path) if inside else load_perceptual(config.lpips_weights)


def _vision(
    settings: AutoencoderSettings, config: TokenizerTrainConfig, start: StartingWeights | None
) -> VisionModel | None:
    """Return the vision model if the alignment has a weight; its own weights are found like those of LPIPS."""
    if not config.vf_weight:
        return None
    inside = start.vision() if start and not config.vision_weights else None
    source = start.path if inside else config.vision_weights
    model = create_model(config.vision_model or "", source, inside)
    grid = settings.resolution // settings.downsample_factor
    return VisionModel(model, grid, config.vision_size, config.vision_input == "published")


def check_sizes(settings: AutoencoderSettings, config: TokenizerTrainConfig) -> None:
    """Refuse an autoencoder that is not of images, and images too small for a network of the loss.

    Raises:
        LightningDiTError: names the key; or the smallest side, and the term to leave out.
    """
    for name in ("in_channels", "out_ch"):
        channels = getattr(settings, name)
        if channels not in IMAGE_CHANNELS:
            raise LightningDiTError(
                f"ddconfig.{name} is {channels}; images have {IMAGE_CHANNELS[1]} channels, levels {IMAGE_CHANNELS[0]}",
                f"set it to {IMAGE_CHANNELS[1]}",
            )
    if settings.in_channels != settings.out_ch:
        raise LightningDiTError(
            f"ddconfig.in_channels is {settings.in_channels} and ddconfig.out_ch {settings.out_ch}; both see the same"
            " images",
            "set both to the same number",
        )
    disc = f"a discriminator of {config.disc_layers} layers"
    for weight, least, network, fix in (
        (config.texture_weight, SMALLEST_TEXTURE_SIDE, "the energies of texture", "set train.texture_weight: 0"),
        (config.lpips_weight, SMALLEST_SIDE, "LPIPS", "set train.lpips_weight: 0"),
        (config.disc_weight, smallest_side(config.disc_layers), disc, "set train.disc_layers lower"),
    ):
        if weight and settings.resolution < least:
            raise LightningDiTError(
                f"images of {settings.resolution} pixels are too small for {network}, which needs {least}", fix
            )


def check_windows(settings: AutoencoderSettings, config: TokenizerTrainConfig, images: ImageSet) -> None:
    """Refuse windows of a size that the autoencoder does not give back, or that the vision model does not see.

    Raises:
        LightningDiTError: names the size, and what is expected.
    """
    height, width = images.batch([0]).pixels.shape[-2:]
    factor = settings.downsample_factor
    if height % factor or width % factor:
        near = "x".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise LightningDiTError(
            f"the windows of {images.source} have {width}x{height} pixels; sides that are multiples of {factor} are"
            " expected",
            f"write them again by step5_prepare_spectrograms.py --size {near}",
        )
    if config.vf_weight and (height, width) != (settings.resolution, settings.resolution):
        raise LightningDiTError(
            f"the windows of {images.source} have {width}x{height} pixels; the alignment needs those of"
            f" ddconfig.resolution, {settings.resolution}",
            "set train.vf_weight: 0",
        )
    check_sizes(replace(settings, resolution=min(height, width)), config)


class TokenizerTrainer:
    """Networks, average, optimizers and data of one run; `step` is one step of both optimizers.

    Args:
        images: cropped to the autoencoder's resolution.

    Attributes:
        unreadable: names of the images that could not be read so far; the next one stands in for each.
    """

    def __init__(
        self, config: TokenizerTrainConfig, networks: Networks, images: ImageSet, processes: Processes = ALONE
    ) -> None:
        self.config, self.images, self.processes = config, images, processes
        self.device = best_device()
        self.dtype = PRECISIONS.get(config.precision) or training_dtype(self.device)
        self.model, self.criterion = networks.model.to(self.device), networks.criterion.to_device(self.device)
        self.rows = process_rows(config.batch_size, processes.rank, processes.count)
        self.settings = run_settings(self.model.settings, config, images)
        self.order = BatchOrder(images.count, config.batch_size, config.seed)
        self.total_steps = total_steps(config, images)
        warmup, decay = schedule_lengths(config.warmup_steps, config.decay_steps or 0, self.total_steps, "train")
        self.lengths = (warmup, self.total_steps - warmup if config.decay_steps is None else decay)
        self.unreadable: set[str] = set()
        self._batches = StepPrefetcher(self._batches_from)
        self.ema, self.metadata = Ema(self.model, config.ema_decay), dict[str, str]()
        self.rate_scale, self.learning_rate = 1.0, 0.0
        if config.trainable == "decoder":
            for part in (self.model.encoder, self.model.quant_conv):
                part.requires_grad_(False)
        own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = [*own, *self.criterion.own_parameters()]
        self.optimizer = self._optimizer(self.trained)
        discriminator = self.criterion.discriminator
        self.disc_parameters = list(discriminator.parameters()) if discriminator else []
        self.statistics = list(discriminator.buffers()) if discriminator else []
        self.disc_optimizer = self._optimizer(self.disc_parameters) if self.disc_parameters else None

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        betas = (self.config.beta1, self.config.beta2)
        fused = self.device.type != "cpu"
        return torch.optim.AdamW(parameters, lr=self.config.lr, betas=betas, weight_decay=0.0, fused=fused)

    def step(self, step: int) -> Mapping[str, float]:
        """Take one step and return the loss terms, means over the processes.

        Raises:
            NotFiniteError: a loss or gradient is not finite; no weight and no statistic of a norm has changed.
        """
        started = time.monotonic()
        images = self._batch(step)
        waited = time.monotonic() - started
        self._set_rates(step)
        adversarial = self.criterion.is_adversarial(step)
        norms = [value.clone() for value in self.statistics]
        self._train_discriminator(False)  # the autoencoder's loss moves the autoencoder alone
        with autocast(self.device, self.dtype):
            result = self._forward(images, step)
            terms = self.criterion.autoencoder_loss(result, self.model, step)
        checks = {"reconstruction": result.reconstructions.mean(), "loss": terms["loss"]}
        checks["gradient of the loss"] = self._differentiate(terms["loss"], self.optimizer, self.trained)
        if adversarial and self.disc_optimizer:
            self._train_discriminator(True)
            with autocast(self.device, self.dtype):
                terms |= self.criterion.discriminator_loss(result)
            norm = self._differentiate(terms["disc"], self.disc_optimizer, self.disc_parameters)
            checks |= {"discriminator's loss": terms["disc"], "gradient of the discriminator's loss": norm}
        try:
            row = self._fetched(terms, checks, step)
        except NotFiniteError:
            for value, kept in zip(self.statistics, norms, strict=True):
                value.copy_(kept)
            raise
        if adversarial and self.disc_optimizer:
            self.disc_optimizer.step()
        self.optimizer.step()
        self.ema.update()
        return row | {"data_seconds": waited}

    def _fetched(self, terms: Mapping[str, Tensor], checks: Mapping[str, Tensor], step: int) -> dict[str, float]:
        """Return the terms as numbers, means over the processes; raise NotFiniteError for the first bad check."""
        values = torch.stack([value.detach().float() for value in (*checks.values(), *terms.values())])
        numbers = fetched(sent_to_cpu(self.processes.mean(values)))
        for name, number in zip(checks, numbers, strict=False):
            if not math.isfinite(number):
                raise NotFiniteError(name, step)
        return dict(zip(terms, numbers[len(checks) :], strict=True))

    def _batch(self, step: int) -> Tensor:
        """Return this process's images of a step, (N, C, H, W) in [-1, 1], with the autoencoder's channels."""
        batch = self._batches.at(step)
        self.unreadable |= {name for name, _ in batch.unreadable}
        pixels = self._sent(batch.pixels)
        if self.config.flip:
            draws = torch.rand(self.config.batch_size, generator=generator_for(self.config.seed, FLIP_STREAM, step))
            flipped = self._sent(draws[self.rows.start : self.rows.stop] < 0.5)
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        return with_channels(to_float(pixels), self.model.settings.in_channels)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the CPU on the device, without a wait."""
        return ready_for(self.device, tensor).to(self.device, non_blocking=True)

    def _batches_from(self, step: int) -> Iterator[ImageBatch]:
        """Return this process's images of a step and of all later ones."""
        rows = slice(self.rows.start, self.rows.stop)
        numbers = (number for at in itertools.count(step) for number in self.order.indices(at)[rows].tolist())
        return one_ahead(self.images.batches(numbers, len(self.rows), Unreadable.NEXT))

    def _set_rates(self, step: int) -> None:
        self.learning_rate = learning_rate(step, self.config.lr, *self.lengths, self.total_steps) * self.rate_scale
        for optimizer in (self.optimizer, self.disc_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = self.learning_rate

    def _train_discriminator(self, trains: bool) -> None:
        for parameter in self.disc_parameters:
            parameter.requires_grad_(trains)

    def _forward(self, images: Tensor, step: int) -> Pass:
        """Encode, draw and decode; the draws are those of the whole batch, whatever the number of processes."""
        with torch.set_grad_enabled(self.config.trainable == "all"):
            posterior = self.model.encode(images)
        posterior = DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())  # the KL is a sum of many terms
        shape = (self.config.batch_size, *posterior.mean.shape[1:])
        noise = torch.randn(shape, generator=generator_for(self.config.seed, NOISE_STREAM, step))
        noise = self._sent(noise[self.rows.start : self.rows.stop])
        latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise  # (N, C, h, w)
        return Pass(images, posterior, latents, self.model.decode(latents).float())

    def _differentiate(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Tensor:
        """Set the gradients of `loss`, mean over the processes and clipped; return the norm () that they had."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.processes.count > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            mean = self.processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            parts = mean.split([value.numel() for value in gradients])
            views = [part.view_as(gradient) for gradient, part in zip(gradients, parts, strict=True)]
            torch._foreach_copy_(gradients, views)
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        return nn.utils.clip_grad_norm_(parameters, limit)

    def weights(self) -> dict[str, Tensor]:
        """Return all that was trained under the published names, not averaged."""
        return {**self.model.state_dict(), **self.criterion.state_dict()}

    @torch.no_grad()
    def save_picture(self, path: Path, images: ImageSet | None = None) -> None:
        """Draw evenly spaced images above their reconstructions (of the posterior's mode) by the averaged weights.

        Args:
            images: by default those of the training.
        """
        images = images or self.images
        pixels = images.batch(evenly_spaced(images.count, PICTURE_IMAGES), Unreadable.NEXT).pixels
        originals = with_channels(to_float(pixels), self.model.settings.in_channels)
        save_reconstructions(to_uint8(originals), to_uint8(self._copied(self._averaged(), originals)), path)

    @torch.no_grad()
    def validate(self, images: ImageSet) -> float:
        """Return the mean PSNR in dB of up to `VALID_IMAGES` images, reconstructed by the averaged weights."""
        model, ratios = self._averaged(), []
        for batch in images.batches(evenly_spaced(images.count, VALID_IMAGES), len(self.rows), Unreadable.NEXT):
            originals = with_channels(to_float(batch.pixels), self.model.settings.in_channels)
            copies = self._copied(model, originals).clamp(-1, 1).cpu()
            ratios.append(psnr(squared_error(copies, originals)))
        return float(torch.cat(ratios).mean())

    def _averaged(self) -> AutoencoderKL:
        """Return the autoencoder with the averaged weights, in evaluation mode."""
        with without_values():
            model = AutoencoderKL(self.model.settings)
        model.load_state_dict(self.ema.weights, assign=True)
        return model.eval()

    def _copied(self, model: AutoencoderKL, originals: Tensor) -> Tensor:
        """Return the reconstructions of images (N, C, H, W) from the posterior's mode."""
        return model.decode(model.encode(originals.to(self.device)).mode())

    def state_dict(self) -> dict[str, object]:
        """Return everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "judges": self.disc_optimizer.state_dict() if self.disc_optimizer else {},  # as in older checkpoints
            "average": self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(state["criterion"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.disc_optimizer:
            load_optimizer(self.disc_optimizer, state["judges"])
        self.ema.load_state_dict(state["average"])


def total_steps(config: TokenizerTrainConfig, images: ImageSet) -> int:
    """Return the number of steps of a training."""
    return config.epochs * (images.count // config.batch_size) if config.epochs else config.max_steps


def run_settings(model: AutoencoderSettings, config: TokenizerTrainConfig, images: ImageSet) -> dict[str, object]:
    """Return what a run must have in common with what it goes on from."""
    values = {item.name: (getattr(config, item.name), item.default) for item in fields(config)}
    return {
        "autoencoder": repr(model),
        "batch": config.batch_size,
        "seed": config.seed,
        "images": images.count,
        "training": {
            name: value for name, (value, usual) in values.items() if name not in FREE_FIELDS and value != usual
        },
    }


@dataclass(frozen=True)
class Stage:
    """One training of a tokenizer.

    Attributes:
        tokenizer, config: its YAML, and how it is trained.
        images: see `TokenizerTrainer`.
        folder: of the checkpoints and results.
        max_steps: ends the training earlier than `config` does.
        valid: images that tell how good the reconstructions are, and train nothing.
    """

    tokenizer: TokenizerConfig
    config: TokenizerTrainConfig
    images: ImageSet
    folder: Path
    max_steps: int | None = None
    valid: ImageSet | None = None

    @property
    def steps(self) -> int:
        """The number of steps to take in all."""
        total = total_steps(self.config, self.images)
        return min(self.max_steps or total, total)

    def is_finished(self) -> bool:
        """Whether all steps were taken, and the result is there.

        Raises:
            LightningDiTError: the result is of other settings or images.
        """
        try:
            about = inspect(self.folder / TRAINED).metadata
        except LightningDiTError:  # missing; or damaged, and to be written again from the checkpoint
            return False
        settings = run_settings(autoencoder_settings(self.tokenizer), self.config, self.images)
        changed = setting_differences(json.loads(about.get(SETTINGS, "{}")), settings)
        if SETTINGS in about and changed:
            raise LightningDiTError(
                f"{self.folder} holds a stage of other settings ({'; '.join(changed)})", "choose another --output"
            )
        return int(about.get(STEPS, 0)) >= self.steps


def train_stage(stage: Stage, processes: Processes = ALONE) -> Path:
    """Train to the end of a stage and return the file of all that was trained, from which another stage can start.

    Raises:
        LightningDiTError: see `build_networks` and `training.loop.train`; or a process that read images has ended.
    """
    with ReadingProcesses(default_workers(best_device(), processes.count)) as readers:
        return _trained(replace(stage, images=stage.images.read_by(readers)) if readers.count else stage, processes)


def _trained(stage: Stage, processes: Processes) -> Path:
    config, folder = stage.config, stage.folder
    run = RunDir(folder, regular=config.ckpt_every, results=(AVERAGE, BEST, TRAINED, PICTURE))
    finished = folder / TRAINED
    starts = processes.from_main(lambda: run.newest() is None)
    if config.weight_init and not starts:
        processes.say(f"note: {folder} has checkpoints to go on from; {config.weight_init} is not read")
    networks = processes.agree(lambda: build_networks(stage.tokenizer, config, processes, starts))
    trainer = processes.agree(lambda: TokenizerTrainer(config, networks, stage.images, processes))
    settings = LoopSettings(stage.steps, config.batch_size, config.log_every, config.ckpt_every)
    looks = _Looks(trainer, folder, stage.valid)
    if stage.valid is not None and starts:
        processes.say(f"validation PSNR before the training: {processes.from_main(looks.measure):.2f} dB")

    def observe(step: int) -> dict[str, float]:
        return processes.from_main(lambda: looks.observe(step))

    average = run_loop(trainer, run, settings, AVERAGE, processes, [Monitor(config.ckpt_every, observe)])
    reached = max([stage.steps, *map(step_of, run.checkpoints())])  # an earlier call may have gone further
    about = {STEPS: str(reached), SETTINGS: json.dumps(trainer.settings)}
    processes.from_main(lambda: save_weights(trainer.weights(), finished, about))
    last = observe(stage.steps)
    if names := sorted(trainer.unreadable):
        listed = ", ".join(names[:LISTED_FILES]) + (", ..." if len(names) > LISTED_FILES else "")
        processes.say(f"passed over {len(names)} images that cannot be read: {listed}")
    if stage.valid is not None:
        best, at = processes.from_main(looks.best)
        processes.say(f"validation PSNR: {last[VALID]:.2f} dB at the end; best {best:.2f} dB at step {at} ({BEST})")
    processes.say(f"wrote {average}, {finished} (all that was trained, to go on from) and {folder / PICTURE}")
    return finished


@dataclass(frozen=True)
class _Looks:
    """What is looked at during a training: a picture, and with images for validation their PSNR and the best weights.

    Attributes:
        valid: see `Stage`.
    """

    trainer: TokenizerTrainer
    folder: Path
    valid: ImageSet | None

    def measure(self) -> float:
        """Return the validation PSNR in dB."""
        assert self.valid is not None
        return self.trainer.validate(self.valid)

    def best(self) -> tuple[float, int]:
        """Return the PSNR of the best weights so far, and their step; minus infinity without any."""
        try:
            about = inspect(self.folder / BEST).metadata
            return float(about[VALID]), int(about[STEPS])
        except (LightningDiTError, KeyError, ValueError):  # missing; or damaged, and to be written again
            return -math.inf, 0

    def observe(self, step: int) -> dict[str, float]:
        """Draw the picture, validate, and keep the averaged weights if they are the best so far."""
        self.trainer.save_picture(self.folder / PICTURE, self.valid)
        if self.valid is None:
            return {}
        ratio = self.measure()
        if ratio > self.best()[0]:
            save_weights(self.trainer.ema.weights, self.folder / BEST, {VALID: repr(ratio), STEPS: str(step)})
        return {VALID: ratio}
