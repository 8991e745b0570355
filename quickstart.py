#!/usr/bin/env python3
"""From a fresh clone to pictures in one command; with --test to passing tests.

Makes a virtual environment in .venv (not inside one, conda, Kaggle or Colab), then runs steps 1 to
4 with the best model that this machine can run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from setup_steps import console, weights

VENV_PARTS = {"bin", "include", "lib", "lib64", "Scripts", "Include", "Lib", "share", "pyvenv.cfg"}
VENV_PARTS |= {".gitignore", ".lock", "CACHEDIR.TAG"}  # of newer venv and of other tools that make them
# Prints the version; ends well where pip is whole: its RECORD, which is written last, and every module named there.
EXAMINATION = """
import sys
print(*sys.version_info[:2])
from importlib.metadata import files
sys.exit(not all(file.size in (None, file.locate().stat().st_size) for file in files("pip") if file.suffix == ".py"))
"""
PICTURE = console.PROJECT / "LightningDiT" / "demo_images" / "demo_samples.png"
HUB = "https://huggingface.co"
GPU_BYTES = 5_000_000_000  # memory that the published weights need on a GPU, one picture at a time
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("pytest",),
)
AGAIN = "python quickstart.py"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        choices=["auto", "bundled", "800ep", "64ep"],
        default="auto",
        help="auto: the published weights where a GPU and the files or the hub are there, else the bundled model",
    )
    parser.add_argument("--test", action="store_true", help="set up, then lint, format and tests")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    return parser.parse_args(argv)


def examine_venv(folder: Path) -> tuple[tuple[int, ...], bool]:
    """The version of a virtual environment's interpreter, empty where none starts, and whether steps can run in it."""
    python = console.venv_python(folder)
    if not (folder / "pyvenv.cfg").is_file():  # without it the interpreter is that of the system
        return (), False
    try:
        done = subprocess.run([python, "-c", EXAMINATION], capture_output=True, text=True, check=False)
        version = tuple(int(part) for part in done.stdout.split())
    except (OSError, ValueError):
        return (), False
    return version, done.returncode == 0 and version >= console.OLDEST_PYTHON


def refuse_others(folder: Path, version: tuple[int, ...]) -> None:
    """Raise StepError where the folder is not to be made again: it holds other things, or works but is too old."""
    if not os.path.lexists(folder):
        return
    fault = ""
    if not folder.exists():
        fault = f"is a link to {folder.readlink()}, which is not there"
    elif not folder.is_dir() or {part.name for part in folder.iterdir()} - VENV_PARTS:
        fault = "is no virtual environment and none of this project's making"
    elif version and version < console.OLDEST_PYTHON:
        fault = f"is a virtual environment of Python {version[0]}.{version[1]}, 3.10 or newer is needed"
    if fault:
        raise console.StepError(f"{folder} {fault}", f"{console.rename_command(folder, '.other')} && {AGAIN}")


def ensure_venv(folder: Path) -> None:
    """Make the virtual environment, or fix a half-made one; one that works stays as it is.

    Raises:
        StepError: something else carries the name, the folder takes no file, or venv failed.
    """
    version, whole = examine_venv(folder)
    if whole:
        return
    refuse_others(folder, version)
    console.require_writable(folder.parent)
    print(f"{'Remaking the half-made' if folder.exists() else 'Making'} {folder}")
    if version:  # what is installed in it stays where pip alone is lacking
        python = console.venv_python(folder)
        subprocess.run([python, "-m", "ensurepip"], capture_output=True, check=False)
        if examine_venv(folder)[1]:
            return
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not examine_venv(folder)[1]:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no word from venv"]
        raise console.StepError(
            f"the virtual environment could not be made ({lines[0]})",
            f"install Python's venv module (on Debian: apt install python3-venv), then {AGAIN}",
        )


