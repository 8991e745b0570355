"""The jobs of the study, in the order in which each finds what it needs."""

from __future__ import annotations

from pathlib import Path

from LightningDiT.radar.level_images import load_windows
from LightningDiT.radar.split import load_split, save_restricted
from LightningDiT.verdict.jobs import Job
from LightningDiT.verdict.rows import spread
from studies.small_data.cells import ADAPTER, CELLS, CHOSEN, FOLD, Cell, Plan

SEED = 31  # of the population, none of whom is in models/walkers
DB_RANGE = ("-45", "0")


def data_jobs(plan: Plan) -> list[Job]:
    """Return the jobs that simulate the people, split them by pass, and write their levels."""
    walkers = plan.folder / "walkers"
    counts = ("--people", str(plan.people), "--windows", str(plan.windows), "--seed", str(SEED))
    prepare = ("--data", str(walkers), "--output", str(plan.split.parent), "--write", str(plan.levels))
    prepare += ("--size", str(plan.size), "--db-range", *DB_RANGE)
    return [
        Job(
            "walkers",
            ("LightningDiT.tools.simulate_walkers", "--output", str(walkers), *counts),
            walkers / "walkers.json",
        ),
        Job("levels", ("step5_prepare_spectrograms", *prepare), plan.split),
    ]


def write_splits(plan: Plan) -> None:
    """Write the splits in which each person has few training windows, evenly from the training passes."""
    split, windows = load_split(plan.split), load_windows(plan.levels, plan.split, "training", FOLD)
    for images in sorted({cell.images for cell in CELLS}):
        kept = windows.rows[spread(windows, images)].tolist()
        save_restricted(plan.few(images), split, plan.split, kept, FOLD)


def training_jobs(plan: Plan) -> list[Job]:
    """Return the jobs of the latents and of every training."""
    return [*_latents_jobs(plan), *(_training_job(plan, *run) for run in plan.runs)]


def _source(plan: Plan, images: int) -> tuple[str, ...]:
    return ("--levels", str(plan.levels), "--split-file", str(plan.few(images)), "--fold", str(FOLD))


def _latents_jobs(plan: Plan) -> list[Job]:
    jobs: dict[Path, Job] = {}
    for cell in CELLS:
        for part, draws in (("training", cell.draws), ("validation", 1)):
            output = plan.latents(cell, part)
            extract = ("LightningDiT.extract_features", "--config", str(plan.config(cell, 0)))
            extract += (*_source(plan, cell.images), "--part", part, "--output", str(output))
            extract += ("--draws", str(draws)) if part == "training" else ()
            name = f"{output.parent.name} {output.name}"
            jobs.setdefault(output, Job(name, extract, output / "manifest.json"))
    return list(jobs.values())


def _training_job(plan: Plan, cell: Cell, seed: int) -> Job:
    config, folder = plan.config(cell, seed), plan.run(cell, seed)
    command = ("LightningDiT.train", "--config", str(config), "--output", str(folder))
    return Job(folder.name, command, folder / (ADAPTER if cell.is_adapter else CHOSEN))
