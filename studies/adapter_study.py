"""What a training of few images gains from adapters: `python -m studies.adapter_study --help`.

The bundled model is trained further on windows of simulated walkers, whole passes of whom are held out. One part
compares where new classes start (`train.new_classes`), the other what is trained (`train.trainable`). Each training is
a process of its own with one thread. Speed is by the time of its core, so that other programs do not change it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from LightningDiT.config import Config, load_config
from LightningDiT.console import positive, run_main, seed_number
from LightningDiT.data.fashion_mnist import fashion_mnist, pad_to_32
from LightningDiT.data.shards import shard_path, write_shard
from LightningDiT.distributed import ALONE
from LightningDiT.loading import STATS_NAME, load_stats
from LightningDiT.radar.recording import Cutting, recording
from LightningDiT.radar.sensor import Sensor
from LightningDiT.tokenizer.config import tokenizer_config_path
from LightningDiT.tokenizer.vavae import VA_VAE
from LightningDiT.training.monitors import Validation
from LightningDiT.training.trainable import ALL
from LightningDiT.training.transformer_training import Trainer
from studies.pages import Figures, run_parts

SHOWN = 45.0  # dB of a window, as in the simulator's pictures
STARTS = ("null", "mean", "random")
#: What is trained, and the learning rates of which the better one by the held-out loss is shown.
PARTS = {"all": (3e-4, 1e-3), "lora": (1e-3, 3e-3), "bias": (1e-3, 3e-3)}
PARTS_START = "null"  # of the new classes in these trainings
MEGABYTE = 1e6


def walkers(people: int, windows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows (N, 1, 32, 32) in [-1, 1], the person of each (N,), and whether it is held out (N,).

    Held out is the last pass of each person.
    """
    pictures, persons, held_out = [], [], []
    for person in range(people):
        found = list(recording(seed, person, 0, windows, Sensor(), Cutting()))
        last = max(window.pass_ for window, _ in found)
        for window, decibels in found:
            share = torch.from_numpy(np.clip(1 + (decibels - decibels.max()) / SHOWN, 0, 1))[None, None]
            pictures.append(F.interpolate(share, (32, 32), mode="bilinear", antialias=True) * 2 - 1)
            persons.append(person)
            held_out.append(window.pass_ == last)
    return torch.cat(pictures).float(), torch.tensor(persons), torch.tensor(held_out)


def photographs(root: str, windows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return photographs (N, 1, 32, 32) in [-1, 1] of nine classes of Fashion-MNIST, their classes, and held-out ones.

    The model knows these pictures, and has to learn what their classes are called. Half of them is held out.
    """
    images, labels = fashion_mnist(root, train=False)
    draws = torch.Generator().manual_seed(seed)
    rows = torch.cat([(labels == kind).nonzero().flatten()[:windows] for kind in range(9)])
    held_out = torch.rand(len(rows), generator=draws) < 0.5
    return pad_to_32(images[rows])[:, :1], labels[rows], held_out


def write_latents(folder: Path, config: Config, args: argparse.Namespace) -> None:
    """Write the latents of walkers by the bundled tokenizer: `folder`/train and `folder`/held."""
    if args.data_root:
        images, labels, held_out = photographs(args.data_root, args.windows, args.seed)
    else:
        images, labels, held_out = walkers(args.people, args.windows, args.seed)
    stats = load_stats(config)
    tokenizer = VA_VAE(tokenizer_config_path(config), config.data.image_size, config.vae.ckpt_path, stats, "cpu")
    latents = tokenizer.encode_images(images.expand(-1, 3, -1, -1), sample=False)
    for name, rows in (("train", ~held_out), ("held", held_out)):
        write_shard(shard_path(folder / name, 0, 0), latents[rows], labels[rows])
        stats.save(folder / name / STATS_NAME)


def configured(folder: Path, config: Config, args: argparse.Namespace, seed: int, **changes: Any) -> Config:
    """Return the bundled configuration for a training on the walkers."""
    data = replace(
        config.data,
        data_path=str(folder / "train"),
        valid_path=str(folder / "held"),
        num_classes=9 if args.data_root else args.people,
        class_names=None,
    )
    rate = changes.pop("lr", 1e-3)
    train = replace(
        config.train,
        weight_init=config.ckpt_path,
        max_steps=args.steps,
        global_batch_size=args.batch,
        global_seed=seed,
        ema_decay=0.95,
        warmup_steps=0.1,
        decay_steps=0.5,
        precision="fp32",
        **changes,
    )
    return replace(config, data=data, train=train, optimizer=replace(config.optimizer, lr=rate))


def trained(config: Config, looks: int) -> Figures:
    """Train in this process and return held-out losses, speed, memory and the size of the file."""
    torch.set_num_threads(1)
    import peft  # noqa: F401  # before memory is looked at, in every arm

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = Trainer(config, replace(ALONE))
    validation = Validation(config, trainer.data, trainer.averaged_model(), ALONE)
    losses, seconds, every = {0: validation.observe(0)["valid_loss"]}, [], config.train.max_steps // looks
    for step in range(config.train.max_steps):
        started = time.process_time()
        trainer.step(step)
        seconds.append(time.process_time() - started)
        if (step + 1) % every == 0:
            losses[step + 1] = validation.observe(step + 1)["valid_loss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    values = dict(trainer.model.named_parameters())
    changed = sum(values[name].numel() for name in trainer.part.trained)
    file = sum(value.nbytes for value in trainer.ema.weights.values())
    if trainer.part.kind == ALL:
        changed = sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    return {
        "losses": losses,
        "images_per_core_second": config.train.global_batch_size / median(seconds),
        "memory": (peak - before) * 1024 / MEGABYTE,  # Linux counts KiB
        "file": file / MEGABYTE,
        "share": changed / sum(value.numel() for name, value in values.items() if ".lora_" not in name),
    }


def in_a_process(config: Config, args: argparse.Namespace) -> Figures:
    """Return what `trained` returns, from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(trained, (config, args.looks))


def starts(args: argparse.Namespace) -> Figures:
    """Measure the held-out loss of a whole training from each start of the new classes."""
    config = load_config(Path(args.model) / "config.yaml")
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder), config, args)
        found = {
            start: [
                in_a_process(configured(Path(folder), config, args, seed, new_classes=start), args)
                for seed in range(args.seeds)
            ]
            for start in STARTS
        }
    return {"settings": described(args), "starts": found}


