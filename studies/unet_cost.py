"""Measure what a U-Net's training step costs beside its transformer's: `python -m studies.unet_cost`.

Both take steps in turn on random latents (forward, backward, AdamW, average) on one thread of the CPU, in the precision
that a training takes here. The ratio of each pair of processor times counts, so that other work on the machine matters
little; the median is printed. The table is in LightningDiT/models/unet.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from LightningDiT.console import positive, run_main
from LightningDiT.device import PRECISIONS, autocast, training_dtype
from LightningDiT.loading import Network, make_model
from LightningDiT.models.lightningdit import preset_settings
from LightningDiT.models.unet import unet_settings
from LightningDiT.tools.report import table
from LightningDiT.training.ema import Ema

SIDES, CHANNELS, CLASSES = (8, 16), 4, 31
#: U-Net, its transformer, and latents of a step.
PAIRS = (("UNet-S", "LightningDiT-XS/2", 32), ("UNet-B", "LightningDiT-S/2", 24))
SWITCHES = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}  # a configuration's defaults
WARM_UP = 2


def stepper(model: Network, batch: int, dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that takes a training step and returns its processor time in seconds."""
    average, optimizer = Ema(model, 0.99), torch.optim.AdamW(model.parameters())
    side, cpu = model.settings.input_size, torch.device("cpu")

    def step() -> float:
        states, times = torch.randn(batch, CHANNELS, side, side), torch.rand(batch)
        start = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with autocast(cpu, dtype):
            out = model(states, times, torch.zeros(batch, dtype=torch.long))
        (out.float() - states).square().mean().backward()
        optimizer.step()
        average.update()
        return time.process_time() - start

    return step


def ratio(names: tuple[str, str], side: int, batch: int, dtype: torch.dtype, pairs: int) -> tuple[float, float]:
    """Return the median ratio of a U-Net's step to its transformer's, and the seconds of the latter."""
    sizes = {"input_size": side, "in_channels": CHANNELS, "num_classes": CLASSES, "class_dropout_prob": 0.0}
    settings = unet_settings(names[0], **sizes), preset_settings(names[1], **sizes, **SWITCHES)
    unet, transformer = (stepper(make_model(one), batch, dtype) for one in settings)
    taken = [(unet(), transformer()) for _ in range(WARM_UP + pairs)][WARM_UP:]
    return statistics.median(a / b for a, b in taken), statistics.median(b for _, b in taken)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m studies.unet_cost", description=__doc__)
    parser.add_argument("--pairs", type=positive, default=8, help="pairs of steps; default: 8")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="as train.precision")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    dtype = PRECISIONS.get(args.precision) or training_dtype(torch.device("cpu"))
    rows = []
    for *names, batch in PAIRS:
        for side in SIDES:
            found, seconds = ratio((names[0], names[1]), side, batch, dtype, args.pairs)
            rows.append([*names, str(side), str(batch), f"{seconds:.3f} s", f"{found:.2f}"])
    print(f"{str(dtype).removeprefix('torch.')}, one thread, {args.pairs} pairs")
    print("\n".join(table(["U-Net", "transformer", "side", "batch", "transformer's step", "ratio"], rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
