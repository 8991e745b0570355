"""Open a page on which a person samples models: `lightningdit demo`.

Classes by name, guidance, seed, solver, steps and number of images; the images form step by step, and the command that
makes the same ones stands below. Offered are the models in models/, those of step 6, and the bundled one.
The page is for this machine alone unless --host says otherwise. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.console import OK, positive, program, reads_chinese, run_main

HOST = "127.0.0.1"
PROJECT = Path(__file__).resolve().parents[2]
OUTPUT = Path("output") / "demo"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("command.demo"), description=__doc__)
    parser.add_argument("--config", nargs="+", type=Path, metavar="FILE", help="further models, offered first")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder of the images; default: {OUTPUT}")
    parser.add_argument(
        "--host", default=HOST, help=f"address to serve at; default {HOST}: this machine alone; 0.0.0.0: everybody"
    )
    parser.add_argument("--port", type=positive, help="default: the first free one from 7860 on")
    parser.add_argument("--dry-run", action="store_true", help="print what would be offered and exit")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Find the models, serve the page, and wait for Ctrl-C."""
    args = parse(argv)
    from LightningDiT.demo.choices import find_models
    from LightningDiT.demo.session import Studio
    from LightningDiT.demo.texts import CHINESE, ENGLISH

    models, left_out = find_models(list(dict.fromkeys([Path.cwd(), PROJECT])), args.config or [])
    for model in models.values():
        print(f"model          {model.name}: {model.config.model.model_type}, {model.path}", flush=True)
    for reason in left_out:
        print(f"not offered    {reason}", flush=True)
    print(f"images         {args.output}", flush=True)
    if args.dry_run:
        return OK
    from LightningDiT.demo.page import Page
    from LightningDiT.demo.serving import served, wait

    page = Page(Studio(models, args.output), CHINESE if reads_chinese() else ENGLISH)
    with served(page, args.host, args.port) as address:
        print(f"page           {address} (Ctrl-C ends it)", flush=True)
        try:
            wait()
        except KeyboardInterrupt:
            print("the page is closed", flush=True)
    return OK


if __name__ == "__main__":
    sys.exit(run_main(main))
