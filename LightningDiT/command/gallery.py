"""Write a page with one image of every class, each above the command that makes it: `lightningdit gallery CONFIG`.

The page is index.html in the folder --output; README.md beside it is the same for sites that show repositories. Images
are loaded as they come into sight, so a page of 1000 classes opens at once. A model with conditions shows every class
under every condition. The same command goes on after Ctrl-C or a kill.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from LightningDiT.config import describe_guidance, describe_solver, with_overrides
from LightningDiT.console import INTERRUPTED, OK, positive, program, run_main, seed_number
from LightningDiT.sampling.options import OPTIONS, minutes

OUTPUT = Path("output") / "gallery"
OWN = ("num_sampling_steps", "sampling_method", "cfg_scale")  # sampling settings that the command takes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog=program("command.gallery"), description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML of the published schema")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"default: {OUTPUT}")
    parser.add_argument("--conditions", nargs="+", metavar="CONDITION", help="numbers or names; default: every one")
    parser.add_argument("--seed", type=seed_number, default=0, help="of the noise, the same for every class; default 0")
    parser.add_argument("--steps", type=positive, help="points of the time grid")
    parser.add_argument("--solver", help="fast, published, euler, ab3, ...: docs/sampling.md")
    parser.add_argument("--guidance-scale", type=float, help="1 is off")
    parser.add_argument("--time-budget", type=minutes, metavar="MINUTES", help="stop after this time and keep all")
    parser.add_argument("--dry-run", action="store_true", help="print what would be made and exit")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the model, sample what is missing, and write the page."""
    args = parse(argv)
    from LightningDiT.demo.choices import find_models
    from LightningDiT.demo.gallery import PAGE, check_pages, entries_of, make_gallery, numbers_of_all, sampling_words

    model = next(iter(find_models([], [args.config])[0].values()))
    model = dataclasses.replace(model, path=str(args.config))  # as it was typed
    given = {key: getattr(args, OPTIONS[key][2:].replace("-", "_")) for key in OWN}
    config = dataclasses.replace(model.config, sample=with_overrides(model.config.sample, OPTIONS, **given))
    options = ["--seed", str(args.seed), *sampling_words({OPTIONS[key]: value for key, value in given.items()})]
    entries = entries_of(model, numbers_of_all(model, args.conditions), options)
    print(f"model          {config.model.model_type} from {config.ckpt_path}", flush=True)
    print(f"sampling       {describe_solver(config.sample)}; guidance {describe_guidance(config.sample)}", flush=True)
    print(f"images         {len(entries)} -> {args.output}", flush=True)
    check_pages(args.output)
    if args.dry_run:
        return OK
    there, stopped = make_gallery(model, config, entries, args.seed, args.output, args.time_budget)
    print(f"page           {args.output / PAGE}: {there} of {len(entries)} images", flush=True)
    if there < len(entries):
        print("The same command goes on.", flush=True)
    return INTERRUPTED if stopped and there < len(entries) else OK


if __name__ == "__main__":
    sys.exit(run_main(main))
