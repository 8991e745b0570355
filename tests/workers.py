"""Processes that share a run of the whole suite, by pytest-xdist where that is installed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from LightningDiT.console import format_bytes
from LightningDiT.files import free_bytes, try_lock

#: Each, or a process that its test starts, takes up to 5 GB of memory.
MOST = 2
#: Bytes that the files of a whole run take at most at a time.
DISK = 3_000_000_000


def usable_cores() -> int:
    """Return the number of cores that this process may use, without an import of torch."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let MOST processes, but no more than cores, share a run of the whole suite, if pytest-xdist is installed.

    A run of named files, of the tests on a GPU or in a debugger stays in one process, and options of pytest-xdist are
    left as they are given: `-n 0` is one process too. Processes that share a run have one thread each. A whole run
    begins only where its files fit on the disk.
    """
    option, cores = config.option, usable_cores()
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if whole and not hasattr(config, "workerinput"):
        require_disk(Path(tempfile.gettempdir()))
    if hasattr(config, "workerinput") or not hasattr(option, "numprocesses"):
        return
    alone = cores == 1 or option.gpu or option.usepdb or option.trace
    if option.numprocesses is None and option.dist == "no" and whole and not alone:
        option.numprocesses = min(MOST, cores)
    if option.numprocesses:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # they and the processes of their tests inherit it
        option.dist = "worksteal" if option.dist == "no" else option.dist  # the tests of a file stay together


def require_disk(folder: Path) -> None:
    """Raise pytest.UsageError if the files of a whole run do not fit into a folder: a full disk fails any test."""
    free = free_bytes(folder)
    if free < DISK:
        raise pytest.UsageError(
            f"{folder} has {format_bytes(free)} free, and the tests need {format_bytes(DISK)};"
            " free some, or name another folder: TMPDIR=FOLDER python -m pytest"
        )


@contextlib.contextmanager
def shared_folder(request: pytest.FixtureRequest, factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that all processes of this run share; one of them at a time is within the block."""
    base = factory.getbasetemp()  # of this process, in the folder of the run if others share it
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("wb") as lock:
        while not try_lock(lock):
            time.sleep(0.1)
        yield folder
