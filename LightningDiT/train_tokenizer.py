"""Train the tokenizer: `python -m LightningDiT.train_tokenizer --config tokenizer.yaml --data-root FOLDER`.

The loss is that of VA-VAE: L1, L2, LPIPS, KL, an adversarial term and the alignment with a vision model, each with its
weight in the YAML's `train` section or in the published `lossconfig`. Several YAMLs are stages, each of which starts
from the weights of the one before; `--stages` is the three published ones. A run that was stopped goes on from its
newest checkpoint when the command is given again. docs/tokenizer.md says more.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import inspect, save_weights, without_values
from LightningDiT.config import setting_differences
from LightningDiT.console import run_main
from LightningDiT.data.images import fashion_mnist, pad_to_32, shown
from LightningDiT.data.photographs import Photographs
from LightningDiT.device import PRECISIONS, autocast, best_device, training_dtype
from LightningDiT.distributed import ALONE, Processes, launched_processes
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import centre_crop, image_grid, save_png, to_pil, to_uint8
from LightningDiT.sampling.options import positive
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL, AutoencoderSettings, DiagonalGaussian
from LightningDiT.tokenizer.config import (
    TOKENIZER_CONFIGS,
    TokenizerConfig,
    TokenizerTrainConfig,
    load_tokenizer_config,
    tokenizer_training,
)
from LightningDiT.tokenizer.criterion import Criterion, Pass
from LightningDiT.tokenizer.discriminator import smallest_side
from LightningDiT.tokenizer.perceptual import PUBLISHED_PREFIX as PERCEPTUAL_PREFIX
from LightningDiT.tokenizer.perceptual import SMALLEST_SIDE, PerceptualDistance, load_perceptual
from LightningDiT.tokenizer.starting_weights import StartingWeights, read_starting_weights, start_from
from LightningDiT.tokenizer.vavae import autoencoder_settings
from LightningDiT.tokenizer.vision import VisionModel, create_model
from LightningDiT.training.ema import Ema
from LightningDiT.training.guard import require_finite
from LightningDiT.training.loop import LoopSettings, Monitor
from LightningDiT.training.loop import train as run_loop
from LightningDiT.training.run_dir import RunDir, step_of
from LightningDiT.training.schedule import BatchOrder, learning_rate, process_rows

STAGES = tuple(TOKENIZER_CONFIGS / f"vavae_f16d32_stage{number}.yaml" for number in (1, 2, 3))
AVERAGE, TRAINED = "tokenizer.safetensors", "training.safetensors"
STEPS, SETTINGS = "steps", "settings"  # in the metadata of TRAINED: how far, and with what it was trained
PICTURE, PICTURE_IMAGES = "reconstructions.png", 8
LISTED_FILES = 5
IMAGE_CHANNELS = 3  # red, green and blue
NOISE_STREAM, FLIP_STREAM = 1, 2  # second seeds; BatchOrder has 0
#: Fields that a run may change when it goes on; all others are compared with the checkpoint's.
FREE_FIELDS = {
    *("max_steps", "epochs", "weight_init", "lr", "beta1", "beta2", "warmup_steps", "decay_steps", "max_grad_norm"),
    *("ema_decay", "lpips_weights", "vision_weights", "log_every", "ckpt_every", "batch_size", "seed"),
}


#: Fields that the command line can set for all stages.
OPTIONS = ("batch_size", "lpips_weights", "vision_weights")


class Images(Protocol):
    """Images of one size by number.

    Attributes:
        unreadable: files that no image could be made of so far.
    """

    unreadable: Collection[Path]

    def __len__(self) -> int:
        """Return how many there are."""

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return images (N, 3, H, W) float32 in [-1, 1]."""

    def expect(self, indices: Sequence[int]) -> None:
        """Prepare what the next call of `batch` asks for."""


