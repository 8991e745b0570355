"""Compare trainings on few images, factor by factor: `python -m studies.small_data`.

Walkers are simulated, split by pass and written as levels; of the training windows each person keeps few. Each cell
trains a network on them from the start that it names, by the tokenizer of models/walkers as it is. During a training
samples are judged on validation passes. `--output` holds all results, and the same command goes on from there. At the
end it renews the table between the marks of docs/radar.md and docs/radar.zh-CN.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import positive, run_main
from LightningDiT.tools.report import check_marks
from LightningDiT.verdict.jobs import run_jobs
from studies.small_data.cells import Plan, write_configs
from studies.small_data.jobs import data_jobs, training_jobs, write_splits
from studies.small_data.page import MARK, PAGES, write_page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.small_data", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/small_data"), help="folder of all results")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of the pages that get the table")
    parser.add_argument("--unet-start", type=Path, default=Plan.unet_start, help="U-Net of studies.pretrain_walkers")
    for name, text in (
        ("people", "walkers"),
        ("windows", "of a walker"),
        ("size", "pixels a side of a window"),
        ("steps", "of each training, at most"),
        ("looks", "at samples during a training"),
        ("seeds", "trainings of each cell"),
    ):
        default = getattr(Plan, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{text}; default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    values = vars(parse(argv))
    docs, folder = values.pop("docs"), values.pop("output").resolve()
    for page in PAGES:
        check_marks(docs / page, [MARK])  # before an hour of training
    plan = Plan(folder, values.pop("unet_start").resolve(), **values)
    write_configs(plan)
    run_jobs(data_jobs(plan))
    write_splits(plan)
    run_jobs(training_jobs(plan))
    for page in PAGES:
        write_page(plan, docs / page)
        print(f"wrote the table in {docs / page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
