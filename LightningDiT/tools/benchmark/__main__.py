"""Measure the speed on this machine: `python -m LightningDiT.tools.benchmark [--json FILE] [--quick] [--part ...]`.

Every figure is a median over rounds in which all cases take turns, after one round to warm up. Matrix products are
compared with the rate of a large one in the same rounds, so that the shares of two machines, or of two hours on a
shared machine, can be compared. The benchmark runs on the GPU in the precision of sampling, or on the CPU in float32 if
no GPU works. docs/benchmark.md describes each part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from LightningDiT.console import run_main
from LightningDiT.device import best_device, release_memory, resolve_precision
from LightningDiT.files import write_text
from LightningDiT.tools.report import check_marks, put_between_marks

from .demo import measure_demo
from .forward import measure_forwards, measure_profile
from .loading import measure_loading
from .machine import machine, machine_line
from .rounds import Setting
from .sampling import measure_decoding, measure_growth, measure_images
from .tables import TABLES, mark_of, render
from .training import measure_training

PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "forward": measure_forwards,
    "profile": measure_profile,
    "decode": measure_decoding,
    "load": measure_loading,
    "images": measure_images,
    "growth": measure_growth,
    "demo": measure_demo,
    "training": measure_training,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.benchmark", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no XL/1, no batch of 8, fewer images")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")
    parser.add_argument("--output", metavar="PAGE", type=Path, help="also put the tables between the marks of PAGE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args = parse(argv)
    if args.output:
        check_marks(args.output, map(mark_of, args.part))  # before minutes of measuring
    device = best_device()
    setting = Setting(device, resolve_precision("auto", device).dtype, args.quick)
    facts = machine(device, setting.dtype)
    print(f"Measuring on {machine_line(facts)}", flush=True)
    figures: dict[str, Any] = {}
    for part in dict.fromkeys(args.part):
        print(f"{TABLES[part][0]} ...", flush=True)
        figures[part] = PARTS[part](setting)
        release_memory()
    texts = {part: render(part, found, facts) for part, found in figures.items()}
    print("\n" + "\n".join(texts.values()))
    if args.json:
        write_text(args.json, json.dumps({"machine": facts, **figures}, indent=2, default=asdict) + "\n")
    if args.output:
        for part, text in texts.items():
            put_between_marks(args.output, text.split("\n"), "Benchmark", mark_of(part))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
