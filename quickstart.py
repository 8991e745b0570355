#!/usr/bin/env python3
"""From a fresh clone to images in one command; with --test to passing tests.

Makes a virtual environment in .venv (except inside one, conda, Kaggle or Colab), then runs steps 1 to 4 with the best
model that this machine can run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from LightningDiT.console import INTERRUPTED, OK, duration, format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import free_bytes, read_json, rename_command, require_writable
from setup_steps import OLDEST_PYTHON, downloads, pip_calls, project, weights

VENV_PARTS = {"bin", "include", "lib", "lib64", "Scripts", "Include", "Lib", "share", "pyvenv.cfg"}
VENV_PARTS |= {".gitignore", ".lock", "CACHEDIR.TAG"}  # of newer venv and of other tools that make them
# Prints the version; succeeds if pip is whole: its RECORD, which is written last, and every module named there.
EXAMINATION = """
import sys
print(*sys.version_info[:2])
from importlib.metadata import files
sys.exit(not all(file.size in (None, file.locate().stat().st_size) for file in files("pip") if file.suffix == ".py"))
"""
GRID = project.PROJECT / "LightningDiT" / "demo_images" / "demo_samples.png"
HUB = "https://huggingface.co"
GPU_BYTES = 5_000_000_000  # memory that the published weights need on a GPU with batch size 1
CHECKS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("pytest",))
GPU_CHECK = ("-m", "pytest", "--gpu")
AGAIN = "python quickstart.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    auto = "auto (default): the published weights if a GPU and the files or the hub are there, else the bundled model"
    add("--model", choices=["auto", "bundled", "800ep", "64ep"], default="auto", help=auto)
    weights.add_models_option(parser)
    add("--index-url", type=pip_calls.index_url, metavar="URL", help="step 1 asks this package index")
    add("--endpoint", metavar="URL", help="a mirror of the hub (or HF_ENDPOINT)")
    add("--test", action="store_true", help="set up, then check lint and format and run the tests")
    add("--dry-run", action="store_true", help="only say what would be done")
    return parser.parse_args(argv)


def examine_venv(folder: Path) -> tuple[tuple[int, ...], bool]:
    """Return the version of a virtual environment's interpreter, empty if none starts, and whether steps can use it."""
    python = project.venv_python(folder)
    if not (folder / "pyvenv.cfg").is_file():  # without it the interpreter is the system's
        return (), False
    try:
        done = subprocess.run([python, "-c", EXAMINATION], capture_output=True, text=True, check=False)
        version = tuple(int(part) for part in done.stdout.split())
    except (OSError, ValueError):
        return (), False
    return version, done.returncode == 0 and version >= OLDEST_PYTHON


def refuse_others(folder: Path, version: tuple[int, ...]) -> None:
    """Raise LightningDiTError if the folder must not be made again: it holds other things, or its Python is too old."""
    if not os.path.lexists(folder):
        return
    fault = ""
    if not folder.exists():
        fault = f"is a link to {folder.readlink()}, which is not there"
    elif not folder.is_dir() or {part.name for part in folder.iterdir()} - VENV_PARTS:
        fault = "is not a virtual environment that this project made"
    elif version and version < OLDEST_PYTHON:
        fault = f"is a virtual environment of Python {version[0]}.{version[1]}, 3.10 or newer is needed"
    if fault:
        raise LightningDiTError(f"{folder} {fault}", f"{rename_command(folder, '.other')} && {AGAIN}")


def ensure_venv(folder: Path) -> None:
    """Make the virtual environment, or fix a half-made one; a working one stays as it is. Raise LightningDiTError if
    something else has the name, the folder takes no file, or venv failed.
    """
    version, whole = examine_venv(folder)
    if whole:
        return
    refuse_others(folder, version)
    require_writable(folder.parent)
    print(f"{'Remaking the half-made' if folder.exists() else 'Making'} {folder}")
    if version:  # if only pip is lacking, the installed packages stay
        python = project.venv_python(folder)
        subprocess.run([python, "-m", "ensurepip"], capture_output=True, check=False)
        if examine_venv(folder)[1]:
            return
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not examine_venv(folder)[1]:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no word from venv"]
        raise LightningDiTError(
            f"the virtual environment could not be made ({lines[0]})",
            f"install Python's venv module (on Debian: apt install python3-venv), then {AGAIN}",
        )


