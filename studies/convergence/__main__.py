"""Show in small how fast each arm converges: `python -m studies.convergence --data-root FOLDER`.

The paper's claim (arXiv 2501.01423) is that LightningDiT on aligned latents needs 21.8 times fewer epochs than DiT. The
study trains on Fashion-MNIST, with equal parameters, equal images seen and several seeds: DiT on a plain VAE, DiT as a
flow, LightningDiT on the same VAE, and LightningDiT on a VAE of the same network that is aligned with a vision model.
The vision model learns the classes of the training photographs first. `--output` holds all results, and the same
command goes on from there. At the end it renews the tables between the marks of docs/training.md, and the curves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import positive, run_main
from LightningDiT.data.fashion_mnist import fashion_mnist
from LightningDiT.tools.report import check_marks
from LightningDiT.verdict.jobs import run_jobs
from studies.convergence.arms import START_PARTS, Plan, write_configs
from studies.convergence.jobs import jobs_of
from studies.convergence.page import MARK, write_page
from studies.pages import add_data_option, equal_numbers


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m studies.convergence", description=__doc__)
    add_data_option(parser)
    parser.add_argument("--output", default="output/convergence", help="folder of all results; 6 GB")
    parser.add_argument("--page", type=Path, default=Path("docs/training.md"), help="gets the tables between its marks")
    parser.add_argument("--steps", type=positive, default=Plan.steps, help="of a transformer; default: %(default)s")
    parser.add_argument("--every", type=positive, default=Plan.every, help="steps between evaluated checkpoints")
    parser.add_argument("--tokenizer-steps", type=positive, default=Plan.tokenizer_steps)
    parser.add_argument("--vision-epochs", type=positive, default=Plan.vision_epochs)
    parser.add_argument("--count", type=equal_numbers, default=Plan.count, help="images of each checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(Plan.seeds))
    args = parser.parse_args(argv)
    if args.steps % args.every or args.every % START_PARTS:
        expected = f"a multiple of {START_PARTS}, and a multiple of that, are expected"
        parser.error(f"--every is {args.every} and --steps {args.steps}; {expected}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds are {args.seeds}; different ones of 0 or more are expected")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    check_marks(args.page, [MARK])  # before hours of training
    fashion_mnist(args.data_root, train=True)  # downloads missing files
    plan = Plan(
        Path(args.output).resolve(),
        str(Path(args.data_root).resolve()),
        args.vision_epochs,
        args.tokenizer_steps,
        args.steps,
        args.every,
        args.count,
        tuple(args.seeds),
    )
    write_configs(plan)
    run_jobs(jobs_of(plan))
    curves = write_page(plan, args.page)
    print(f"wrote the tables in {args.page}, and {curves}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
