"""This project's own folder: its paths, its interpreter, and commands as a person types them there."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NoReturn, TypeVar

from LightningDiT.console import reads_chinese, run_main
from LightningDiT.errors import LightningDiTError

PROJECT = Path(__file__).resolve().parent.parent
"""The folder that holds the step scripts; every default path starts here."""
VENV = PROJECT / ".venv"
"""The virtual environment that quickstart.py makes."""
REPORT = PROJECT / "environment_report.json"
"""Step 1's findings and actions; quickstart.py chooses the model by it."""
CONFIG = PROJECT / "kaggle_inference_config.yaml"
"""The configuration that step 3 writes."""
STEP1, STEP2 = "step1_install_environment.py", "step2_download_models.py"
STEP3, STEP4 = "step3_setup_configs.py", "step4_run_inference.py"
REPAIR = "fix_latents_stats.py"
#: What keeps this interpreter's packages apart: the name and how it is told, the most telling first.
ENVIRONMENTS = (
    ("Kaggle", lambda: "KAGGLE_KERNEL_RUN_TYPE" in os.environ),
    ("Colab", lambda: "COLAB_RELEASE_TAG" in os.environ or "COLAB_GPU" in os.environ),
    ("conda", lambda: (Path(sys.prefix) / "conda-meta").is_dir()),
    ("virtual environment", lambda: sys.prefix != sys.base_prefix),
)

AnyPath = TypeVar("AnyPath", bound=PurePath)


def run(main: Callable[[], int]) -> NoReturn:
    """Run a step's `main` by `run_main` and leave the process with its exit code."""
    sys.exit(run_main(main, fix_packages))


def again(default: str, *added: str, without: Sequence[str] = (), python: str | None = None) -> str:
    """Return the running command as a person would type it in the project's folder.

    Args:
        default: the script to name if this process runs none of the project's scripts.
        added: options to append.
        without: options to leave out, with their values.
        python: the interpreter; by default that of this process.
    """
    script, given = Path(sys.argv[0]).name, sys.argv[1:]
    if not ((PROJECT / script).is_file() and script.endswith(".py")):
        script, given = default, []
    kept, leaving = [], False
    for part in given:
        if part.startswith("--"):
            leaving = part.partition("=")[0] in without
        if not leaving:
            kept.append(part)
    return f"{python or interpreter()} {shlex.join([script, *map(hide_credentials, kept), *added])}"


def given(*options: str) -> list[str]:
    """Return those of `options` that the running command was given, each with its value."""
    found: list[str] = []
    for part, value in itertools.pairwise([*sys.argv[1:], ""]):
        option, equals, behind = part.partition("=")
        if option in options:
            found += [option, behind if equals else value]
    return found


def hide_credentials(text: str) -> str:
    """Return a text with the user and password of an address in it as asterisks."""
    return re.sub(r"(?<=://)\S*@", "****@", text)


def step_command(script: str, *options: str) -> str:
    """Return a step's command as a person would type it in the project's folder."""
    return f"{interpreter()} {shlex.join([script, *options])}"


def in_both(english: str, chinese: str) -> Iterator[str]:
    """Yield a line, and the same in Chinese for those who read it."""
    yield english
    if reads_chinese():
        yield chinese


def absolute(path: Path) -> Path:
    """Return the full path that a person named, `~` and links resolved; raise LightningDiTError if there is no such
    user's home or a link leads to itself.
    """
    try:
        return path.expanduser().resolve()
    except (RuntimeError, OSError) as error:
        fix = f"ls -ld {shlex.quote(str(path))}, or name it in full"
        raise LightningDiTError(f"{path} leads nowhere ({error})", fix) from error


def venv_python(folder: AnyPath, system: str = os.name) -> AnyPath:
    """Return the interpreter of a virtual environment; `system` is "nt" for Windows."""
    return folder / ("Scripts/python.exe" if system == "nt" else "bin/python")


def runs_in_venv() -> bool:
    """Return whether this process runs in the project's own virtual environment."""
    # The interpreter's file does not tell: the one in the environment is a link to the other.
    return Path(sys.prefix).resolve() == VENV.resolve()


def environments() -> tuple[str, ...]:
    """Return the names of the tools that keep this interpreter's packages apart; empty for a plain Python."""
    return tuple(name for name, is_here in ENVIRONMENTS if is_here())


def interpreter() -> str:
    """Return how a person in the project's folder names the interpreter of this process."""
    if runs_in_venv():
        return str(venv_python(Path(VENV.name)))
    return "python" if shutil.which("python") or os.name == "nt" else "python3"


def fix_packages() -> str:
    """Return the command that fixes an absent package: the same one in the project's virtual environment if there is
    one and this process does not run in it, else step 1.
    """
    if venv_python(VENV).exists() and not runs_in_venv():
        return again(STEP1, python=str(venv_python(Path(VENV.name))))
    return step_command(STEP1)