class Garments:
    """The training photographs of Fashion-MNIST, 32x32 pixels with their border."""

    side = 32
    unreadable: Collection[Path] = ()

    def __init__(self, root: str | Path) -> None:
        self.images, _ = fashion_mnist(root, train=True)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return images (N, 3, 32, 32) float32 in [-1, 1]."""
        return pad_to_32(self.images[torch.as_tensor(indices)])

    def expect(self, indices: Sequence[int]) -> None:
        """There is nothing to prepare: all images are in memory."""


@dataclass(frozen=True)
class Networks:
    """What one training has of networks.

    Attributes:
        model: the autoencoder.
        criterion: the loss with its own networks.
    """

    model: AutoencoderKL
    criterion: Criterion


def build_networks(
    tokenizer: TokenizerConfig, config: TokenizerTrainConfig, processes: Processes = ALONE, starts: bool = True
) -> Networks:
    """Return the networks of a training, with random weights or those of `config.weight_init`.

    Args:
        starts: the run has no checkpoint yet, so that starting weights are wanted; else the file may have gone.

    Raises:
        LightningDiTError: weights cannot be had, or are not those that the settings ask for.
    """
    settings = autoencoder_settings(tokenizer)
    check_sizes(settings, config)
    path = config.weight_init
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
    """Return LPIPS where it has a weight, of the file in the settings, else of the starting weights."""
    if not config.lpips_weight:
        return None
    inside = start.perceptual() if start and not config.lpips_weights else None
    return PerceptualDistance(inside, start.path) if inside else load_perceptual(config.lpips_weights)


def _vision(
    settings: AutoencoderSettings, config: TokenizerTrainConfig, start: StartingWeights | None
) -> VisionModel | None:
    """Return the vision model where the alignment has a weight; its weights are found as those of LPIPS."""
    if not config.vf_weight:
        return None
    inside = start.vision() if start and not config.vision_weights else None
    source = start.path if inside else config.vision_weights
    model = create_model(config.vision_model or "", source, inside)
    grid = settings.resolution // settings.downsample_factor
    return VisionModel(model, grid, config.vision_size, config.vision_input == "published")


def check_sizes(settings: AutoencoderSettings, config: TokenizerTrainConfig) -> None:
    """Refuse an autoencoder of other images than those in colour, and images too small for a network of the loss.

    Raises:
        LightningDiTError: names the key; or the least size, and what to do without.
    """
    for name in ("in_channels", "out_ch"):
        if (channels := getattr(settings, name)) != IMAGE_CHANNELS:
            raise LightningDiTError(
                f"ddconfig.{name} is {channels}; images have {IMAGE_CHANNELS} channels", f"set it to {IMAGE_CHANNELS}"
            )
    for weight, least, network, fix in (
        (config.lpips_weight, SMALLEST_SIDE, "LPIPS", "set train.lpips_weight: 0"),
        (
            config.disc_weight,
            smallest_side(config.disc_layers),
            f"a discriminator of {config.disc_layers} layers",
            "set train.disc_layers lower",
        ),
    ):
        if weight and settings.resolution < least:
            raise LightningDiTError(
                f"images of {settings.resolution} pixels are too small for {network}, which needs {least}", fix
            )


class TokenizerTrainer:
    """Networks, average, optimizers and data of one run; `step` is one step of both optimizers."""

    def __init__(
        self, config: TokenizerTrainConfig, networks: Networks, images: Images, processes: Processes = ALONE
    ) -> None:
        self.config, self.images, self.processes = config, images, processes
        self.device = best_device()
        self.dtype = PRECISIONS.get(config.precision) or training_dtype(self.device)
        self.model, self.criterion = networks.model.to(self.device), networks.criterion.to_device(self.device)
        self.rows = process_rows(config.batch_size, processes.rank, processes.count)
        self.settings = run_settings(self.model.settings, config, images)
        self.order = BatchOrder(len(images), config.batch_size, config.seed)
        self.total_steps = total_steps(config, len(images))
        self.ema = Ema(self.model, config.ema_decay)
        self.rate_scale = 1.0
        self.trained = [*self.model.parameters(), *self.criterion.own_parameters()]
        self.optimizer = self._optimizer(self.trained)
        discriminator = self.criterion.discriminator
        self.judges = list(discriminator.parameters()) if discriminator else []
        self.judges_optimizer = self._optimizer(self.judges) if self.judges else None

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        betas = (self.config.beta1, self.config.beta2)
        return torch.optim.AdamW(parameters, lr=self.config.lr, betas=betas, weight_decay=0.0)

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Take one step and return the loss terms; no weight has changed where NotFiniteError is raised."""
        started = time.monotonic()
        images = self._batch(step)
        waited = time.monotonic() - started
        self._set_rates(step)
        adversarial = self.criterion.is_adversarial(step)
        for judge in self.judges:
            judge.requires_grad_(False)  # the autoencoder's loss moves the autoencoder alone
        with autocast(self.device, self.dtype):
            result = self._forward(images, step)
            self._require_finite("reconstruction", result.reconstructions.mean(), step)
            terms = self.criterion.autoencoder_loss(result, self.model, step)
        self._differentiate("loss", terms["loss"], self.optimizer, self.trained, step)
        if adversarial and self.judges_optimizer:
            for judge in self.judges:
                judge.requires_grad_(True)
            with autocast(self.device, self.dtype):
                judged = self.criterion.discriminator_loss(result)
            self._differentiate("discriminator's loss", judged["disc"], self.judges_optimizer, self.judges, step)
            self.judges_optimizer.step()
            terms |= judged
        self.optimizer.step()
        self.ema.update(self.model)
        return {name: term.detach() for name, term in terms.items()} | {"data_seconds": waited}

    def _batch(self, step: int) -> Tensor:
        """Return this process's rows of a step's images, and let those of the next step be prepared."""
        images = self.images.batch(self._indices(step))
        if self.config.flip:
            draws = torch.rand(self.config.batch_size, generator=generator_for(self.config.seed, FLIP_STREAM, step))
            flipped = draws[self.rows.start : self.rows.stop] < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        self.images.expect(self._indices(step + 1))
        return images.to(self.device)

    def _indices(self, step: int) -> list[int]:
        return self.order.indices(step)[self.rows.start : self.rows.stop].tolist()

    def _set_rates(self, step: int) -> None:
        config, total = self.config, self.total_steps
        decay = total - config.warmup_steps if config.decay_steps is None else config.decay_steps
        rate = learning_rate(step, config.lr, config.warmup_steps, decay, total) * self.rate_scale
        for optimizer in (self.optimizer, self.judges_optimizer):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = rate

    def _forward(self, images: Tensor, step: int) -> Pass:
        """Encode, draw and decode; the draws are those of the whole batch, whatever the number of processes."""
        posterior = self.model.encode(images)
        posterior = DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())  # the KL is a sum of many terms
        shape = (self.config.batch_size, *posterior.mean.shape[1:])
        noise = torch.randn(shape, generator=generator_for(self.config.seed, NOISE_STREAM, step))
        noise = noise[self.rows.start : self.rows.stop].to(posterior.mean)
        latents = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise  # (N, C, h, w)
        return Pass(images, posterior, latents, self.model.decode(latents).float())

    def _differentiate(
        self, name: str, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int
    ) -> None:
        """Set the gradients of `loss`, mean over the processes and clipped; raises NotFiniteError."""
        self._require_finite(name, loss, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.processes.count > 1:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            mean = self.processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, mean.split([value.numel() for value in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        require_finite(f"gradient of the {name}", nn.utils.clip_grad_norm_(parameters, limit), step)

    def _require_finite(self, name: str, value: Tensor, step: int) -> None:
        """Raise NotFiniteError in every process where `value` is not finite in one."""
        require_finite(name, self.processes.mean(value.detach().float()), step)

    def weights(self) -> dict[str, Tensor]:
        """Return all that was trained under the published names, as it stands and not averaged."""
        return {**self.model.state_dict(), **self.criterion.state_dict()}

    def picture(self, path: Path) -> None:
        """Draw the first images above their reconstructions by the averaged weights."""
        with without_values():
            model = AutoencoderKL(self.model.settings)
        model.load_state_dict(self.ema.weights, assign=True)
        images = self.images.batch(range(min(PICTURE_IMAGES, len(self.images))))
        save_reconstructions(images, reconstruct(model.eval(), images.to(self.device)).cpu(), path)

    def state_dict(self) -> dict[str, object]:
        """Return everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "criterion": self.criterion.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "judges": self.judges_optimizer.state_dict() if self.judges_optimizer else {},
            "average": self.ema.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # else it goes on reading the file
        if self.judges_optimizer:
            self.judges_optimizer.load_state_dict(copy.deepcopy(state["judges"]))
        self.ema.load_state_dict(state["average"])


def total_steps(config: TokenizerTrainConfig, images: int) -> int:
    """Return how many steps a training on so many images takes."""
    return config.epochs * (images // config.batch_size) if config.epochs else config.max_steps


def run_settings(model: AutoencoderSettings, config: TokenizerTrainConfig, images: Images) -> dict[str, object]:
    """Return what a run must have in common with what it goes on from."""
    return {
        "autoencoder": repr(model),
        "batch": config.batch_size,
        "seed": config.seed,
        "images": len(images),
        "training": changed_fields(config),
    }


def changed_fields(config: TokenizerTrainConfig) -> dict[str, object]:
    """Return what differs from the defaults, apart from `FREE_FIELDS`."""
    values = {item.name: (getattr(config, item.name), item.default) for item in fields(config)}
    return {name: value for name, (value, usual) in values.items() if name not in FREE_FIELDS and value != usual}


@torch.no_grad()
def reconstruct(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return images (N, 3, H, W) after encoding (the posterior's mode) and decoding."""
    return model.decode(model.encode(images).mode())


def save_reconstructions(originals: Tensor, copies: Tensor, path: Path) -> None:
    """Draw originals (N, 3, H, W) in [-1, 1] in a row above their reconstructions."""
    save_png(image_grid(to_pil(to_uint8(torch.cat([originals, copies])).numpy()), None, len(originals)), path)


def open_images(args: argparse.Namespace, side: int) -> Images:
    """Return the training images that the command line names, `side` pixels high and wide.

    Raises:
        LightningDiTError: there are none, or they have another size.
    """
    if args.images:
        return Photographs(args.images, partial(centre_crop, size=side))
    if side != Garments.side:
        raise LightningDiTError(
            f"the tokenizer is for images of {side} pixels, those of Fashion-MNIST have {Garments.side}",
            "name a folder of photographs by --images, or set ddconfig.resolution: 32",
        )
    return Garments(args.data_root)


def stage_config(
    tokenizer: TokenizerConfig, args: argparse.Namespace, before: Path | None = None
) -> TokenizerTrainConfig:
    """Return how one stage is trained: its YAML, the command line, and the weights of the stage before."""
    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    config = replace(tokenizer_training(tokenizer), **given)
    if before or args.init:
        config = replace(config, weight_init=str(before or args.init))
    return replace(config, lpips_weight=0.0) if args.without_lpips else config


def run_stage(
    tokenizer: TokenizerConfig, args: argparse.Namespace, folder: Path, before: Path | None, processes: Processes
) -> Path:
    """Train one stage in `folder` and return the file of all that was trained, for the stage after it."""
    config = processes.agree(lambda: stage_config(tokenizer, args, before))
    if tokenizer_training(tokenizer).lpips_weight > config.lpips_weight:
        processes.say("note: training goes without LPIPS: L1 and L2 alone hold the image, and textures blur")
    run, finished = RunDir(folder, regular=config.ckpt_every), folder / TRAINED
    images = processes.agree(lambda: open_images(args, autoencoder_settings(tokenizer).resolution))
    starts = processes.from_main(lambda: run.newest() is None)
    if args.init and not before and not starts:
        processes.say(f"note: {folder} has checkpoints to go on from, so that --init is not read")
    networks = processes.agree(lambda: build_networks(tokenizer, config, processes, starts))
    trainer = processes.agree(lambda: TokenizerTrainer(config, networks, images, processes))
    steps = min(args.max_steps or trainer.total_steps, trainer.total_steps)
    settings = LoopSettings(steps, config.batch_size, config.log_every, config.ckpt_every)

    def look(step: int) -> dict[str, float]:
        processes.from_main(lambda: trainer.picture(folder / PICTURE))
        return {}

    average = run_loop(trainer, run, settings, AVERAGE, processes, [Monitor(config.ckpt_every, look)])
    reached = max([steps, *map(step_of, run.checkpoints())])  # `--max-steps` may be less than what is done already
    about = {STEPS: str(reached), SETTINGS: json.dumps(trainer.settings)}
    processes.from_main(lambda: save_weights(trainer.weights(), finished, about))
    look(steps)
    if images.unreadable:
        processes.say(f"passed over {len(images.unreadable)} files that are no images: {listed(images.unreadable)}")
    processes.say(f"wrote {average}, {finished} (all that was trained, to go on from) and {folder / PICTURE}")
    return finished


def listed(paths: Collection[Path]) -> str:
    """Return the first of some paths as text."""
    names = [shown(path) for path in sorted(paths)]
    return ", ".join(names[:LISTED_FILES]) + (", ..." if len(names) > LISTED_FILES else "")


def is_finished(tokenizer: TokenizerConfig, args: argparse.Namespace, folder: Path) -> bool:
    """Whether a stage was trained to its end, or to where `--max-steps` cuts it short.

    Raises:
        LightningDiTError: it was trained with other settings or images.
    """
    try:
        about = inspect(folder / TRAINED).metadata
    except LightningDiTError:  # not there yet; or damaged, and written again from the checkpoint
        return False
    config = stage_config(tokenizer, args)
    model = autoencoder_settings(tokenizer)
    images = open_images(args, model.resolution)
    changed = setting_differences(json.loads(about.get(SETTINGS, "{}")), run_settings(model, config, images))
    if SETTINGS in about and changed:
        raise LightningDiTError(
            f"{folder} holds a stage of other settings ({'; '.join(changed)})", "choose another --output"
        )
    total = total_steps(config, len(images))
    return int(about.get(STEPS, 0)) >= min(args.max_steps or total, total)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.train_tokenizer", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", nargs="+", help="tokenizer YAML (model.params and train); several are stages")
    what.add_argument("--stages", dest="config", action="store_const", const=STAGES, help="the three published stages")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data-root", default="data/fashion-mnist", help="folder of Fashion-MNIST")
    source.add_argument("--images", help="folder of images, at any depth below it")
    parser.add_argument("--output", default="output/tokenizer", help="folder of checkpoints and log; stage1, ... in it")
    parser.add_argument(
        "--init", metavar="FILE", help="weights to start from, in place of train.weight_init of the first stage"
    )
    parser.add_argument("--batch-size", type=positive, help="in place of train.batch_size")
    parser.add_argument("--lpips-weights", metavar="FILE", help="in place of train.lpips_weights")
    parser.add_argument("--vision-weights", metavar="FILE", help="in place of train.vision_weights")
    parser.add_argument("--max-steps", type=positive, help="stop (each stage) earlier than the YAML says")
    parser.add_argument("--without-lpips", action="store_true", help="leave LPIPS out, whatever its weight")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    with launched_processes(on_gpus=best_device().type != "cpu") as processes:
        stages = processes.agree(lambda: [load_tokenizer_config(path) for path in args.config])
        for tokenizer in stages:
            processes.say(f"settings: {autoencoder_settings(tokenizer)}\n          {tokenizer_training(tokenizer)}")
        if args.dry_run:
            return 0
        before: Path | None = None
        for number, tokenizer in enumerate(stages, 1):
            folder = Path(args.output) / f"stage{number}" if len(stages) > 1 else Path(args.output)
            if len(stages) > 1:
                processes.say(f"stage {number} of {len(stages)}: {tokenizer.source}")
            if number < len(stages) and processes.from_main(partial(is_finished, tokenizer, args, folder)):
                processes.say(f"it is finished: {folder / TRAINED}")
                before = folder / TRAINED
                continue
            before = run_stage(tokenizer, args, folder, before, processes)
        command = f"--config {stages[-1].source} --weights {folder / AVERAGE}"
        processes.say(f"Next: python -m LightningDiT.evaluate_tokenizer {command} --images FOLDER")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
