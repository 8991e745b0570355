#!/usr/bin/env python3
"""Step 6: adapt generators to a few images of each person, and generate windows of everybody.

For each fold and number of images a person, tokenizer and networks are trained on these images alone, the weights whose
samples are worth most on validation passes are chosen, and four windows are generated for each real one. What is done
stays: the same command goes on after Ctrl-C or a kill, and one with further --folds or --images adds these.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import OK, natural, positive, seed_number
from LightningDiT.files import held_folder, require_writable
from setup_steps import project

if TYPE_CHECKING:
    from LightningDiT.radar.split import Split
    from LightningDiT.verdict.plan import Plan

SCRIPT, NEXT = "step6_adapt_models.py", "step7_judge_generated.py"
OUTPUT = project.PROJECT / "adapted"
SPLIT, LEVELS = (project.PROJECT / "spectrograms" / name for name in ("split.json", "levels"))
PRESETS = ("quick", "standard", "full")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="quick (default): 2 CPU cores, half an hour; standard: a T4; full: a night")
    add("--levels", type=Path, metavar="FOLDER", help="written by step 5; default: spectrograms/levels")
    add("--split-file", type=Path, metavar="FILE", help="of step 5; default: spectrograms/split.json")
    add("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"for all results; default: {OUTPUT.name}")
    add("--images", type=images, nargs="+", metavar="N", help="of a person, all for all of them; several are compared")
    add("--folds", type=natural, nargs="+", metavar="N", help="of the split")
    add("--models", choices=("transformer", "unet"), nargs="+", help="the U-Net needs diffusers")
    add("--trainable", choices=("all", "bias", "lora"), help="default: bias from models/walkers, else all; lora: peft")
    add("--steps", type=positive, metavar="N", help="of each network's training, at most")
    add("--tokenizer-steps", type=positive, metavar="N", help="of each tokenizer's training")
    add("--generated", type=positive, metavar="N", help="windows for each real one; default: 4, which step 7 wants")
    add("--guidance-scale", type=float, metavar="S", help="of the generated windows; default: 1, without guidance")
    add("--unseen", metavar="NAME", help="a condition that no network may see, or pairs: of person and condition")
    add("--seed", type=seed_number, metavar="N", help="of trainings and generated windows; default: 0")
    add("--time-budget", type=float, metavar="MINUTES", help="shorten the trainings so that all is done within")
    add("--dry-run", action="store_true", help="only check, estimate the time and end")
    options = parser.parse_args(argv)
    for wrong, message in (
        (options.time_budget is not None and not 0 < options.time_budget < 1e6, "--time-budget takes minutes above 0"),
        (options.guidance_scale is not None and not 1 <= options.guidance_scale <= 20, "--guidance-scale: 1 to 20"),
    ):
        if wrong:
            parser.error(message)
    return options


def images(text: str) -> int | str:
    """Return the value of --images: a number, or the text all."""
    return text if text == "all" else positive(text)


def asked(options: argparse.Namespace, output: Path) -> tuple[Plan, Split, Plan | None]:
    """Return the plan, its split, and the plan that the folder has begun with."""
    from LightningDiT.radar.split import load_split
    from LightningDiT.verdict.plan import PLAN, asked_plan, load_plan

    kept = load_plan(output) if (output / PLAN).exists() else None
    levels, split_file = (
        project.absolute(given) if given else own
        for given, own in (
            (options.levels, kept.levels if kept else LEVELS),
            (options.split_file, kept.split_file if kept else SPLIT),
        )
    )
    plan, began = asked_plan(
        *(output, levels, split_file, options.preset),
        images=options.images and tuple(None if number == "all" else number for number in options.images),
        folds=options.folds and tuple(options.folds),
        models=options.models,
        trainable=options.trainable,
        steps=options.steps,
        tokenizer_steps=options.tokenizer_steps,
        generated=options.generated,
        guidance=options.guidance_scale,
        seed=options.seed,
        unseen=options.unseen,
    )
    return plan, load_split(plan.split_file), began


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from LightningDiT.verdict.adapting import check_files, describe, jobs_of, write_cells
    from LightningDiT.verdict.jobs import run_jobs
    from LightningDiT.verdict.plan import save_plan
    from LightningDiT.verdict.time_needed import within

    print("Step 6: generators of a few images of each person", flush=True)
    output = project.absolute(options.output)
    plan, split, began = asked(options, output)
    if began:
        given = options.time_budget or options.steps or options.tokenizer_steps
        idle = "; its numbers of steps stay, whatever --time-budget and --steps say" if given else ""
        print(f"note: {output} has begun with this plan, which goes on{idle}")
        if plan != began:
            within(plan, split, None, began.cells)
    else:
        plan = within(plan, split, options.time_budget)
    check_files(plan, output, split)
    for line in describe(plan, split):
        print(line, flush=True)
    if options.dry_run:
        return OK
    require_writable(output)
    with held_folder(output, "adaptation"):
        save_plan(plan, output)
        write_cells(plan, output, split)
        run_jobs(jobs_of(plan, output, split))
    command = project.step_command(NEXT, *(() if output == OUTPUT else ("--adapted", str(output))))
    for line in project.in_both(f"Next: {command}", f"下一步：判断生成的数据是否有帮助：{command}"):
        print(line)
    return OK


if __name__ == "__main__":
    project.run(main)
