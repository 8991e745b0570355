#!/usr/bin/env python3
"""Step 2: get the weights into models/ and check them; a rerun goes on where it stopped.

Good files in models/ stay, files in an attached folder are linked, the rest is downloaded. The bundled model comes with
the project and needs no download.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK, format_bytes, importing

with importing(__name__):
    from LightningDiT.errors import LightningDiTError
    from LightningDiT.files import require_writable
    from setup_steps import checks, convert, downloads, machine, plans, project, sources, weights

A_DAY = 86_400.0  # seconds


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", choices=[*weights.SETS], default="800ep", help="default: 800ep")
    add("--only", choices=weights.ROLES, help="one kind of file of that model")
    add("--source", choices=sources.KINDS, help="default: auto, the attached folder and then the hub")
    add("--attached", type=Path, metavar="FOLDER", help="searched by file name (on Kaggle: /kaggle/input)")
    add("--folder", type=Path, metavar="FOLDER", help="searched by file name, instead of the hub")
    add("--convert", choices=weights.PRECISIONS, help="the transformer's weights alone, as safetensors")
    add("--replace", action="store_true", help="remove the original when its converted copy is proved")
    add("--verify", action="store_true", help="compare the files in models/ byte by byte, fetch nothing")
    weights.add_models_option(parser)
    add("--endpoint", metavar="URL", help="a mirror of the hub (or HF_ENDPOINT)")
    add("--timeout", type=float, default=30.0, metavar="S", help="default: 30")
    add("--attempts", type=int, default=6, metavar="N", help="default: 6")
    add("--dry-run", action="store_true", help="only say what would be done")
    options = parser.parse_args(argv)
    options.source = options.source or ("folder" if options.folder else "auto")
    if not options.attached and options.source in ("auto", "attached"):
        options.attached = weights.attached_folder()
    for wrong, message in usage_faults(options):
        if wrong:
            parser.error(message)
    options.patience = downloads.Patience(timeout=options.timeout, attempts=options.attempts)
    return options


def usage_faults(options: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return conditions of options that do not go together or are out of range, with their messages."""
    bundled = options.model == "bundled"
    chosen = bool(options.only or options.convert or options.folder or options.endpoint or options.source != "auto")
    return [
        (bundled and chosen, "options of a download do not go with --model bundled, which needs none"),
        (not 0 < options.timeout <= A_DAY, "--timeout takes seconds above 0, at most a day"),
        (options.attempts < 1, "--attempts takes a number from 1"),
        (options.dry_run and options.verify, "--verify changes nothing: omit --dry-run"),
        (options.replace and not options.convert, "--replace goes with --convert"),
        (bool(options.convert) and options.only not in (None, "dit"), "--convert is for the transformer, --only dit"),
        (bool(options.convert) and options.verify, "--verify changes nothing: omit --convert"),
        (bool(options.folder) != (options.source == "folder"), "--folder FOLDER and --source folder go together"),
        (options.source == "attached" and not options.attached, "--source attached goes with --attached FOLDER"),
        (
            bool(options.attached) and options.source in ("hub", "folder"),
            f"--attached does not go with --source {options.source}",
        ),
    ]


def source_of(options: argparse.Namespace) -> sources.Source:
    """Return where files may come from, after a check of the folder to search."""
    folder = options.folder or options.attached
    source = sources.Source(options.source, project.absolute(folder) if folder else None)
    source.require_folder()
    return source


def check_bundled() -> None:
    """Open the bundled model's files and say that nothing has to be fetched."""
    weights.require_bundled()
    faults = checks.bundled_faults(weights.BUNDLED)
    if faults:
        raise LightningDiTError("; ".join(faults), weights.RESTORE_BUNDLED)
    size = sum((weights.BUNDLED / name).stat().st_size for name in weights.BUNDLED_FILES)
    print(f"The bundled model is in {weights.BUNDLED} ({format_bytes(size)}).")
    print("Nothing to download.")


def show_plan(files: tuple[weights.WeightFile, ...], source: sources.Source, options: argparse.Namespace) -> None:
    """Print what would be done for each file; nothing is opened and nobody is asked."""
    for file in files:
        print("  " + plans.foresee(file, options.models_dir, source))
        if options.convert and file.role == "dit":
            name = weights.converted_name(file.name, options.convert)
            print(f"  {name}: would be written{' in place of the original' if options.replace else ''}")


def verify_all(files: tuple[weights.WeightFile, ...], source: sources.Source, options: argparse.Namespace) -> None:
    """Compare every file, one line each; raise one LightningDiTError for all that are absent or damaged."""
    record = checks.Record(options.models_dir)
    faults = []
    for file in files:
        try:
            for line in checks.verify_present(file, options.models_dir, record, source, options.patience):
                print("  " + line)
        except LightningDiTError as error:
            faults.append(error)
    if faults:
        raise LightningDiTError("; ".join(error.message for error in faults), faults[0].fix)


def get_all(files: tuple[weights.WeightFile, ...], source: sources.Source, options: argparse.Namespace) -> None:
    """Plan every file, check the disk once for all of them, then link or fetch, open and convert."""
    folder, patience = options.models_dir, options.patience
    record = checks.Record(folder)
    todo = [plans.make_plan(file, folder, record, source, patience) for file in files]
    needed = sum(plans.bytes_to_write(plan, options.convert) for plan in todo)
    if needed or any(plan.found for plan in todo):
        require_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    if needed:
        downloads.require_disk(folder, needed)
        kept = weights.keeps_on_kaggle(folder, needed)
        if kept:
            print(f"  {kept}")
        wanted = sum(bool(plan.remote) for plan in todo)
        print(f"{wanted} of {len(todo)} files to fetch, {format_bytes(needed)} to write.")
    for plan in todo:
        print("  " + plans.carry_out(plan, record, patience))
    for plan in todo:
        if options.convert and plan.file.role == "dit":
            print("  " + convert.convert(plan.target, plan.file, options.convert, options.replace))


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    print(f"Step 2: weights of the model '{options.model}'")
    named: Path | None = None
    if options.model == "bundled":
        weights.say_unused(options.models_dir)
        check_bundled()
    else:
        downloads.use_endpoint(options.endpoint)
        named, options.models_dir = options.models_dir, weights.models_folder(options.models_dir)
        work = show_plan if options.dry_run else verify_all if options.verify else get_all
        if not options.dry_run:  # before hours of fetching
            machine.require_torch("opening the files")
        work(weights.files_of(options.model, options.only), source_of(options), options)
    model = "auto" if options.model == "all" else options.model
    print(f"Next: {project.step_command(project.STEP3, '--model', model, *weights.named_models(named))}")
    return OK


if __name__ == "__main__":
    project.run(main)
