"""A clean copy of the files that the steps need, for tests that run them as a person does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setup_steps.project import PROJECT, interpreter

#: The name of the tests' interpreter in the steps' messages: `.venv/bin/python` if it is that one.
PYTHON = interpreter()


def copy_project(target: Path, *names: str) -> Path:
    """Copy the step scripts, setup_steps, the library and the named files or folders, without any output."""
    target.mkdir(parents=True, exist_ok=True)
    scripts = [path.name for path in PROJECT.glob("*.py")]
    skipped = shutil.ignore_patterns("__pycache__", "demo_images", "demo_output")
    pins = [path.name for path in (*PROJECT.glob("requirements*.txt"), PROJECT / "pyproject.toml")]
    for name in (*scripts, *pins, "setup_steps", "LightningDiT", *names):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=skipped)
        else:
            shutil.copy2(source, target / name)
    return target


def run_script(
    script: Path, *options: str, python: str = sys.executable, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a script as a process of its own, with additions to the environment ("" removes)."""
    environment = {**os.environ, **env}
    environment = {key: value for key, value in environment.items() if env.get(key) != ""}
    return subprocess.run(
        [python, str(script), *options],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
