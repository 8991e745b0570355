"""Say whether a training fits into memory: `python -m LightningDiT.tools.training_memory --config C --memory 16`.

`--measure 1 4` also trains on the CPU, with 1 and with 4 samples at a time, each in a process of its own, and shows the
largest resident size beside the computed one. The formula is in LightningDiT/training/memory.py.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from LightningDiT.console import importing, positive, run_main

with importing(__name__):
    import torch

    from LightningDiT.config import Config, load_config
    from LightningDiT.device import PRECISIONS, autocast, best_device, training_dtype
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.loading import make_model, model_settings
    from LightningDiT.models.lightningdit import LightningDiTSettings
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.tools.benchmark.machine import peak_resident_bytes
    from LightningDiT.training.ema import Ema
    from LightningDiT.training.memory import TrainingNeed, no_labels, training_need

GIB = 2**30
#: Freed memory goes back at once; by default glibc keeps up to a fifth more, which differs from run to run.
PROMPT_RETURN = {"MALLOC_MMAP_THRESHOLD_": "65536"}
STEPS = 2  # the first one makes Adam's moments


def need_of(config: Config, on_gpu: bool, checkpointing: bool) -> TrainingNeed:
    """Return the memory that training by a configuration needs, with or without activation checkpointing.

    A U-Net has no checkpointing.
    """
    dtype = PRECISIONS.get(config.train.precision) or (torch.bfloat16 if on_gpu else training_dtype(best_device()))
    settings = model_settings(config)
    if isinstance(settings, LightningDiTSettings):
        settings = replace(settings, use_checkpoint=checkpointing)
    return training_need(settings, dtype, on_gpu)


def saves_activations(config: Config) -> bool:
    """Return whether activation checkpointing is on."""
    return getattr(model_settings(config), "use_checkpoint", False)


def report(config: Config, memory: float, on_gpu: bool, processes: int) -> str:
    """Return in words what fits into `memory` (GiB) of each process."""
    plain, saving = (need_of(config, on_gpu, checkpointing) for checkpointing in (False, True))
    lines = [
        f"{config.model.model_type}, {plain.parameters:,} parameters, precision {config.train.precision}",
        f"weights, Adam's moments, average: {plain.state / GIB:.2f} GiB; gradients: {plain.gradients / GIB:.2f} GiB;"
        f" copies in half precision: {plain.half_copies / GIB:.2f} GiB",
    ]
    has_blocks = isinstance(model_settings(config), LightningDiTSettings)
    for words, need in (("", plain), (" with use_checkpoint", saving))[: 2 if has_blocks else 1]:
        most = need.largest_batch(memory * GIB)
        fits = f"micro_batch_size: at most {most} in" if most else "does not even fit with one sample into"
        lines.append(f"activations{words}: {need.activations / 2**20:.1f} MiB a sample; {fits} {memory:g} GiB")
    share = math.ceil(config.train.global_batch_size / processes)
    asked = min(share, config.train.micro_batch_size or share)
    need = saving if saves_activations(config) else plain
    peak = need.peak(asked, accumulates=asked < share) / GIB
    fits = "fits" if peak <= memory else "does not fit"
    lines.append(f"as configured, {asked} samples at a time: {peak:.2f} GiB, which {fits}")
    return "\n".join(lines)


def measured_peak(config_path: str, batch: int) -> int:
    """Return the largest resident size in bytes of a process that trains on the CPU with `batch` samples at a time."""
    options = ("--config", config_path, "--child", str(batch))
    command = [sys.executable, "-m", "LightningDiT.tools.training_memory", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | PROMPT_RETURN)
    if done.returncode:
        raise LightningDiTError(
            f"measuring {batch} samples at a time failed ({' '.join(done.stderr.strip().splitlines()[-1:])})",
            "free memory, or measure fewer samples",
        )
    return int(done.stdout.split()[-1])


def train_steps(config: Config, batch: int) -> int:
    """Train on random latents and return the largest resident size of this process in bytes.

    Raises:
        LightningDiTError: the system does not say.
    """
    dtype = PRECISIONS.get(config.train.precision) or training_dtype(torch.device("cpu"))
    model = make_model(model_settings(config), class_dropout_prob=0.0)
    average, optimizer = Ema(model, 0.99), torch.optim.AdamW(model.parameters())
    side = model.settings.input_size
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        states = torch.randn(batch, model.settings.in_channels, side, side)
        with autocast(torch.device("cpu"), dtype):
            out = model(states, torch.rand(batch), no_labels(model, batch))
        (out.float() - states).square().mean().backward()
        optimizer.step()
        average.update()
    peak = peak_resident_bytes()
    if peak is None:
        raise LightningDiTError(
            "the largest resident size of a process is not known on this system", "measure on Linux"
        )
    return peak


def _gibibytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, a number of GiB above 0 expected")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.training_memory", description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", required=True, help="YAML of the published schema")
    parser.add_argument("--memory", type=_gibibytes, default=16.0, help="GiB of the device; default: 16")
    parser.add_argument("--processes", type=positive, default=1, help="that share the batch, each with --memory")
    parser.add_argument("--cpu", action="store_true", help="for training on the CPU; default: on a GPU")
    parser.add_argument("--measure", type=positive, nargs="+", metavar="BATCH", help="also measure on the CPU")
    parser.add_argument("--child", type=positive, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    config = load_config(args.config)
    if args.child:
        print(train_steps(config, args.child))
        return 0
    print(report(config, args.memory, not args.cpu, args.processes))
    for batch in args.measure or ():
        peak = measured_peak(args.config, batch) / GIB
        need = need_of(config, False, saves_activations(config)).peak(batch) / GIB
        print(f"on the CPU, {batch} at a time: measured {peak:.2f} GiB, computed {need:.2f} ({need / peak:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