def choose_model() -> tuple[str, str]:
    """The best model for this machine, by step 1's report, with the reason."""
    try:
        torch = json.loads(console.REPORT.read_text(encoding="utf-8"))["torch"]
        memory = int(torch["device_memory"])
    except (OSError, ValueError, KeyError, TypeError):
        return "bundled", "no report of step 1"
    if memory < GPU_BYTES:
        return "bundled", "no GPU with enough memory for the published weights"
    attached = weights.Tree(weights.attached_folder())
    for model in ("800ep", "64ep"):
        if all(weights.find_file(file, weights.MODELS, attached) for file in weights.files_of(model)):
            return model, f"a GPU, and the files of {model} are here"
    needed = sum(weights.bytes_to_come(file, weights.MODELS, attached) for file in weights.files_of("800ep"))
    if shutil.disk_usage(console.PROJECT).free < needed:
        return "bundled", f"a GPU, but no {console.format_bytes(needed)} free on the disk"
    if hub_answers():
        return "800ep", "a GPU, and the hub answers"
    return "bundled", "a GPU, but neither the published files nor the hub"


def hub_answers() -> bool:
    """True where the hub, or the mirror in HF_ENDPOINT, answers within some seconds."""
    try:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or HUB, method="HEAD")
        with urllib.request.urlopen(request, timeout=10):
            return True
    except urllib.error.HTTPError:
        return True  # an answer, even if not a welcome
    except (OSError, ValueError):
        return False


def run_child(command: list[str]) -> int:
    """Run a command in the project's folder and return its exit code. Ctrl-C reaches the child by itself; it is left
    the time to put things in order, which `subprocess.run` would not give it.
    """
    child = subprocess.Popen(command, cwd=console.PROJECT)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return child.wait() or console.INTERRUPTED


def call(command: list[str], dry_run: bool) -> int:
    """Run one command in the project's folder, its output on this terminal."""
    names = " ".join(Path(part).name if part.endswith(".py") else part for part in command[1:])
    print(f"\n=== python {names}")
    if dry_run:
        return console.OK
    return run_child(command)


def step_command(name: str, *options: str) -> list[str]:
    """The command line of one step."""
    return [sys.executable, str(console.PROJECT / name), *options]


def run_steps(model: str, dry_run: bool) -> int:
    """Steps 1 to 4; stops at the first that fails and returns its exit code."""
    began = time.monotonic()
    code = call(step_command("step1_install_environment.py"), dry_run)
    if code:
        return code
    reason = "as asked"
    if model == "auto":
        model, reason = choose_model()
    ready = time.monotonic()
    print(f"\nModel '{model}' ({reason})")
    for name, options in (
        ("step2_download_models.py", ["--model", model]),
        ("step3_setup_configs.py", ["--model", model]),
        ("step4_run_inference.py", []),
    ):
        code = call(step_command(name, *options), dry_run)
        if code:
            return code
    if dry_run:
        print(f"\nDry run: nothing was done. The pictures would be in {PICTURE}")
        return console.OK
    if not PICTURE.is_file():
        raise console.StepError(f"{PICTURE} was not written", "python step4_run_inference.py")
    done = time.monotonic()
    print(f"\nPictures: {PICTURE}")
    print(
        f"Took {console.format_seconds(done - began)}, of which the packages {console.format_seconds(ready - began)}."
    )
    return console.OK


def run_tests(dry_run: bool) -> int:
    """Set-up, then lint, format and tests; the exit code is that of the first failure."""
    began = time.monotonic()
    commands = [step_command("step1_install_environment.py", "--dev")]
    commands += [[sys.executable, "-m", *check] for check in CHECKS]
    for command in commands:
        code = call(command, dry_run)
        if code:
            return code
    if dry_run:
        print("\nDry run: nothing was done.")
        return console.OK
    print(f"\nAll checks passed in {console.format_seconds(time.monotonic() - began)}.")
    return console.OK


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    places = console.places()
    if not places:
        if options.dry_run:
            print(f"Would make {console.VENV} (where it is not there yet) and go on in it.")
            return run_tests(True) if options.test else run_steps(options.model, True)
        ensure_venv(console.VENV)
        arguments = sys.argv[1:] if argv is None else argv
        command = [str(console.venv_python(console.VENV)), str(Path(__file__).resolve()), *arguments]
        return run_child(command)
    print(f"Working in {', '.join(places)} ({sys.prefix})")
    if not options.dry_run:
        console.require_writable(console.PROJECT)
    code = run_tests(options.dry_run) if options.test else run_steps(options.model, options.dry_run)
    if code == console.OK and not options.dry_run:
        # The reader's own `python` lacks the packages where they are in .venv.
        print(f"More: {console.interpreter()} step4_run_inference.py --help")
    return code


if __name__ == "__main__":
    console.run(main)
