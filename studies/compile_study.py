"""Measure what torch.compile gains and costs: `python -m studies.compile_study`.

Seconds of one forward of the bundled transformer and of LightningDiT-B/1 with random weights, compiled and not, in turn
in one run, and the seconds of the first compiled call beyond a later one. The page is docs/compile.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from LightningDiT.compiling import compile_forward
from LightningDiT.config import load_config
from LightningDiT.console import Progress, run_main
from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import load_transformer
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.sampling.options import positive
from LightningDiT.tools.benchmark.forward import model_inputs, on_meta, published_settings, random_weights
from LightningDiT.tools.benchmark.machine import machine, machine_line
from LightningDiT.tools.benchmark.rounds import seconds_of

BUNDLED_CONFIG = Path(__file__).resolve().parents[1] / "models" / "fashion-mnist" / "config.yaml"
PRESET = "LightningDiT-B/1"
BATCH, ROUNDS = 2, 7


@dataclass(frozen=True)
class Row:
    """One network: medians of the seconds of a forward, and what compiling it took.

    Attributes:
        difference: largest between the outputs of both, in units of the plain output's standard deviation.
    """

    name: str
    batch: int
    plain: float
    compiled: float
    compiling: float
    difference: float


def study(name: str, model: LightningDiT, batch: int, rounds: int, device: torch.device) -> Row:
    """Return the seconds of one network; it is compiled from here on.

    Raises:
        LightningDiTError: this machine cannot compile.
    """
    inputs, plain = model_inputs(model, batch), model.forward
    with torch.inference_mode():
        expected = plain(*inputs)  # which warms up as well
    compile_forward(model)
    first = seconds_of(lambda: model(*inputs), device)
    if "forward" not in vars(model):  # it went on uncompiled, with a warning that says why
        raise LightningDiTError("torch.compile does not work here", "install a C++ compiler, such as g++")
    times: dict[str, list[float]] = {"plain": [], "compiled": []}
    progress = Progress(rounds, "round")
    for _ in range(rounds):
        times["plain"].append(seconds_of(lambda: plain(*inputs), device))
        times["compiled"].append(seconds_of(lambda: model(*inputs), device))
        progress.update()
    progress.close()
    with torch.inference_mode():
        difference = float((model(*inputs) - expected).abs().max() / expected.std())
    seconds = {key: statistics.median(values) for key, values in times.items()}
    return Row(name, batch, seconds["plain"], seconds["compiled"], first - seconds["compiled"], difference)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the figures as a Markdown table."""
    return [
        "| network | batch | uncompiled | compiled | ratio | compiling | pays after | largest difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {row.name} | {row.batch} | {row.plain:.4f} s | {row.compiled:.4f} s | {row.plain / row.compiled:.2f}"
            f" | {row.compiling:.0f} s | {pays_after(row)} | {row.difference:.0e} std |"
            for row in rows
        ),
    ]


def pays_after(row: Row) -> str:
    """Return the forwards after which compiling has cost less than it gained."""
    gain = row.plain - row.compiled
    return f"{row.compiling / gain:,.0f} forwards" if gain > 0 else "never"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.compile_study", description=__doc__)
    parser.add_argument("--batch", type=positive, default=BATCH, help=f"images at once; default {BATCH}")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help=f"forwards of each kind; default {ROUNDS}")
    parser.add_argument("--bundled-only", action="store_true", help=f"leave {PRESET} out")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args, device = parse(argv), best_device()
    models = {"bundled": load_transformer(load_config(BUNDLED_CONFIG)).to(device)}
    if not args.bundled_only:
        models[f"{PRESET}, random weights"] = random_weights(on_meta(published_settings(PRESET))).to(device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # else code that an earlier run compiled is taken
        for name, model in models.items():
            print(f"compiling {name}", file=sys.stderr, flush=True)
            rows.append(study(name, model, args.batch, args.rounds, device))
    print("\n".join([machine_line(machine(device, torch.float32)), "", *table(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
