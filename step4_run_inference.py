#!/usr/bin/env python3
"""Step 4: sample images with the configuration of step 3 and write one grid with captions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import project, samples, weights

if TYPE_CHECKING:
    from LightningDiT.distributed import Processes

OUTPUT = project.PROJECT / "LightningDiT" / "demo_images"
GRID = "demo_samples.png"


def parse(argv: list[str] | None) -> argparse.Namespace:
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.sampling.options import add_class_options, add_sampling_options

    parser = argparse.ArgumentParser(description=__doc__)
    add_help_config(parser)
    parser.add_argument("--config", type=Path, default=project.CONFIG, help="default: that of step 3")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    weights.add_models_option(parser)
    add_class_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(time_budget=samples.TIME_BUDGET)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from LightningDiT.sampling.options import grid_of

    def plan() -> samples.Plan:
        config = samples.configured(args.config, args)
        return config, *grid_of(args, config)

    def run(planned: samples.Plan, processes: Processes) -> None:
        processes.say("Step 4: sampling")
        demo = samples.sample(planned, args.seed, args.output / GRID, args.time_budget, args.dry_run, processes)
        if demo:
            more = project.step_command(project.STEP4, "--help")
            processes.say(f"{demo.summary()}\nNext: look at the grid; --classes, --count, --seed and more: {more}")

    return samples.run_shared([project.STEP4, *(sys.argv[1:] if argv is None else argv)], args, plan, run)


if __name__ == "__main__":
    project.run(main)
