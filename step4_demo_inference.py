#!/usr/bin/env python3
"""Step 4, simple form: sample images with the defaults; write each of them, a grid and an HTML report.

Before step 3 it uses the bundled model.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import project, samples, weights

if TYPE_CHECKING:
    from LightningDiT.distributed import Processes

SCRIPT = "step4_demo_inference.py"
OUTPUT = project.PROJECT / "LightningDiT" / "demo_output"
GRID = "demo_grid.png"
REPORT = "report.html"


def parse(argv: list[str] | None) -> argparse.Namespace:
    from LightningDiT.reference.option import add_help_config
    from LightningDiT.sampling.options import add_gpus_option

    parser = argparse.ArgumentParser(description=__doc__)
    add_help_config(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    weights.add_models_option(parser)
    add_gpus_option(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print the resolved settings")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> samples.Plan:
    from LightningDiT.sampling.options import demo_classes

    path = project.CONFIG if project.CONFIG.exists() else weights.BUNDLED / "config.yaml"
    config = samples.configured(path, args, sampling=False)
    return config, demo_classes(config.data.num_classes), None


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def run(planned: samples.Plan, processes: Processes) -> None:
        from LightningDiT.sampling.demo_report import check_report, copy_by_name, write_report

        processes.say("Step 4, simple form: sampling with the defaults")
        processes.from_main(lambda: check_report(project.absolute(args.output) / REPORT))
        demo = samples.sample(planned, 0, args.output / GRID, samples.TIME_BUDGET, args.dry_run, processes)
        if demo and processes.is_main:
            copy_by_name(demo)
            given = [] if args.output == OUTPUT else ["--output", str(demo.grid.parent)]
            given += ["--models-dir", str(project.absolute(args.models_dir))] if args.models_dir else []
            report = write_report(demo, demo.grid.with_name(REPORT), project.step_command(SCRIPT, *given))
            print(f"{demo.summary()}\nreport: {report}")
            more = project.step_command(project.STEP4, "--help")
            print(f"Next: open the report in a browser; choose classes: {more}")

    return samples.run_shared([SCRIPT, *(sys.argv[1:] if argv is None else argv)], args, partial(plan, args), run)


if __name__ == "__main__":
    project.run(main)
