"""Processes that share a run of the whole suite, by pytest-xdist where that is installed."""

from __future__ import annotations

import os

import pytest

#: Each holds torch and the models of its tests, which is 1 to 2 GB.
MOST = 4


def usable_cores() -> int:
    """Return the number of cores that this process may use, without an import of torch."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let one process a core, at most MOST, share a run of the whole suite, if pytest-xdist is installed.

    A run of named files, of the tests on a GPU or in a debugger stays in one process, and options of pytest-xdist are
    left as they are given: `-n 0` is one process too. Processes that share a run have one thread each.
    """
    option, cores = config.option, usable_cores()
    if hasattr(config, "workerinput") or not hasattr(option, "numprocesses"):
        return
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    alone = cores == 1 or option.gpu or option.usepdb or option.trace
    if option.numprocesses is None and option.dist == "no" and whole and not alone:
        option.numprocesses, option.dist = min(MOST, cores), "worksteal"
    if option.numprocesses:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # they and the processes of their tests inherit it
