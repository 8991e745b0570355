#!/usr/bin/env python3
"""Step 4: sample images with the configuration of step 3 and write one grid with captions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK
from LightningDiT.files import check_space, require_writable
from setup_steps import project

OUTPUT = project.PROJECT / "LightningDiT" / "demo_images"
GRID = "demo_samples.png"
TIME_BUDGET = 30.0  # minutes


def parse(argv: list[str] | None) -> argparse.Namespace:
    from LightningDiT.sampling.options import add_class_options, add_sampling_options

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=project.CONFIG, help="default: that of step 3")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    add_class_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(time_budget=TIME_BUDGET)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from LightningDiT.config import load_config
    from LightningDiT.sampling.options import apply_options, classes_of, describe_settings

    print("Step 4: sampling")
    config = apply_options(load_config(args.config), args)
    folder = project.absolute(args.output)
    check_space(folder, args.count or 0, config.data.image_size)
    classes = classes_of(args, config.data.num_classes)
    print(describe_settings(config, len(classes), folder / GRID))
    from LightningDiT.sampling.demo import sample_demo
    from LightningDiT.sampling.dry_run import check_run

    if args.dry_run:
        return check_run(config, classes)
    require_writable(folder)
    demo = sample_demo(config, classes, args.seed, folder, GRID, args.time_budget)
    print(demo.summary())
    print(
        f"Next: look at the grid; --classes, --count, --seed and more: {project.step_command(project.STEP4, '--help')}"
    )
    return OK


if __name__ == "__main__":
    project.run(main)