def gpu_memory() -> int | None:
    """Return the bytes of memory of the GPU that works by step 1's report, 0 if none does; None without a report."""
    try:
        return int(read_json(project.REPORT)["torch"]["device_memory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose_model() -> tuple[str, str]:
    """Return the best model for this machine, by step 1's report, and the reason."""
    memory = gpu_memory()
    if memory is None:
        return "bundled", "no report of step 1"
    if memory < GPU_BYTES:
        return "bundled", "no GPU with enough memory for the published weights"
    models, attached = weights.models_folder(None, said=False), weights.Tree(weights.attached_folder())
    for model in ("800ep", "64ep"):
        if all(weights.find_file(file, models, attached) for file in weights.files_of(model)):
            return model, f"a GPU, and the files of {model} are here"
    needed = sum(weights.bytes_to_come(file, models, attached) for file in weights.files_of("800ep"))
    if free_bytes(models) < needed:
        return "bundled", f"a GPU, but no {format_bytes(needed)} free on the disk"
    if hub_answers():
        return "800ep", "a GPU, and the hub answers"
    return "bundled", "a GPU, but neither the published files nor the hub"


def hub_answers() -> bool:
    """Return whether the hub, or the mirror in HF_ENDPOINT, answers within 10 seconds."""
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or HUB, method="HEAD")
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, even if not a welcome
    except (OSError, ValueError):
        return False


def run_child(command: list[str]) -> int:
    """Run a command in the project's folder and return its exit code.

    Ctrl-C reaches the child too, and it gets the time to tidy up, which `subprocess.run` would not give it.
    """
    child = subprocess.Popen(command, cwd=project.PROJECT)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return child.wait() or INTERRUPTED


def call_all(commands: Sequence[Sequence[str]], dry_run: bool) -> int:
    """Run Python with each of these arguments (scripts by name); return the exit code of the first failure, else 0."""
    for first, *rest in commands:
        print(f"\n=== python {' '.join(map(project.hide_credentials, [first, *rest]))}")
        script = str(project.PROJECT / first) if first.endswith(".py") else first
        code = OK if dry_run else run_child([sys.executable, script, *rest])
        if code:
            return code
    return OK


def run_steps(model: str, dry_run: bool, folder: Sequence[str] = (), index: Sequence[str] = ()) -> int:
    """Run steps 1 to 4; return the exit code of the first that fails, else 0.

    Args:
        folder: the option --models-dir for steps 2 and 3.
        index: the option --index-url for step 1.
    """
    began = time.monotonic()
    code = call_all([(project.STEP1, *index)], dry_run)
    if code:
        return code
    reason = "as asked"
    if model == "auto":
        model, reason = choose_model()
    ready = time.monotonic()
    print(f"\nModel '{model}' ({reason})")
    options = ["--model", model, *(folder if model != "bundled" else ())]
    steps = [(project.STEP2, *options), (project.STEP3, *options), (project.STEP4,)]
    code = call_all(steps, dry_run)
    if code:
        return code
    if dry_run:
        print(f"\nDry run: nothing was done. The images would be in {GRID}")
        return OK
    if not GRID.is_file():
        raise LightningDiTError(f"{GRID} was not written", f"python {project.STEP4}")
    done = time.monotonic()
    print(f"\nImages: {GRID}")
    print(f"Took {duration(done - began)}, of which the packages {duration(ready - began)}.")
    return OK


def run_tests(dry_run: bool, index: Sequence[str] = ()) -> int:
    """Set up, check lint and format, and run the tests, those of the GPU too if one works; return the exit code of the
    first failure, else 0. For `index` see `run_steps`.
    """
    began = time.monotonic()
    code = call_all([(project.STEP1, "--dev", *index), *(("-m", *check) for check in CHECKS)], dry_run)
    if code == OK and gpu_memory():
        code = call_all([GPU_CHECK], dry_run)
    elif code == OK:
        print(f"\nNo GPU works here by step 1's report, so python {' '.join(GPU_CHECK)} is left out.")
    if code:
        return code
    print(
        "\nDry run: nothing was done." if dry_run else f"\nAll checks passed in {duration(time.monotonic() - began)}."
    )
    return OK


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    downloads.use_endpoint(options.endpoint)  # step 2 inherits it
    models = weights.models_folder(options.models_dir, said=False)
    if models != weights.MODELS:  # the steps run in the project's folder, where a relative path would lead elsewhere
        os.environ[weights.MODELS_VARIABLE] = str(models)
    folder, environments = weights.named_models(options.models_dir), project.environments()
    index = ("--index-url", options.index_url) if options.index_url else ()
    if not environments:
        if options.dry_run:
            print(f"Would make {project.VENV} (if it is not there yet) and go on in it.")
            return run_tests(True, index) if options.test else run_steps(options.model, True, folder, index)
        ensure_venv(project.VENV)
        arguments = sys.argv[1:] if argv is None else argv
        command = [str(project.venv_python(project.VENV)), str(Path(__file__).resolve()), *arguments, *folder]
        return run_child(command)
    print(f"Working in {', '.join(environments)} ({sys.prefix})")
    if not options.dry_run:
        require_writable(project.PROJECT)
    dry_run = options.dry_run
    code = run_tests(dry_run, index) if options.test else run_steps(options.model, dry_run, folder, index)
    if code == OK and not options.dry_run:
        print(f"More: {project.step_command(project.STEP4, '--help')}")
    return code


if __name__ == "__main__":
    project.run(main)
