#!/usr/bin/env python3
"""Step 4, simple form: pictures with nothing but defaults, each by itself, as a grid and as an HTML report.

Where step 3 has not been run, the bundled model is used.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import console

CONFIG = console.PROJECT / "kaggle_inference_config.yaml"
BUNDLED = console.PROJECT / "models" / "fashion-mnist" / "config.yaml"
OUTPUT = console.PROJECT / "LightningDiT" / "demo_output"
GRID = "demo_grid.png"
REPORT = "report.html"
TIME_BUDGET = 30.0  # minutes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from LightningDiT.config import load_config
    from LightningDiT.sampling.options import demo_classes, describe_settings

    print("Step 4, simple form: sampling with the defaults")
    config = load_config(CONFIG if CONFIG.exists() else BUNDLED)
    classes = demo_classes(config.data.num_classes)
    folder = console.absolute(args.output)
    print(describe_settings(config, len(classes), folder))
    from LightningDiT.sampling.demo import check_run, sample_demo, write_report

    if args.dry_run:
        return check_run(config, classes)
    console.require_writable(folder)
    demo = sample_demo(config, classes, 0, folder, GRID, TIME_BUDGET)
    for path, caption in zip(demo.run.paths, demo.captions, strict=True):
        if path is not None:
            name = "".join(letter if letter.isalnum() else "_" for letter in caption)
            shutil.copyfile(path, folder / f"{int(path.stem):02d}_{name}.png")
    report = write_report(demo, folder / REPORT)
    print(f"{demo.summary()}\nreport: {report}")
    print("Next: open the report in a browser; choose classes with python step4_run_inference.py --help")
    return console.OK


if __name__ == "__main__":
    console.run(main)
