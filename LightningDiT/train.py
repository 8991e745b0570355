"""Train LightningDiT on latent shards: `python -m LightningDiT.train --config C`.

The run lies in `train.output_dir`/`train.exp_name`: checkpoints, log, and in the end the averaged weights. A
run that was stopped goes on from its newest checkpoint when the command is given again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from LightningDiT import training
from LightningDiT.checkpoint import load_into, load_weights
from LightningDiT.config import Config, as_dict, load_config
from LightningDiT.console import run_main
from LightningDiT.data.shards import LatentShards
from LightningDiT.device import autocast, best_device, training_dtype
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.pipeline import build_transport, model_settings
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.training import BatchOrder, Ema, RunFolder, Schedule, learning_rate, require_finite

LABEL_DROPOUT = 0.1  # share of labels that become the null class, so that guidance can be learnt


class Trainer:
    """Model, average, optimizer and data of one run; `step` is one optimizer step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = best_device()
        self.dtype = training_dtype(self.device)
        self.shards, self.stats = open_latents(config)
        train = config.train
        self.order = BatchOrder(len(self.shards), train.global_batch_size, train.global_seed)
        torch.manual_seed(train.global_seed)  # initial weights
        # labels are dropped here, by a generator of the step, and not by the model's own dice
        model = LightningDiT(model_settings(config), class_dropout_prob=0.0)
        if train.weight_init:
            load_into(model, load_weights(train.weight_init), train.weight_init)
        self.model = model.float().to(self.device)
        self.settings = {
            "model": as_dict(config.model),
            "transport": as_dict(config.transport),
            "batch": train.global_batch_size,
            "seed": train.global_seed,
            "latents": [*self.shards.shape, len(self.shards)],
        }
        self.ema = Ema(self.model, train.ema_decay)
        self.transport = build_transport(config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.lr,
            betas=(0.9, config.optimizer.beta2),
            weight_decay=0.0,
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        """Return normalised latents (B, C, h, w), labels (B,) with dropped ones, and the step's generator."""
        indices = self.order.indices(step)
        generator = generator_for(self.config.train.global_seed, 1, step)
        flips = torch.rand(len(indices), generator=generator) < 0.5
        latents, labels = self.shards.batch(indices, flips)
        dropped = torch.rand(len(indices), generator=generator) < LABEL_DROPOUT
        labels = torch.where(dropped, self.model.null_class, labels)
        return self.stats.normalise(latents).to(self.device), labels.to(self.device), generator

    def step(self, step: int) -> Mapping[str, Tensor]:
        """Take one optimizer step and return the loss terms."""
        train, optimizer = self.config.train, self.config.optimizer
        latents, labels, generator = self.batch(step)
        rate = learning_rate(step, optimizer.lr, train.warmup_steps, train.decay_steps, train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.device, self.dtype):
            losses = self.transport.training_losses(self.model, latents, {"y": labels}, generator=generator)
        terms = {name: losses[name].mean() for name in ("loss", "cos_loss") if name in losses}
        total = torch.stack(list(terms.values())).sum()
        require_finite("loss", total, step)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        limit = math.inf if optimizer.max_grad_norm is None else optimizer.max_grad_norm
        require_finite("gradient", nn.utils.clip_grad_norm_(self.model.parameters(), limit), step)
        self.optimizer.step()
        self.ema.update(self.model)
        return terms

    def state_dict(self) -> dict[str, object]:
        """Return everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.weights,
            "ema_steps": self.ema.steps,
            "opt": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict({"weights": state["ema"], "steps": state["ema_steps"]})
        self.optimizer.load_state_dict(state["opt"])


def open_latents(config: Config) -> tuple[LatentShards, LatentStats]:
    """Return the shards in `data.data_path` and their statistics.

    Raises:
        LightningDiTError: there are none, or their shape or labels are not the configuration's.
    """
    data = config.data
    if not data.data_path:
        raise LightningDiTError(f"{config.source} names no data.data_path", "python -m LightningDiT.extract_features")
    shards = LatentShards(data.data_path)
    side = data.image_size // config.vae.downsample_ratio
    wanted = (config.model.in_chans, side, side)
    if shards.shape != wanted:
        raise LightningDiTError(
            f"latents in {data.data_path} have the shape {shards.shape}; {config.source} expects {wanted}",
            "extract them with the tokenizer of this configuration",
        )
    largest = int(shards.labels.max())
    if largest >= data.num_classes:
        raise LightningDiTError(
            f"latents in {data.data_path} have the label {largest}; data.num_classes is {data.num_classes}",
            f"set data.num_classes: {largest + 1} in {config.source}",
        )
    if not data.latent_norm:
        return shards, LatentStats.identity(shards.shape[0])
    stats = LatentStats.load(Path(data.data_path) / "latents_stats.pt", shards.shape[0], data.latent_multiplier)
    return shards, stats


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.train", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the published schema")
    parser.add_argument("--data-path", help="folder of shards and statistics, in place of data.data_path")
    parser.add_argument("--output", help="folder of the run, in place of train.output_dir/exp_name")
    parser.add_argument("--dry-run", action="store_true", help="print the settings and end")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_config(args.config)
    if args.data_path:
        config = replace(config, data=replace(config.data, data_path=args.data_path))
    train = config.train
    print(f"settings: {model_settings(config)}\n          {train}\n          {config.optimizer}")
    print("".join(f"note: {note}\n" for note in config.notes), end="")
    if args.dry_run:
        return 0
    run = RunFolder(args.output or Path(train.output_dir) / train.exp_name)
    schedule = Schedule(
        train.max_steps, train.global_batch_size, train.log_every, train.ckpt_every, resume=train.resume
    )
    weights = training.train(Trainer(config), run, schedule, "transformer.safetensors")
    print(f"wrote {weights}")
    print(f"Next: set ckpt_path: {weights} in {args.config}, and python -m LightningDiT.inference --config C --demo")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
