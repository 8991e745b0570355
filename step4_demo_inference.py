#!/usr/bin/env python3
"""Step 4, simple form: sample images with the defaults; write each of them, a grid and an HTML report.

Before step 3 it uses the bundled model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import project, samples, weights

OUTPUT = project.PROJECT / "LightningDiT" / "demo_output"
GRID = "demo_grid.png"
REPORT = "report.html"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="only print the resolved settings")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from LightningDiT.sampling.options import demo_classes

    print("Step 4, simple form: sampling with the defaults")
    config = samples.configured(project.CONFIG if project.CONFIG.exists() else weights.BUNDLED / "config.yaml")
    classes = demo_classes(config.data.num_classes)
    demo = samples.sample(config, classes, 0, args.output, GRID, samples.TIME_BUDGET, args.dry_run)
    if demo:
        from LightningDiT.sampling.demo import write_report

        samples.copy_by_name(demo)
        report = write_report(demo, demo.grid.with_name(REPORT))
        print(f"{demo.summary()}\nreport: {report}")
        print(f"Next: open the report in a browser; choose classes: {project.step_command(project.STEP4, '--help')}")
    return 0


if __name__ == "__main__":
    project.run(main)
