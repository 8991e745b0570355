#!/usr/bin/env python3
"""Step 4, simple form: sample images with the defaults; write each of them, a grid and an HTML report.

Before step 3 it uses the bundled model.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK
from LightningDiT.files import require_writable
from setup_steps import project, weights

OUTPUT = project.PROJECT / "LightningDiT" / "demo_output"
GRID = "demo_grid.png"
REPORT = "report.html"
TIME_BUDGET = 30.0  # minutes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="only print the resolved settings")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from LightningDiT.config import load_config
    from LightningDiT.sampling.options import demo_classes, describe_settings

    print("Step 4, simple form: sampling with the defaults")
    config = load_config(project.CONFIG if project.CONFIG.exists() else weights.BUNDLED / "config.yaml")
    classes = demo_classes(config.data.num_classes)
    folder = project.absolute(args.output)
    print(describe_settings(config, len(classes), folder))
    from LightningDiT.sampling.demo import sample_demo, write_report
    from LightningDiT.sampling.dry_run import check_run

    if args.dry_run:
        return check_run(config, classes)
    require_writable(folder)
    demo = sample_demo(config, classes, 0, folder, GRID, TIME_BUDGET)
    for path, caption in zip(demo.run.paths, demo.captions, strict=True):
        if path is not None:
            name = "".join(letter if letter.isalnum() else "_" for letter in caption)
            shutil.copyfile(path, folder / f"{int(path.stem):02d}_{name}.png")
    report = write_report(demo, folder / REPORT)
    print(f"{demo.summary()}\nreport: {report}")
    print(f"Next: open the report in a browser; choose classes: {project.step_command(project.STEP4, '--help')}")
    return OK


if __name__ == "__main__":
    project.run(main)
