"""The jobs of the study: commands that a user could give, run one after another, each in a process of its own.

A job that was stopped goes on by itself; the file that it makes says that it is done.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from LightningDiT.console import duration
from LightningDiT.errors import LightningDiTError
from studies.convergence.arms import (
    ALIGNED,
    ARMS,
    PLAIN,
    TOKENIZER_END,
    TRANSFORMER,
    VISION_FILE,
    VISION_MODEL,
    Plan,
    run_name,
    start_name,
)

PROJECT = Path(__file__).parents[2]
STOPPED = 130  # exit code of a command that Ctrl-C ended


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        command: the module that `python -m` runs, with its arguments.
        makes: the file that it writes at its end.
    """

    name: str
    command: tuple[str, ...]
    makes: Path


def jobs_of(plan: Plan) -> list[Job]:
    """Return every job of the study in their order: each needs what earlier ones make."""
    data, vision = ("--data-root", plan.data_root), plan.folder / VISION_FILE
    options = ("--model", VISION_MODEL, "--epochs", str(plan.vision_epochs), "--output", str(vision))
    jobs = [Job("vision", ("studies.train_vision_model", *data, *options), vision)]
    for name in (PLAIN, ALIGNED):
        jobs += _tokenizer_jobs(name, plan, data)
    names = [run_name(arm, seed) for seed in plan.seeds for arm in ARMS]
    names += [start_name(arm, seed) for seed in plan.seeds for arm in ARMS if arm.quick]
    for name in names:
        run, figures = plan.folder / name, plan.folder / f"{name}.json"
        config, output = ("--config", f"{run}.yaml"), ("--count", str(plan.count), "--output", str(figures))
        evaluate = ("studies.convergence.evaluate_checkpoints", *config, "--run", str(run), *data, *output)
        jobs.append(Job(name, ("LightningDiT.train", *config, "--output", str(run)), run / TRANSFORMER))
        jobs.append(Job(f"{name}-evaluated", evaluate, figures))
    return jobs


def _tokenizer_jobs(name: str, plan: Plan, data: tuple[str, str]) -> list[Job]:
    """Return the jobs that train a tokenizer, evaluate it, and encode the training images."""
    config = ("--config", str(plan.folder / f"tokenizer-{name}.yaml"))
    trained, evaluated, latents = (plan.folder / f"{what}-{name}" for what in ("tokenizer", "evaluation", "latents"))
    first = next(arm for arm in ARMS if arm.tokenizer == name)
    transformer = ("--config", str(plan.folder / f"{run_name(first, plan.seeds[0])}.yaml"))
    train = ("LightningDiT.train_tokenizer", *config, *data, "--output", str(trained))
    encode = ("LightningDiT.extract_features", *transformer, *data, "--output", str(latents))
    evaluate = ("LightningDiT.evaluate_tokenizer", *config, *data, "--features", "judge", "--output", str(evaluated))
    return [
        Job(f"tokenizer-{name}", train, trained / TOKENIZER_END),
        Job(f"latents-{name}", encode, latents / "latents_stats.pt"),
        Job(f"evaluation-{name}", evaluate, evaluated / "evaluation.json"),
    ]


def run_jobs(jobs: Sequence[Job]) -> None:
    """Run the jobs that are not done.

    Raises:
        LightningDiTError: a job failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended a job.
    """
    missing = [job for job in jobs if not job.makes.exists()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} parts are there", flush=True)
    for job in missing:
        print(f"{job.name}: python -m {' '.join(job.command)}", flush=True)
        started, code = time.monotonic(), exit_code(job.command)
        if code == STOPPED:
            raise KeyboardInterrupt
        if code or not job.makes.exists():
            raise LightningDiTError(f"{job.name} failed with exit code {code}", "see above, and give the command again")
        print(f"{job.name}: done in {duration(time.monotonic() - started)}", flush=True)


def exit_code(command: Sequence[str]) -> int:
    """Run `python -m` and return its exit code; Ctrl-C or SIGTERM here is Ctrl-C there: it saves and ends."""
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=PROJECT, start_new_session=True)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: process.send_signal(signal.SIGINT)) for number in numbers]
    try:
        return process.wait()
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
