"""The commands of the study, which need one another's files, and their running: several at once, each in its process.

Every job is a command that a person could give; it goes on by itself where it was stopped, and its file says that it is
done. What it prints is in `logs/`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
STATUS_EVERY = 60.0  # seconds
POLL_EVERY = 0.2  # seconds


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        command: what `python -m` runs, with its arguments.
        makes: the file that is there once it is done.
        needs: files that must be there before.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[Path, ...] = ()

    @property
    def done(self) -> bool:
        """Whether its file is there."""
        return self.makes.exists()

    @property
    def ready(self) -> bool:
        """Whether all that it needs is there."""
        return all(path.exists() for path in self.needs)


def jobs_of(plan: Plan) -> list[Job]:
    """Return every job of the study, in the order in which they are begun where nothing hinders: trainings first."""
    vision = plan.folder / VISION_FILE
    module = "studies.train_vision_model"
    options = ("--model", VISION_MODEL, "--epochs", str(plan.vision_epochs), "--output", str(vision))
    jobs = [Job("vision", (module, "--data-root", plan.data_root, *options), vision)]
    for name in (PLAIN, ALIGNED):
        jobs += _tokenizer_jobs(name, plan, (vision,) if name == ALIGNED else ())
    runs = [(run_name(arm, seed), arm.tokenizer) for seed in plan.seeds for arm in ARMS]
    runs += [(start_name(arm, seed), arm.tokenizer) for seed in plan.seeds for arm in ARMS if arm.quick]
    jobs += [_training_job(name, tokenizer, plan) for name, tokenizer in runs]
    return jobs + [_judging_job(name, plan) for name, _ in runs]


def _tokenizer_jobs(name: str, plan: Plan, needs: tuple[Path, ...]) -> list[Job]:
    """Return the jobs that train a tokenizer, measure it, and encode the training images."""
    config, data = str(plan.folder / f"tokenizer-{name}.yaml"), ("--data-root", plan.data_root)
    trained, measured, latents = (plan.folder / f"{what}-{name}" for what in ("tokenizer", "evaluation", "latents"))
    end = trained / TOKENIZER_END
    first = next(arm for arm in ARMS if arm.tokenizer == name)
    transformer = str(plan.folder / f"{run_name(first, plan.seeds[0])}.yaml")
    train = ("LightningDiT.train_tokenizer", "--config", config, *data, "--output", str(trained))
    encode = ("LightningDiT.extract_features", "--config", transformer, *data, "--output", str(latents))
    judge = ("LightningDiT.evaluate_tokenizer", "--config", config, *data, "--features", "judge")
    return [
        Job(f"tokenizer-{name}", train, end, needs),
        Job(f"latents-{name}", encode, latents / "latents_stats.pt", (end,)),
        Job(f"evaluation-{name}", (*judge, "--output", str(measured)), measured / "evaluation.json", (end,)),
    ]


def _training_job(name: str, tokenizer: str, plan: Plan) -> Job:
    """Return the job that trains a transformer."""
    command = ("LightningDiT.train", "--config", str(plan.folder / f"{name}.yaml"), "--output", str(plan.folder / name))
    stats = plan.folder / f"latents-{tokenizer}" / "latents_stats.pt"
    return Job(name, command, plan.folder / name / TRANSFORMER, (stats,))


def _judging_job(name: str, plan: Plan) -> Job:
    """Return the job that judges the checkpoints of a training."""
    run, figures = plan.folder / name, plan.folder / f"{name}.json"
    judge = ("studies.convergence.judging", "--config", f"{run}.yaml", "--run", str(run))
    options = ("--data-root", plan.data_root, "--count", str(plan.count), "--output", str(figures))
    return Job(f"{name}-judged", (*judge, *options), figures, (run / TRANSFORMER,))


def run_jobs(jobs: Sequence[Job], at_once: int, logs: Path) -> None:
    """Run what is not done, `at_once` jobs at a time, which share the processor's cores.

    Ctrl-C, or SIGTERM, is passed on to them once, and they end as they do by themselves: with everything saved.

    Raises:
        LightningDiTError: a job failed; those under way were stopped in the same manner.
    """
    waiting = [job for job in jobs if not job.done]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} parts are there; logs are in {logs}", flush=True)
    logs.mkdir(parents=True, exist_ok=True)
    pool = _Pool(logs, max(1, (os.cpu_count() or 1) // at_once))
    with _interrupted_by(signal.SIGINT, signal.SIGTERM):  # a shell's background jobs else ignore Ctrl-C
        try:
            while waiting or pool.running:
                for job in [job for job in waiting if job.ready][: at_once - len(pool.running)]:
                    waiting.remove(job)
                    pool.start(job)
                pool.look()
                time.sleep(POLL_EVERY)
        finally:
            pool.stop()


@contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Let each of these signals raise KeyboardInterrupt within the block, where it runs in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Pool:
    """The jobs under way, each with `threads` threads."""

    def __init__(self, logs: Path, threads: int) -> None:
        self.running: dict[Job, subprocess.Popen[bytes]] = {}
        self._logs, self._threads = logs, threads
        self._started: dict[Job, float] = {}
        self._said = time.monotonic()

    def start(self, job: Job) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(self._threads)}
        print(f"{job.name}: python -m {' '.join(job.command)}", flush=True)
        with self._log(job).open("ab") as stream:  # apart from the terminal: Ctrl-C reaches it once, by `stop`
            self.running[job] = subprocess.Popen(
                [sys.executable, "-m", *job.command],
                cwd=PROJECT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started[job] = time.monotonic()

    def look(self) -> None:
        """Take out what has ended, and say now and then how far the others are."""
        for job, process in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[job]
            if process.returncode or not job.done:
                raise LightningDiTError(
                    f"{job.name} failed with exit code {process.returncode}: {self._last_line(job)}",
                    f"look at {self._log(job)}, and give the same command again",
                )
            print(f"{job.name}: done in {duration(time.monotonic() - self._started[job])}", flush=True)
        if self.running and time.monotonic() - self._said > STATUS_EVERY:
            self._said = time.monotonic()
            print("\n".join(f"  {job.name}: {self._last_line(job)}" for job in self.running), flush=True)

    def stop(self) -> None:
        """Ask what is under way to end, and wait for it."""
        for process in self.running.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        for process in self.running.values():
            process.wait()

    def _log(self, job: Job) -> Path:
        return self._logs / f"{job.name}.log"

    def _last_line(self, job: Job) -> str:
        lines = self._log(job).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "nothing said yet")
