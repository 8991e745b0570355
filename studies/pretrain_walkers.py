"""Make models/walkers: `python -m studies.pretrain_walkers`.

Simulates a population of walkers, trains a tokenizer of one channel on it from the bundled one, then a transformer from
the bundled weights and a U-Net from random ones, and writes tokenizer and transformer in half precision. The U-Net
stays in `--work`, where studies.small_data finds it. The same command goes on where a stopped one ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from LightningDiT.checkpoint import inspect, load_weights, save_weights
from LightningDiT.config import as_yaml, read_yaml
from LightningDiT.console import positive, run_main
from LightningDiT.data.labels import CLASS_NAMES
from LightningDiT.files import write_text
from LightningDiT.radar.augmentation import NAMES
from LightningDiT.tokenizer.latents import LatentStats
from LightningDiT.verdict.jobs import PROJECT, Job, run_jobs

CONDITIONS = ("Normal_line", "Backpack_line", "Bag_line", "Bag_Phone_line")
SEED = 1000  # of the population; tests and studies simulate others
SIZE, DRAWS = 64, 2
TRANSFORMER, UNET = "transformer", "unet"
GARMENTS = PROJECT / "models" / "fashion-mnist"
TARGET = PROJECT / "models" / "walkers"
TOKENIZER = PROJECT / "LightningDiT" / "tokenizer" / "configs" / "levels_f4d6.yaml"
DB_RANGE = ("-45", "0")
STATS = "latents_stats.pt"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.pretrain_walkers", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("output/pretrain_walkers"), help="folder of all steps")
    parser.add_argument("--output", type=Path, default=TARGET, help="folder of the model; default: models/walkers")
    for name, default, text in (
        ("people", 200, "walkers"),
        ("windows", 20, "of a walker under each condition"),
        ("tokenizer-steps", 1200, "of the tokenizer's training"),
        ("steps", 1600, "of the transformer's training"),
        ("unet-steps", 800, "of the U-Net's training"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{text}; default: %(default)s")
    return parser.parse_args(argv)


def tokenizer_values(steps: int) -> dict[str, Any]:
    """Return the YAML of the tokenizer's training."""
    values = read_yaml(TOKENIZER)
    values["train"] |= {"max_steps": steps, "decay_steps": 0.5, "ckpt_every": max(1, steps // 4)}
    return values


def training_values(work: Path, model: str, steps: int, people: int) -> dict[str, Any]:
    """Return the YAML of a network's training on the latents in `work`."""
    start = {TRANSFORMER: str(GARMENTS / "transformer.safetensors"), UNET: None}[model]
    return {
        "data": {
            "data_path": str(work / "latents"),
            "valid_path": str(work / "latents_valid"),
            "split_file": str(work / "parts/split.json"),
            "image_size": SIZE,
            "num_classes": people,
            "num_conditions": len(CONDITIONS),
        },
        "vae": {
            "model_name": str(work / "tokenizer.yaml"),
            "ckpt_path": str(work / "tokenizer/tokenizer.safetensors"),
            "downsample_ratio": 4,
        },
        "model": {
            "model_type": {TRANSFORMER: "LightningDiT-XS/2", UNET: "UNet-S"}[model],
            "in_chans": 6,
            "augmentation": len(NAMES),
        },
        "train": {
            "weight_init": start,
            "max_steps": steps,
            "global_batch_size": 64,
            "output_dir": str(work),
            "exp_name": model,
            "log_every": 50,
            "ckpt_every": 250,
            "valid_every": 500,
            "warmup_steps": 0.05,
            "decay_steps": 0.5,
            "ema_decay": 0.998,
        },
        "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
        "transport": {"use_cosine_loss": True, "use_lognorm": True},
    }


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Return the jobs in the order in which each finds what it needs."""
    work: Path = args.work
    levels = ("--levels", str(work / "levels"), "--split-file", str(work / "parts/split.json"))
    simulate = ("--output", str(work / "walkers"), "--people", str(args.people), "--windows", str(args.windows))
    simulate += ("--seed", str(SEED), "--layout", "people-conditions", "--conditions", *CONDITIONS)
    prepare = ("--data", str(work / "walkers"), "--output", str(work / "parts"), "--write", str(work / "levels"))
    prepare += ("--size", str(SIZE), "--db-range", *DB_RANGE)
    tokenizer = ("--config", str(work / "tokenizer.yaml"), "--init", str(GARMENTS), *levels)
    extract = ("LightningDiT.extract_features", "--config", str(work / f"{TRANSFORMER}.yaml"), *levels)
    return [
        Job("walkers", ("LightningDiT.tools.simulate_walkers", *simulate), work / "walkers/walkers.json"),
        Job("levels", ("step5_prepare_spectrograms", *prepare), work / "parts/split.json"),
        Job(
            "tokenizer",
            ("LightningDiT.train_tokenizer", *tokenizer, "--output", str(work / "tokenizer")),
            work / "tokenizer/training.safetensors",
        ),
        *(
            Job(name, (*extract, *more, "--output", str(work / name)), work / name / "manifest.json")
            for name, more in (("latents", ("--draws", str(DRAWS))), ("latents_valid", ("--part", "validation")))
        ),
        *(
            Job(
                model,
                ("LightningDiT.train", "--config", str(work / f"{model}.yaml")),
                work / model / "transformer.safetensors",
            )
            for model in (TRANSFORMER, UNET)
        ),
    ]


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in half precision; what is no floating point number stays."""
    return {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}


def write_model(work: Path, output: Path) -> None:
    """Write tokenizer and transformer of `work` to `output`, in half precision.

    The classes are named after the simulation, so that no training takes the row of a simulated walker for a person
    who has the same number.
    """
    tokenizer = work / "tokenizer/tokenizer.safetensors"
    stats = LatentStats.load(work / "latents" / STATS)
    metadata = inspect(tokenizer).metadata | stats.as_metadata()
    save_weights(halved(load_weights(tokenizer)), output / tokenizer.name, metadata)
    stats.save(output / STATS)
    source = work / TRANSFORMER / "transformer.safetensors"
    metadata = inspect(source).metadata
    people = json.loads(metadata[CLASS_NAMES])
    names = json.dumps([f"simulated walker {name}" for name in people])
    save_weights(halved(load_weights(source)), output / source.name, metadata | {CLASS_NAMES: names})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    args.work = args.work.resolve()
    write_text(args.work / "tokenizer.yaml", as_yaml(tokenizer_values(args.tokenizer_steps)))
    for model, steps in ((TRANSFORMER, args.steps), (UNET, args.unet_steps)):
        write_text(args.work / f"{model}.yaml", as_yaml(training_values(args.work, model, steps, args.people)))
    run_jobs(jobs_of(args))
    write_model(args.work, args.output)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