def parts(args: argparse.Namespace) -> Figures:
    """Measure what is trained: all, adapters, or biases; each at two learning rates."""
    config = load_config(Path(args.model) / "config.yaml")
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder), config, args)
        found = {
            kind: {
                f"{rate:g}": in_a_process(
                    configured(Path(folder), config, args, args.seed, trainable=kind, lr=rate, new_classes=PARTS_START),
                    args,
                )
                for rate in rates
            }
            for kind, rates in PARTS.items()
        }
    return {"settings": described(args), "parts": found}


def described(args: argparse.Namespace) -> str:
    """Return the settings in a few words."""
    if args.data_root:
        return f"nine classes of Fashion-MNIST, {args.windows} photographs each, {args.steps} steps of {args.batch}"
    return f"{args.people} walkers, {args.windows} windows each, {args.steps} steps of {args.batch}"


def starts_table(figures: Figures) -> list[str]:
    """Return the table of the starts of new classes; a pair of figures has one for each seed."""
    looks = list(figures["starts"][STARTS[0]][0]["losses"])
    lines = [f"Held-out loss; {figures['settings']}:", ""]
    lines += [f"| new classes start | {' | '.join(f'step {step}' for step in looks)} |", f"|---|{'--:|' * len(looks)}"]
    for start, runs in figures["starts"].items():
        cells = [" / ".join(f"{run['losses'][step]:.4f}" for run in runs) for step in looks]
        lines.append(f"| `{start}` | {' | '.join(cells)} |")
    means = {name: mean(run["losses"][looks[-1]] for run in runs) for name, runs in figures["starts"].items()}
    return [*lines, "", f"Lowest at the end: `{min(means, key=means.__getitem__)}`.", ""]


def parts_table(figures: Figures) -> list[str]:
    """Return the table of trained parts, each at its better learning rate."""
    lines = [
        f"{figures['settings']}:",
        "",
        "| `trainable` | share of weights | file (MB) | images per second of a core | memory (MB) | learning rate"
        " | held-out loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, rates in figures["parts"].items():
        ends = {rate: list(run["losses"].values())[-1] for rate, run in rates.items()}
        best = min(ends, key=ends.__getitem__)
        run = rates[best]
        lines.append(
            f"| `{kind}` | {run['share']:.2%} | {run['file']:.2f} | {run['images_per_core_second']:.1f}"
            f" | {run['memory']:.0f} | {best} | {ends[best]:.4f} |"
        )
    return [*lines, ""]


MEASURED = {"starts": (starts, starts_table), "parts": (parts, parts_table)}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.adapter_study", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    parser.add_argument("--model", default="models/fashion-mnist", help="folder of the model to start from")
    parser.add_argument("--output", default="docs", help="folder of the results; default: %(default)s")
    parser.add_argument(
        "--people", type=positive, default=12, help="not as many as the model has classes; default: %(default)s"
    )
    parser.add_argument("--windows", type=positive, default=40, help="of each person; default: %(default)s")
    parser.add_argument("--data-root", help="folder of Fashion-MNIST, whose photographs take the place of walkers")
    parser.add_argument("--steps", type=positive, default=120, help="of a training; default: %(default)s")
    parser.add_argument("--batch", type=positive, default=16, help="images of a step; default: %(default)s")
    parser.add_argument("--looks", type=positive, default=4, help="held-out losses of a run; default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=2, help="trainings of each start; default: %(default)s")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the walkers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, write."""
    args = parse(argv)
    run_parts(args, "adapters", {name: MEASURED[name] for name in MEASURED})
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
