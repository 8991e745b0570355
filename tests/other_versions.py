"""An interpreter with other versions than the pins: the lowest ones that the project is tested on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from setup_steps.install import read_pins
from setup_steps.pip_calls import explain, pip_command
from setup_steps.project import PROJECT, venv_python
from tests.workers import shared_folder

SHARED = {"torch", "torchvision"}  # too large
#: The lowest versions with wheels for newer Pythons than those of requirements-official.txt.
ON_NEWER_PYTHON = {"numpy": "2.3.5", "pillow": "12.2.0", "matplotlib": "3.10.8"}


def other_pins() -> dict[str, str]:
    """Return the packages of the interpreter that have another version than the pinned one, and that version."""
    lowest, highest = (
        {pin.name: pin.version for pin in read_pins(PROJECT / f"requirements-{name}.txt")}
        for name in ("official", "dev")
    )
    if sys.version_info >= (3, 13):
        lowest.update(ON_NEWER_PYTHON)
    return {name: version for name, version in lowest.items() if name not in SHARED and version != highest[name]}


@pytest.fixture(scope="session")
def other_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment's interpreter that has `other_pins`, and for all else the packages of this interpreter.

    pip installs the pins from where it got the packages of this environment. The test is skipped if they cannot be had.
    """
    with shared_folder(request, tmp_path_factory, "other") as folder:
        python = venv_python(folder / "venv")
        if not (folder / "made").exists():
            install_others(python, folder / "venv")
            (folder / "made").touch()
    return python


def install_others(python: Path, folder: Path) -> None:
    """Make the virtual environment of `other_python` in a folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    (next(folder.glob("lib/python*/site-packages")) / "complete.pth").write_text("\n".join(places) + "\n")
    wanted = [f"{name}=={version}" for name, version in other_pins().items()]
    command = [str(python), *pip_command(wanted, "--quiet")[1:]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode and "ResolutionImpossible" not in done.stderr:
        pytest.skip(str(explain(done.stderr, wanted, done.returncode)))
    assert done.returncode == 0, done.stderr
