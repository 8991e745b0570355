"""Measure the speed on this machine: `python -m LightningDiT.tools.benchmark [--json FILE] [--quick] [--part ...]`.

Every figure is a median over rounds in which all cases take turns, after one round to warm up. Matrix products are
compared with the rate of a large one in the same rounds, so that the shares of two machines, or of two hours on a
shared machine, can be compared. The benchmark runs on the GPU in the precision of sampling, or on the CPU in float32 if
no GPU works. Parts named gpu-... need a GPU. docs/benchmark.md describes each part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from LightningDiT.console import run_main
from LightningDiT.device import best_device, release_memory, resolve_precision
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import write_text
from LightningDiT.tools.report import check_marks, put_between_marks

from .demo import measure_demo
from .forward import measure_forwards, measure_profile
from .gpu_networks import measure_gpu_decoding, measure_gpu_forwards, measure_gpu_training
from .gpu_sampling import measure_gpu_firsts, measure_gpu_sampling
from .loading import measure_loading
from .machine import machine, machine_line
from .predict import work_of
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
    "predicted": lambda setting: {"work": work_of()},
}
GPU_PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "gpu-forward": measure_gpu_forwards,
    "gpu-decode": measure_gpu_decoding,
    "gpu-training": measure_gpu_training,
    "gpu-sampling": measure_gpu_sampling,
    "gpu-first": measure_gpu_firsts,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.benchmark", description=__doc__)
    known = [*PARTS, *GPU_PARTS]
    parser.add_argument("--part", nargs="+", choices=known, help="what to measure; default: all that the device can")
    predict = "only predict the forwards on other GPUs, as --part predicted does"
    parser.add_argument("--predict", action="store_const", dest="part", const=["predicted"], help=predict)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no XL/1, no batch of 8, fewer images")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to FILE")
    parser.add_argument("--output", metavar="PAGE", type=Path, help="also put the tables between the marks of PAGE")
    return parser.parse_args(argv)


def chosen_parts(asked: Sequence[str] | None, device: torch.device) -> list[str]:
    """Return the parts to measure, each once; by default all that the device can.

    Raises:
        LightningDiTError: a part needs a GPU, and none works.
    """
    on_gpu = device.type != "cpu"
    parts = list(dict.fromkeys(asked or [*PARTS, *(GPU_PARTS if on_gpu else ())]))
    needing = [part for part in parts if part in GPU_PARTS]
    if needing and not on_gpu:
        names = ", ".join(needing)
        raise LightningDiTError(f"{names}: a GPU is needed, and none works here", f"leave out {names}")
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    args = parse(argv)
    device = best_device()
    parts = chosen_parts(args.part, device)
    if args.output:
        check_marks(args.output, map(mark_of, parts))  # before minutes of measuring
    setting = Setting(device, resolve_precision("auto", device).dtype, args.quick)
    facts = machine(device, setting.dtype)
    print(f"Measuring on {machine_line(facts)}", flush=True)
    figures: dict[str, Any] = {}
    for part in parts:
        print(f"{TABLES[part][0]} ...", flush=True)
        figures[part] = (PARTS | GPU_PARTS)[part](setting)
        release_memory()
        if args.json:  # after each, since the time on a GPU may be short
            write_text(args.json, json.dumps({"machine": facts, **figures}, indent=2, default=asdict) + "\n")
    texts = {part: render(part, found, facts) for part, found in figures.items()}
    print("\n" + "\n".join(texts.values()))
    if args.output:
        for part, text in texts.items():
            put_between_marks(args.output, text.split("\n"), "Benchmark", mark_of(part))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
