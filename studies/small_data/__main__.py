"""Compare trainings on few images, factor by factor: `python -m studies.small_data`.

Walkers are simulated, split by pass and written as levels; the bundled tokenizer is adapted to them; each network is
first trained on another population of walkers, then on the training passes of the first one. During each of these
trainings samples are judged on validation passes. `--output` holds all results, and the same command goes on from
there. At the end it renews the table between the marks of docs/radar.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import natural, positive, run_main
from LightningDiT.tools.report import check_marks
from LightningDiT.verdict.jobs import run_jobs
from studies.small_data.cells import Plan, write_configs
from studies.small_data.jobs import jobs_of
from studies.small_data.page import MARK, write_page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.small_data", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/small_data"), help="folder of all results")
    parser.add_argument("--page", type=Path, default=Path("docs/radar.md"), help="gets the table between its marks")
    for name, text in (
        ("people", "walkers of each population"),
        ("windows", "of a walker"),
        ("size", "pixels a side of a window"),
        ("tokenizer-steps", "of the tokenizer's training"),
        ("steps", "of each training, at most"),
        ("looks", "at samples during a training"),
    ):
        default = getattr(Plan, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"{text}; default: %(default)s")
    parser.add_argument("--patience", type=natural, default=Plan.patience, help="looks; default: %(default)s")
    parser.add_argument("--seed", type=natural, default=Plan.seed, help="of the trainings; default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    values = vars(parse(argv))
    page, folder = values.pop("page"), values.pop("output").resolve()
    check_marks(page, [MARK])  # before an hour of training
    plan = Plan(folder, **values)
    write_configs(plan)
    run_jobs(jobs_of(plan))
    write_page(plan, page)
    print(f"wrote the table in {page}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
