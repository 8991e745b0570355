"""The jobs of the study, in the order in which each finds what it needs."""

from __future__ import annotations

from pathlib import Path

from LightningDiT.verdict.jobs import Job
from studies.small_data.cells import CELLS, CHOSEN, FOLD, OTHERS, SPLIT, Plan

#: Options of the two populations. Their people have other names, so that no class of a start is taken for one of them.
POPULATIONS = {
    "own": ("--seed", "31"),
    OTHERS: ("--seed", "7", "--layout", "people-conditions", "--conditions", "Normal_line"),
}
DB_RANGE = ("-45", "0")


def jobs_of(plan: Plan) -> list[Job]:
    """Return every job of the study: walkers, tokenizer, latents, trainings."""
    jobs = [job for name in POPULATIONS for job in _data_jobs(name, plan)]
    jobs.append(_tokenizer_job(plan))
    folders: dict[Path, Job] = {}
    for cell in CELLS:
        data = plan.data(cell)
        for part, draws in (("training", cell.draws), ("validation", 1)):
            output = plan.latents(cell, part)
            options = ("--levels", str(data / "levels"), "--split-file", str(data / SPLIT), "--fold", str(FOLD))
            config = ("--config", str(plan.folder / f"{cell.name}.yaml"))
            extract = ("LightningDiT.extract_features", *config, *options, "--part", part, "--output", str(output))
            extract += ("--draws", str(draws)) if part == "training" else ()
            folders.setdefault(output, Job(output.name, extract, output / "manifest.json"))
    trainings = [
        Job(
            cell.name,
            (
                "LightningDiT.train",
                "--config",
                str(plan.folder / f"{cell.name}.yaml"),
                "--output",
                str(plan.folder / cell.name),
            ),
            plan.folder / cell.name / CHOSEN,
        )
        for cell in CELLS
    ]
    return [*jobs, *folders.values(), *trainings]


def _data_jobs(name: str, plan: Plan) -> list[Job]:
    """Return the jobs that simulate a population, split it by pass, and write its levels."""
    folder = plan.folder / name
    walkers, counts = folder / "walkers", ("--people", str(plan.people), "--windows", str(plan.windows))
    simulate = ("LightningDiT.tools.simulate_walkers", "--output", str(walkers), *counts, *POPULATIONS[name])
    prepare = ("step5_prepare_spectrograms", "--data", str(walkers), "--output", str(folder / "parts"))
    prepare += ("--write", str(folder / "levels"), "--size", str(plan.size), "--db-range", *DB_RANGE)
    return [
        Job(f"{name}-walkers", simulate, walkers / "walkers.json"),
        Job(f"{name}-levels", prepare, folder / SPLIT),
    ]


def _tokenizer_job(plan: Plan) -> Job:
    """Return the job that adapts the bundled tokenizer, by the first population's training windows."""
    data = plan.folder / "own"
    options = ("--levels", str(data / "levels"), "--split-file", str(data / SPLIT), "--fold", str(FOLD))
    output = ("--steps", str(plan.tokenizer_steps), "--output", str(plan.folder / "tokenizer"))
    return Job(
        "tokenizer", ("LightningDiT.tools.choose_tokenizer", *options, *output), plan.folder / "tokenizer/chosen.yaml"
    )
