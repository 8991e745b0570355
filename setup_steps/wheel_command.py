"""The command that fetches all wheels for a Kaggle notebook without internet, on any computer with internet."""

from __future__ import annotations

import argparse
import os
import re
import sys

from LightningDiT.errors import LightningDiTError
from setup_steps import OLDEST_PYTHON, install, project, releases
from setup_steps.pip_calls import VARIABLE

KAGGLE_PYTHON = (3, 12)  # of Kaggle's image
FOLDER = "wheels"
TORCH = ("torch", "torchvision")
#: Kaggle's platform and all older ones that wheels carry: pip takes each by its own name alone.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux_2_12", "manylinux2010")
PLATFORMS += ("manylinux_2_5", "manylinux1")
#: What the packages of requirements.txt need in turn, apart from torch and its own. With their dependencies pip would
#: bring torch, and it takes the markers of dependencies for the computer that it runs on.
COMPANIONS = ("anyio", "click~=8.4", "exceptiongroup", "filelock", "fsspec", "h11", "hf-xet~=1.6", "httpcore2")
COMPANIONS += ("httpx2~=2.0", "idna", "packaging", "psutil", "pyyaml", "scipy", "tomli", "truststore")
COMPANIONS += ("typing-extensions",)
PLAIN = re.compile(r"[A-Za-z0-9_.:/=~+-]+")  # a word that sh, PowerShell and cmd.exe read alike


def python_version(text: str) -> tuple[int, int]:
    """Return an option's value as (major, minor) of a Python that the project runs on."""
    match = re.fullmatch(r"3\.(\d{1,2})", text)
    version = (3, int(match[1])) if match else (0, 0)
    if version < OLDEST_PYTHON:
        raise argparse.ArgumentTypeError(f"{text!r} given, 3.10, 3.11, 3.12 or newer expected")
    return version


def choose_release(named: str, python: tuple[int, int]) -> releases.Release:
    """Return the release of torch of that version, the pinned one for ""; raise LightningDiTError if there is none that
    goes with the pins, or no wheel of it for this Python.
    """
    pins = install.read_pins(project.PROJECT / "requirements.txt", python)
    newest = [install.pinned(pins, name, project.PROJECT) for name in TORCH]
    lines = [line for line in releases.release_lines(*newest) if not releases.numpy_of(line.torch)]
    release = next((line for line in lines if named in ("", line.torch)), None)
    versions = ", ".join(line.torch for line in lines)
    if release is None:
        raise LightningDiTError(f"--with-torch {named} is none of the releases {versions}", "name one of them")
    if not release.has_wheels(python):
        raise LightningDiTError(
            f"torch {release.torch} has no wheels for Python {releases.dotted(python)}",
            f"name another Python by --python-version, or another of the releases {versions}",
        )
    return release


def wheel_command(python: tuple[int, int], release: releases.Release | None = None, index_url: str = "") -> str:
    """Return the command in one line that every shell reads alike.

    Args:
        python: (major, minor) of the notebook's Python.
        release: the torch to fetch too; without one pip fetches no dependencies of its own accord.
        index_url: address of the index; empty for pip's own.

    Raises:
        LightningDiTError: the address has characters that shells read differently, or credentials.
    """
    if index_url and not PLAIN.fullmatch(index_url):
        raise LightningDiTError(
            f"--index-url {project.hide_credentials(index_url)} has credentials, or characters that shells treat apart",
            f"{project.again(project.STEP1, without=['--index-url'])}, and set {VARIABLE} where you run the command",
        )
    pins = {pin.name: pin.version for pin in install.read_pins(project.PROJECT / "requirements.txt", python)}
    pins = {name: version for name, version in pins.items() if name not in TORCH}
    if release:
        pins = {"torch": release.torch, "torchvision": release.torchvision, **pins}
    words = ["python", "-m", "pip", "download", "--dest", FOLDER, "--only-binary=:all:"]
    words += [] if release else ["--no-deps"]
    words += ["--index-url", index_url] if index_url else []
    for platform in PLATFORMS:
        words += ["--platform", f"{platform}_x86_64"]
    words += ["--python-version", releases.dotted(python), "--implementation", "cp"]
    for abi in (f"cp{python[0]}{python[1]}", "abi3", "none"):
        words += ["--abi", abi]
    return " ".join([*words, *(f"{name}=={version}" for name, version in pins.items()), *COMPANIONS])


def print_command(python: tuple[int, int] | None, with_torch: str | None, index_url: str) -> None:
    """Print the command alone on stdout, and on stderr what it is for and leaves out. For the arguments see the options
    of step 1.
    """
    on_kaggle = "KAGGLE_KERNEL_RUN_TYPE" in os.environ
    version = python or (sys.version_info[:2] if on_kaggle else KAGGLE_PYTHON)
    origin = "as asked" if python else "that of this notebook" if on_kaggle else "that of Kaggle's image"
    release = None if with_torch is None else choose_release(with_torch, version)
    command = wheel_command(version, release, index_url)
    notes = [f"For Python {releases.dotted(version)}, {origin} (another: --python-version 3.x), on Linux x86_64."]
    if release:
        notes.append(
            f"With torch {release.torch}: run it on Linux x86_64 with this Python, such as a Kaggle notebook with "
            "internet, because pip asks the computer that it runs on which NVIDIA libraries torch needs."
        )
    else:
        notes.append("Without torch and torchvision, which Kaggle has (--with-torch adds them). Run it anywhere.")
    notes.append(f"Then upload the folder {FOLDER} as a data set and attach it: step 1 finds it.")
    print("\n".join(notes), file=sys.stderr)
    print(command)
