"""Measure what torch.compile gains and costs: `python -m studies.compile_study`.

Times one forward of the bundled transformer and of LightningDiT-B/1 with random weights, compiled and not, in turn in
one run, and the seconds by which the first compiled call takes longer than a later one. The page is docs/compile.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from LightningDiT.compiling import compile_forward, is_compiled
from LightningDiT.config import load_config
from LightningDiT.console import positive, run_main
from LightningDiT.device import best_device
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import load_transformer
from LightningDiT.models.lightningdit import LightningDiT
from LightningDiT.tools.benchmark.forward import model_inputs, on_meta, published_settings, random_weights
from LightningDiT.tools.benchmark.machine import machine, machine_line
from LightningDiT.tools.benchmark.rounds import Case, measure, seconds_of
from LightningDiT.tools.report import table as markdown

BUNDLED_CONFIG = Path(__file__).resolve().parents[1] / "models" / "fashion-mnist" / "config.yaml"
PRESET = "LightningDiT-B/1"
BATCH, ROUNDS = 2, 7


@dataclass(frozen=True)
class Row:
    """One network: medians of the seconds of a forward, and the seconds of compiling it.

    Attributes:
        difference: largest between both outputs, in standard deviations of the plain output.
    """

    name: str
    batch: int
    plain: float
    compiled: float
    compiling: float
    difference: float


def study(name: str, model: LightningDiT, batch: int, rounds: int, device: torch.device) -> Row:
    """Return the figures of one network, and leave it compiled.

    Raises:
        LightningDiTError: this machine cannot compile.
    """
    inputs, plain = model_inputs(model, batch), model.forward
    with torch.inference_mode():
        expected = plain(*inputs)
    compile_forward(model)
    first = seconds_of(lambda: model(*inputs), device)
    if not is_compiled(model):  # it went on uncompiled, with a warning that says why
        raise LightningDiTError("torch.compile does not work here", "install a C++ compiler, such as g++")
    cases = [Case("plain", lambda: plain(*inputs)), Case("compiled", lambda: model(*inputs))]
    uncompiled, compiled = (result.seconds for result in measure(cases, rounds, device)[2:])
    with torch.inference_mode():
        difference = float((model(*inputs) - expected).abs().max() / expected.std())
    return Row(name, batch, uncompiled, compiled, first - compiled, difference)


def table(rows: Sequence[Row]) -> list[str]:
    """Return the figures as a Markdown table."""
    head = ("network", "batch", "uncompiled", "compiled", "ratio", "compiling", "pays after", "largest difference")
    body = [
        (
            row.name,
            str(row.batch),
            f"{row.plain:.4f} s",
            f"{row.compiled:.4f} s",
            f"{row.plain / row.compiled:.2f}",
            f"{row.compiling:.0f} s",
            pays_after(row),
            f"{row.difference:.0e} std",
        )
        for row in rows
    ]
    return markdown(head, body)[:-1]


def pays_after(row: Row) -> str:
    """Return the number of forwards after which compiling has gained more than it cost."""
    gain = row.plain - row.compiled
    return f"{row.compiling / gain:,.0f} forwards" if gain > 0 else "never"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.compile_study", description=__doc__)
    parser.add_argument("--batch", type=positive, default=BATCH, help=f"images at once; default {BATCH}")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help=f"forwards of each kind; default {ROUNDS}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args, device = parse(argv), best_device()
    models = {
        "bundled": load_transformer(load_config(BUNDLED_CONFIG)).to(device),
        f"{PRESET}, random weights": random_weights(on_meta(published_settings(PRESET))).to(device),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # else the code of an earlier run is used
        for name, model in models.items():
            print(f"compiling {name}", file=sys.stderr, flush=True)
            rows.append(study(name, model, args.batch, args.rounds, device))
    print("\n".join([machine_line(machine(device, torch.float32)), "", *table(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
