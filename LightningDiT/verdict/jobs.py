"""Jobs of step 6 and of studies: commands that a user could give, one after another, each in a process of its own.

A job that was stopped goes on by itself; the file that it makes, or the number of its images, says that it is done.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from LightningDiT.console import duration
from LightningDiT.data.labels import LATENTS_MANIFEST
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json

PROJECT = Path(__file__).parents[2]  # the folder that holds the package
#: Exit codes of a command that Ctrl-C or SIGTERM ended, by its own handling or before it had one.
STOPPED = (130, -signal.SIGINT, -signal.SIGTERM)
#: Signals that end the work here; the last one is not on Windows.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
#: Runs a module as `python -m` does; Ctrl-C while it starts or imports ends it without a traceback.
RUN = """
import runpy, signal, sys
try:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        command: the module that `python -m` runs, with its arguments.
        makes: the file that it writes at its end, or the folder of its images.
        images: how many PNG files, in subfolders of `makes`, are all; 0: `makes` is a file.
    """

    name: str
    command: tuple[str, ...]
    makes: Path
    images: int = 0

    @property
    def is_done(self) -> bool:
        if self.makes.name == LATENTS_MANIFEST:
            return _names_shards(self.makes)
        if not self.images:
            return self.makes.exists()
        return sum(1 for _ in self.makes.glob("*/*.png")) >= self.images


def _names_shards(manifest: Path) -> bool:
    """Return whether an extraction of latents has ended: it names its shards then, while one that began does not."""
    try:
        return "shards" in read_json(manifest)
    except (OSError, ValueError):
        return False


def run_jobs(jobs: Sequence[Job]) -> None:
    """Run the jobs that are not done.

    Raises:
        LightningDiTError: a job failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM ended a job.
    """
    missing = [job for job in jobs if not job.is_done]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} parts are there", flush=True)
    for job in missing:
        print(f"{job.name}: python -m {' '.join(job.command)}", flush=True)
        started, code = time.monotonic(), exit_code(job.command)
        if code in STOPPED:
            raise KeyboardInterrupt
        if code or not job.is_done:
            raise LightningDiTError(f"{job.name} failed with exit code {code}", "see above, and give the command again")
        print(f"{job.name}: done in {duration(time.monotonic() - started)}", flush=True)


def exit_code(command: Sequence[str]) -> int:
    """Run `python -m` and return its exit code.

    Ctrl-C, SIGTERM or the end of the terminal here is Ctrl-C there: it saves and ends.
    """
    with _kept_back():
        process = subprocess.Popen([sys.executable, "-c", RUN, *command], cwd=PROJECT, start_new_session=True)
        before = [signal.signal(number, lambda *_: process.send_signal(signal.SIGINT)) for number in SIGNALS]
    try:
        return process.wait()
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _kept_back() -> Iterator[None]:
    """Keep signals back within the block, and in processes that start in it: one that comes before a process can handle
    it would leave that process alone, or end it in Python's start with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
