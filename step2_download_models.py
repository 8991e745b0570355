#!/usr/bin/env python3
"""Step 2: fetch the weights into models/ and check them; a rerun goes on where it stopped.

The bundled model comes with the project and needs no download.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import console, downloads, fetch, weights


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*weights.SETS], default="800ep", help="default: 800ep")
    parser.add_argument("--only", choices=weights.ROLES, help="one kind of file of that model")
    parser.add_argument("--verify", action="store_true", help="hash what is there, fetch nothing")
    parser.add_argument("--models-dir", type=Path, default=weights.MODELS, metavar="FOLDER")
    parser.add_argument("--endpoint", metavar="URL", help="a mirror of the hub (or HF_ENDPOINT)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="default: 30")
    parser.add_argument("--attempts", type=int, default=6, metavar="N", help="default: 6")
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched")
    options = parser.parse_args(argv)
    if options.model == "bundled" and options.only:
        parser.error("--only does not go with --model bundled, which needs no download")
    if options.timeout <= 0 or options.attempts < 1:
        parser.error("--timeout takes seconds above 0, --attempts a number from 1")
    return options


def check_bundled() -> int:
    """Open the bundled model's files and say that nothing has to be fetched."""
    missing = weights.missing_bundled()
    if missing:
        raise console.StepError(f"{weights.BUNDLED} lacks {', '.join(missing)}", weights.RESTORE_BUNDLED)
    faults = fetch.bundled_faults(weights.BUNDLED)
    if faults:
        raise console.StepError("; ".join(faults), weights.RESTORE_BUNDLED)
    size = sum((weights.BUNDLED / name).stat().st_size for name in weights.BUNDLED_FILES)
    print(f"The bundled model is in {weights.BUNDLED} ({console.format_bytes(size)}).")
    print("Nothing to download.")
    return console.OK


def show_plan(files: tuple[weights.WeightFile, ...], folder: Path) -> int:
    """Print the files, where from and where to; no network."""
    for file in files:
        state = "is there" if (folder / file.name).is_file() else "absent"
        size = console.format_bytes(file.approx_bytes)
        print(f"  {file.name}: about {size} from {file.repo} to {folder} ({state})")
    return console.OK


def fetch_all(files: tuple[weights.WeightFile, ...], folder: Path, patience: downloads.Patience) -> int:
    """Plan every file, check the disk once for all of them, then fetch and open each."""
    console.require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = fetch.Record(folder)
    plans = [fetch.make_plan(file, folder, record, patience) for file in files]
    wanted = [plan for plan in plans if plan.fetch]
    total = sum(downloads.bytes_to_fetch(plan.remote, plan.target) for plan in wanted)
    if wanted:
        downloads.require_disk(folder, total)
        print(f"{len(wanted)} of {len(plans)} files to fetch, {console.format_bytes(total)}.")
    for plan in plans:
        print("  " + fetch.carry_out(plan, record, patience))
    return console.OK


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    print(f"Step 2: weights of the model '{options.model}'")
    files = weights.files_of(options.model, options.only)
    folder = options.models_dir.resolve()
    patience = downloads.Patience(timeout=options.timeout, attempts=options.attempts)
    if options.model != "bundled":
        downloads.use_endpoint(options.endpoint)
    if options.model == "bundled":
        code = check_bundled()
    elif options.dry_run:
        code = show_plan(files, folder)
    elif options.verify:
        record = fetch.Record(folder)
        for file in files:
            print("  " + fetch.verify_present(file, folder, record, patience))
        code = console.OK
    else:
        code = fetch_all(files, folder, patience)
    model = "auto" if options.model == "all" else options.model
    print(f"Next: python step3_setup_configs.py --model {model}")
    return code


if __name__ == "__main__":
    console.run(main)
