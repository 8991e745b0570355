"""A run of the whole suite is shared among processes, and any other run is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from LightningDiT.device import usable_cores
from setup_steps.project import PROJECT
from tests import workers

CONFTEST = """
import os
from tests import workers
from tests.workers import pytest_cmdline_main
workers.usable_cores = lambda: int(os.environ["CORES"])
workers.DISK = int(os.environ["DISK"])
def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true")
"""
#: Each test says which process it is in, how many threads that was told to use, and which folder it shares with whom.
SAYING = """
import os, time
from pathlib import Path
import pytest
from tests.workers import shared_folder
@pytest.mark.parametrize("number", range(4))
def test_place(number, request, tmp_path_factory):
    place = [os.environ.get(name, "own") for name in ("PYTEST_XDIST_WORKER", "OMP_NUM_THREADS")]
    with shared_folder(request, tmp_path_factory, "shared") as folder:
        with (folder / "held").open("x"):  # fails while another test is within
            time.sleep(0.05)
        (folder / "held").unlink()
    (Path(os.environ["PLACES"]) / str(number)).write_text("\\n".join([" ".join(place), str(folder)]))
"""


def run_suite(
    folder: Path, *options: str, cores: int = 2, disk: int = workers.DISK
) -> subprocess.CompletedProcess[str]:
    """Run a suite with the project's hook in a process."""
    (folder / "tests").mkdir()
    (folder / "places").mkdir()
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    (folder / "tests" / "test_it.py").write_text(SAYING)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "OMP_"))}
    added = {"PYTHONPATH": str(PROJECT), "CORES": str(cores), "DISK": str(disk), "PLACES": str(folder / "places")}
    added["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take a second to import; -p gives one
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, env={**kept, **added}, capture_output=True, text=True, check=False)


def places(folder: Path, *options: str, cores: int = 2) -> set[str]:
    """Return where the tests of such a run ran; they share one folder."""
    done = run_suite(folder, *options, cores=cores)
    assert " 4 passed" in done.stdout, done.stdout + done.stderr
    ran, shared = zip(*(path.read_text().splitlines() for path in (folder / "places").iterdir()), strict=True)
    assert len(set(shared)) == 1
    return set(ran)


def test_two_processes_share_the_whole_suite(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    assert places(tmp_path, "-p", "xdist", cores=8) == {"gw0 1", "gw1 1"}


@pytest.mark.parametrize("option", ["-n0", "tests/test_it.py", "--gpu"])
def test_other_runs_stay_in_one_process(tmp_path: Path, option: str) -> None:
    pytest.importorskip("xdist")
    assert places(tmp_path, "-p", "xdist", option) == {"own own"}


def test_one_core_is_one_process(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    assert places(tmp_path, "-p", "xdist", cores=1) == {"own own"}


def test_without_xdist_it_is_one_process(tmp_path: Path) -> None:
    assert places(tmp_path) == {"own own"}


def test_cores_are_those_of_the_process() -> None:
    assert workers.usable_cores() == usable_cores()


def test_a_disk_that_the_tests_would_fill_is_named_before_they_run(tmp_path: Path) -> None:
    free = workers.free_bytes(tmp_path)
    done = run_suite(tmp_path, disk=2 * free)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"free, and the tests need .*; free some, .*: TMPDIR=FOLDER python -m pytest", done.stderr)
    assert not list((tmp_path / "places").iterdir())


def test_a_few_tests_run_on_any_disk(tmp_path: Path) -> None:
    done = run_suite(tmp_path, "tests/test_it.py", disk=2 * workers.free_bytes(tmp_path))
    assert " 4 passed" in done.stdout
