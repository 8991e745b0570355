"""Draw the curves of training runs: `python -m LightningDiT.tools.plot_training RUN/log.jsonl --output curves.png`.

Every quantity becomes a panel, every run a line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import check_target, holding, refuse_inputs
from LightningDiT.training.curves import CURVES, MARK, quantities, read_log, save_curves


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m LightningDiT.tools.plot_training", description=__doc__)
    parser.add_argument("logs", nargs="+", help="log.jsonl of each run; its folder becomes the label")
    parser.add_argument("--output", required=True, help="PNG to write")
    return parser.parse_args(argv)


def check_output(output: Path, logs: Sequence[str]) -> None:
    """Raise LightningDiTError unless `output` is a new PNG, or curves that were drawn before."""
    if output.suffix.lower() != ".png" and not output.is_dir():
        raise LightningDiTError(f"{output} is to be a PNG and is not called so", f"name it {output.name}.png")
    refuse_inputs(output, logs)
    beside = any(Path(log).parent == output.parent for log in logs)  # the training's own, unmarked in earlier releases
    check_target(output, lambda path: holding(MARK)(path) or (beside and path.name == CURVES))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    args = parse(argv)
    check_output(Path(args.output), args.logs)
    runs = {str(Path(log).parent): read_log(log) for log in args.logs}
    save_curves(runs, args.output)
    print(f"wrote {args.output}: {', '.join(quantities(runs))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
