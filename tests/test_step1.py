"""Step 1: pins, decisions, the probe, and an installation into a fresh environment from local wheels."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import step1_install_environment as step1
from setup_steps import install, machine
from setup_steps.console import PROJECT, StepError
from setup_steps.install import Pin
from setup_steps.machine import TorchFacts
from tests.project_copy import copy_project, run_script


@pytest.mark.parametrize("python", [(3, 10), (3, 11), (3, 13)])
def test_pins_are_read_as_pip_reads_them(python: tuple[int, int]) -> None:
    lines = (PROJECT / "requirements.txt").read_text().splitlines()
    wanted = set()
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            environment = {"python_version": "{}.{}".format(*python)}
            if requirement.marker is None or requirement.marker.evaluate(environment):
                wanted.add((requirement.name, str(requirement.specifier)))
    pins = install.read_pins(PROJECT / "requirements.txt", python)
    assert {(pin.name, f"=={pin.version}") for pin in pins} == wanted
    assert len(pins) == len(wanted) == len({pin.name for pin in pins})
    assert {"torch", "torchvision", "numpy", "huggingface_hub"} <= {pin.name for pin in pins}


def test_development_pins_include_the_others() -> None:
    names = {pin.name for pin in install.read_pins(PROJECT / "requirements-dev.txt")}
    assert {"torch", "numpy", "pytest", "ruff"} <= names


def test_a_line_that_is_no_pin_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("# note\na==1.0\nb>=2\n")
    with pytest.raises(StepError, match=r"r.txt:3: 'b>=2' is no pin"):
        install.read_pins(tmp_path / "r.txt")


PINS = [Pin("torch", "2.14.1"), Pin("torchvision", "0.29.1"), Pin("numpy", "2.4.6")]


@pytest.mark.parametrize(
    ("torch_version", "works", "installed", "requirements"),
    [
        # nothing there
        ("", False, {}, ["torch==2.14.1", "torchvision==0.29.1", "numpy==2.4.6"]),
        # all as pinned, torch as a local build
        (
            "2.14.1+cpu",
            True,
            {"torch": "2.14.1+cpu", "torchvision": "0.29.1", "numpy": "2.4.6"},
            [],
        ),
        # another torch that works is kept, and asks for the torchvision of its release
        ("2.9.0+cu126", True, {"torch": "2.9.0", "numpy": "2.4.6"}, ["torchvision==0.24.*"]),
        ("2.9.0", True, {"torch": "2.9.0", "torchvision": "0.24.1", "numpy": "2.4.6"}, []),
        # the official one wants numpy 1
        (
            "2.2.0",
            True,
            {"torch": "2.2.0", "torchvision": "0.17.0", "numpy": "2.4.6"},
            ["numpy<2"],
        ),
        ("2.2.0", True, {"torch": "2.2.0", "torchvision": "0.17.0", "numpy": "1.26.4"}, []),
        # too old, or broken
        (
            "2.1.0",
            True,
            {"torch": "2.1.0", "torchvision": "0.16.0", "numpy": "2.4.6"},
            ["torch==2.14.1", "torchvision==0.29.1"],
        ),
        (
            "2.9.0",
            False,
            {"torch": "2.9.0", "torchvision": "0.24.1", "numpy": "2.4.6"},
            ["torch==2.14.1", "torchvision==0.29.1"],
        ),
    ],
)
def test_what_is_installed_and_what_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    torch_version: str,
    works: bool,
    installed: dict[str, str],
    requirements: list[str],
) -> None:
    monkeypatch.setattr(install, "installed_version", installed.get)
    rows = install.make_rows(PINS, TorchFacts(torch_version, works), {})
    assert [row.requirement for row in rows if not row.met] == requirements


def test_what_does_not_import_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "installed_version", {"numpy": "2.4.6"}.get)
    (row,) = install.make_rows(PINS[2:], TorchFacts(), {"numpy": "broken"})
    assert not row.met


def test_an_interpreter_of_the_system_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    install.refuse_managed_interpreter()
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    with pytest.raises(StepError, match=r"mend: .*-m venv .venv && .venv/bin/python step1"):
        install.refuse_managed_interpreter()
    # So does a dry run, where there is something to install.
    monkeypatch.setattr(install, "read_pins", lambda path: [Pin("no-such-package-here", "1.0")])
    with pytest.raises(StepError, match=r"mend: .*-m venv .venv && .venv/bin/python step1"):
        step1.main(["--dry-run"])


def test_torch_facts_are_true_here() -> None:
    facts = machine.torch_facts()
    assert facts.version == torch.__version__
    assert facts.works
    assert (facts.device_memory > 0) == (facts.device != "cpu")


def test_the_probe_blames_only_what_is_broken(tmp_path: Path) -> None:
    probe = machine.probe(["json", "no_such_module_at_all"], with_torch=False)
    assert probe.faults["json"] == ""
    assert "No module named" in probe.faults["no_such_module_at_all"]
    # `this_kills` ends the probing process: the others are then probed one by one.
    folder = copy_project(tmp_path / "copy")
    (folder / "this_kills.py").write_text("import os\nos._exit(3)\n")
    program = "from setup_steps import machine\nprint(machine.probe(['json', 'this_kills'], with_torch=False).faults)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str({"json": "", "this_kills": "the process ended with code 3"})


def make_wheel(folder: Path, name: str, version: str, body: str) -> None:
    """A wheel of one module, as pip installs it."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", body)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_step1_installs_checks_and_repairs_in_a_fresh_environment(tmp_path: Path) -> None:
    """Absent, outdated and broken packages are put right; a rerun installs nothing."""
    wheels = tmp_path / "wheels"
    for version in ("1.0", "2.0"):
        make_wheel(wheels, "tinyprobe", version, f"version = '{version}'\n")
    folder = copy_project(tmp_path / "copy")
    (folder / "requirements.txt").write_text("tinyprobe==2.0\n")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHONPATH": ""}

    def step(*options: str) -> subprocess.CompletedProcess[str]:
        return run_script(folder / "step1_install_environment.py", *options, python=python, cwd=tmp_path, **env)

    dry = step("--dry-run")
    assert (dry.returncode, "tinyprobe==2.0" in dry.stdout) == (0, True)
    assert not (folder / "environment_report.json").exists()
    assert step("--check-only").returncode == 1

    first = step()
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "Next: python step2_download_models.py"
    report = json.loads((folder / "environment_report.json").read_text())
    assert report["packages"]["tinyprobe"]["installed"] == "2.0"
    assert report["decision"] == "to install: tinyprobe==2.0"

    second = step()
    assert second.returncode == 0
    assert "Nothing to install" in second.stdout
    assert "Successfully installed" not in second.stdout

    module = next((tmp_path / "env").rglob("tinyprobe.py"))
    module.write_text("raise ImportError('half a file')\n")
    assert "does not import: half a file" in step("--check-only").stdout
    assert step().returncode == 0
    assert module.read_text() == "version = '2.0'\n"

    (folder / "requirements.txt").write_text("tinyprobe==3.0\n")
    failed = step()
    assert failed.returncode == 1
    assert "pip ended with code 1 while it installed tinyprobe==3.0" in failed.stderr
