"""Step 1 as a person runs it: fresh environments, real pip, wheels made on the spot."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import step1_install_environment as step1
from LightningDiT.errors import LightningDiTError
from setup_steps import conflicts, environment, install, machine, pip_calls, project, releases
from setup_steps.environment import Profile, State
from setup_steps.install import Pin, Row
from setup_steps.machine import Gpu, Machine, Probe, TorchFacts
from setup_steps.pip_calls import InstallError
from setup_steps.releases import KEEP, REPLACE, Asked, Decision
from tests.other_versions import other_pins
from tests.project_copy import copy_project, run_script
from tests.wheels import make_nvidia_smi, make_torch, make_wheel

STOCK = ("2.14.1", "0.29.1", "13.0", "sm_75", "sm_80", "compute_120")
LEGACY = ("2.7.1", "0.22.1", "12.6", "sm_50", "sm_60", "sm_70")
PINS = "torch==2.14.1\ntorchvision==0.29.1\ntinyprobe==2.0\n"
RANGES = ("torch>=2.2.0,<2.15", "torchvision>=0.17.0,<0.30", "tinyprobe>=1.5,<2.1", "accelerate>=1.0,<1.16")
WORKING = Probe(TorchFacts("2.14.1", True), {})


class Place:
    """A copy of the project with small pins, and a fresh environment that knows no index."""

    def __init__(self, root: Path, venv: Path) -> None:
        self.root, self.folder, self.wheels = root, copy_project(root / "copy"), root / "wheels"
        (self.folder / "requirements.txt").write_text(PINS)
        (self.folder / "pyproject.toml").write_text("".join(f'"{line}",\n' for line in RANGES))
        shutil.copytree(venv, root / "env", symlinks=True)
        self.python = str(root / "env" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
        make_nvidia_smi(root / "bin", "Tesla P100-PCIE-16GB, 6.0, 16269, 580.65.06")
        self.env = {
            "PATH": f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
            **dict.fromkeys(("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PYTHONPATH"), ""),
            **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "KAGGLE_KERNEL_RUN_TYPE", "LIGHTNINGDIT_ATTACHED"), ""),
        }

    def step(self, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run step 1 from another folder."""
        script = self.folder / "step1_install_environment.py"
        return run_script(script, *options, python=self.python, cwd=self.root, **{**self.env, **env})

    def pip(self, *arguments: str) -> None:
        """Change the environment behind step 1's back."""
        subprocess.run(
            [self.python, "-m", "pip", "-q", *arguments], check=True, env={**os.environ, "PIP_NO_INDEX": "1"}
        )

    def installed(self, name: str) -> str | None:
        """The version of a package in the environment, by its metadata's folder."""
        versions = [path.name.split("-")[1] for path in (self.root / "env").rglob(f"{name}-*.dist-info")]
        return versions[0].removesuffix(".dist") if versions else None

    @property
    def report(self) -> dict:
        return json.loads((self.folder / "environment_report.json").read_text())

    @property
    def constraints(self) -> list[str]:
        return (self.folder / "environment_constraints.txt").read_text().splitlines()[1:]


@pytest.fixture
def place(tmp_path: Path, made_venv: Path) -> Place:
    made = Place(tmp_path, made_venv)
    for version in ("1.0", "2.0"):
        make_wheel(made.wheels, "tinyprobe", version, f"version = '{version}'\n", "torch")
    return made


def test_step1_installs_checks_and_repairs_in_a_fresh_environment(place: Place) -> None:
    """Absent and broken packages are put right; a rerun installs nothing."""
    (place.root / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    make_torch(place.wheels, *LEGACY)  # works, so that its release does not matter
    make_torch(place.wheels, "2.14.1", "0.29.1", "13.0", "sm_60")
    wheels = ("--wheels", str(place.wheels))
    dry = place.step("--dry-run", *wheels)
    assert (dry.returncode, "--no-index" in dry.stdout, "tinyprobe==2.0" in dry.stdout) == (0, True, True)
    assert not (place.folder / "environment_report.json").exists()
    assert place.step("--check-only").returncode == 1
    assert place.step("--profile", "newest").returncode == 2

    (place.root / "empty").mkdir()
    wrong = place.step("--wheels", str(place.root / "empty"))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "a folder with wheels was expected; fix: python step1_install_environment.py --write-wheel-" in wrong.stderr
    alone = place.step()
    assert (alone.returncode, "Traceback" in alone.stderr) == (1, False)
    assert alone.stdout.count("\nIndex: http://127.0.0.1:9/simple (by the variable PIP_INDEX_URL)\n") == 1
    last = alone.stderr.splitlines()[-1]
    assert last.startswith("error: pip ended with code 1 while it installed torch==2.14.1 torchvision==0.29.1")
    assert "no connection to the package index http://127.0.0.1:9/simple; fix: switch the internet on (Kaggle" in last

    first = place.step(*wheels)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "Next: python step2_download_models.py"
    assert place.report["packages"]["tinyprobe"]["installed"] == "2.0"
    wanted = "torch==2.14.1 torchvision==0.29.1 tinyprobe==2.0"
    assert place.report["decision"] == f"torch 2.14.1 is installed; to install: {wanted}"
    assert place.report["reason"].startswith("no torch is here; 2.14.1 is the current one")
    assert place.report["torch"]["device_memory"] == 17_059_545_088  # what quickstart.py reads
    assert place.constraints == wanted.split()

    second = place.step()  # without the wheels: nothing is asked for
    assert second.returncode == 0
    assert "Decision: torch 2.14.1 is kept; nothing to install" in second.stdout
    assert "Successfully installed" not in second.stdout

    module = next((place.root / "env").rglob("tinyprobe.py"))
    module.write_text("raise ImportError('half a file')\n")
    assert "not usable: half a file" in place.step("--check-only").stdout
    assert place.step(*wheels).returncode == 0
    assert module.read_text() == "version = '2.0'\n"

    module.write_text("")  # it imports, and there is nothing in it
    assert f"not usable: {module} is empty" in place.step("--check-only").stdout
    assert place.step(*wheels).returncode == 0
    assert module.read_text() == "version = '2.0'\n"

    module.write_text("raise ImportError('half a file')\n")
    next((place.root / "env").rglob("tinyprobe-2.0.dist-info/RECORD")).unlink()  # pip cannot uninstall it
    assert place.step(*wheels).returncode == 0
    assert module.read_text() == "version = '2.0'\n"

    (place.folder / "requirements.txt").write_text(PINS.replace("=2.0", "=3.0"))
    failed = place.step("--profile", "current", *wheels)
    assert failed.returncode == 1
    assert "tinyprobe==3.0: tinyprobe==3.0 is not available" in failed.stderr.splitlines()[-1]


def with_torch_and_an_old_probe(place: Place) -> tuple[str, str]:
    """Install torch and a tinyprobe below its range, and return the option by which pip finds the wheels."""
    (place.root / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (place.folder / "requirements.txt").write_text(f"{PINS}accelerate==1.15.0\n")
    make_torch(place.wheels, "2.14.1", "0.29.1", "13.0", "sm_60")
    given = ("--find-links", str(place.wheels))
    place.pip("install", *given, "torch", "torchvision", "tinyprobe==1.0")
    return given


def test_what_is_there_is_taken_if_it_is_tested_or_works(place: Place) -> None:
    """Versions inside and outside the ranges, offline and with some wheels, beside packages that need others."""
    make_wheel(place.wheels, "tinyuser", "1.0", "", "tinyprobe<1.5")
    make_wheel(place.wheels, "accelerate", "1.2.1", "")
    given = with_torch_and_an_old_probe(place)

    # Nothing can be installed, and all that steps 2 to 4 need imports.
    offline = place.step()
    assert (offline.returncode, offline.stdout.splitlines()[-1]) == (0, "Next: python step2_download_models.py")
    warnings = [line for line in offline.stdout.splitlines() if line.startswith("warning: ")]
    assert warnings[0].startswith("warning: not all could be installed: pip ended with code 1 while it installed tiny")
    assert warnings[1:] == [
        "warning: tinyprobe 1.0 is outside the tested range >=1.5,<2.1 and imports, tinyprobe==2.0 is wanted; "
        "fix: python -m pip install tinyprobe==2.0",
        "warning: accelerate is missing: several processes at once (torchrun) do not work; "
        "fix: python -m pip install accelerate==1.15.0",
    ]
    assert [f"warning: {warning}" for warning in place.report["warnings"]] == warnings
    states = {name: row["state"] for name, row in place.report["packages"].items()}
    assert states == {
        "torch": "right",
        "torchvision": "right",
        "tinyprobe": "outside the tested range >=1.5,<2.1",
        "accelerate": "accelerate==1.15.0 is wanted (not needed by steps 2 to 4)",
    }
    check = place.step("--check-only")
    assert (check.returncode, [line for line in check.stdout.splitlines() if line in warnings]) == (0, warnings[1:])
    assert place.step("--check-only", "--profile", "current").returncode == 1

    # The wheels have one of the two.
    some = place.step("--wheels", str(place.wheels))
    assert (some.returncode, place.installed("tinyprobe"), place.installed("accelerate")) == (0, "2.0", None)
    assert warnings[2] in some.stdout

    # An installed package needs the version outside the range; the other lies inside.
    place.pip("install", *given, "tinyuser", "tinyprobe==1.0", "accelerate")
    kept = place.step("--wheels", str(place.wheels))
    assert (kept.returncode, place.installed("tinyprobe")) == (0, "1.0")
    assert "; nothing to install" in kept.stdout
    (line,) = (line for line in kept.stdout.splitlines() if line.startswith("warning: "))
    assert line.startswith(
        "warning: tinyprobe 1.0 is outside the tested range >=1.5,<2.1 and stays, because tinyuser 1.0 requires "
        "tinyprobe<1.5; fix: "
    )
    assert place.constraints == ["torch==2.14.1", "torchvision==0.29.1", "tinyprobe==1.0", "accelerate==1.2.1"]


def test_a_requirement_that_the_wanted_version_breaks_is_said(place: Place) -> None:
    """The wanted tinyprobe brings another helper than an installed package requires."""
    with_torch_and_an_old_probe(place)
    more = place.root / "more"
    make_wheel(more, "helper", "1.0", "")
    make_wheel(more, "helper", "2.0", "")
    make_wheel(more, "holder", "1.0", "", "helper<2")
    make_wheel(more, "tinyprobe", "2.0", "", "helper>=2")
    place.pip("install", "--find-links", str(more), "holder")
    broken = place.step("--wheels", str(more))
    assert (broken.returncode, place.installed("helper")) == (0, "2.0")
    (line,) = (line for line in broken.stdout.splitlines() if line.startswith("warning: holder"))
    assert line.startswith(
        "warning: holder 1.0 has requirement helper<2, but you have helper 2.0 (a package that step 1"
    )

    # What steps 2 to 4 need is an error if it is missing.
    place.pip("uninstall", "-y", "tinyprobe")
    gone = place.step()
    assert (gone.returncode, gone.stderr.splitlines()[-1].startswith("error: pip ended with code 1")) == (1, True)


@pytest.mark.skipif(
    f"{platform.system()} {platform.machine()}" != "Linux x86_64" or sys.version_info >= (3, 14),
    reason="torch 2.7.1 has wheels with GPU kernels for Linux x86_64 and Python up to 3.13",
)
def test_a_torch_without_kernels_for_the_gpu_is_replaced(place: Place) -> None:
    """A P100 with the stock torch, as a notebook has it, from the attached wheels and without a network."""
    make_torch(place.wheels / "torch", *STOCK)
    make_torch(place.wheels / "torch", *LEGACY)
    attached = place.root / "input" / "some data set" / "wheels"
    place.pip("install", "--find-links", str(place.wheels / "torch"), "torch==2.14.1", "torchvision==0.29.1")
    place.pip("install", "--find-links", str(place.wheels), "tinyprobe==2.0")

    # No wheels, no connection: torch still computes on the CPU, which is said.
    alone = place.step()
    assert alone.returncode == 0, alone.stderr
    last = alone.stdout.splitlines()[-1]
    assert last.startswith("Next: python step2_download_models.py (warning: torch 2.14.1 has no kernels for Tesla P100")
    assert "no connection to the package index http://127.0.0.1:9/simple; fix: switch the internet on" in last
    assert (place.report["torch"]["version"], place.report["torch"]["device"]) == ("2.14.1", "cpu")
    assert (
        "2.7.1 (CUDA 12.6) is the newest that serves Tesla P100-PCIE-16GB (6.0) with driver 580.65.06" in alone.stdout
    )

    attached.parent.mkdir(parents=True)
    (place.wheels / "torch").rename(attached)
    done = place.step(LIGHTNINGDIT_ATTACHED=str(place.root / "input"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "Next: python step2_download_models.py"
    report = place.report
    wanted = "torch==2.7.1 torchvision==0.22.1"
    assert report["decision"] == f"torch 2.14.1 is replaced by 2.7.1; to install: {wanted}"
    assert f"Decision: {report['decision']}\nReason: {report['reason']}\n" in done.stdout
    assert report["outcome"] == "torch 2.7.1 works here, on Tesla P100-PCIE-16GB (6.0)"
    assert (report["warning"], report["torch"]["device"], report["environments"]) == (
        "",
        "cuda",
        ["virtual environment"],
    )
    (gpu,) = report["gpus"]
    assert (gpu["capability"], gpu["driver"], gpu["fault"], gpu["native_bf16"]) == ([6, 0], "580.65.06", "", False)
    assert place.constraints == [*wanted.split(), "tinyprobe==2.0"]
    assert "nothing to install" in place.step().stdout

    # requirements.txt to the letter brings the pinned one back and says what that costs.
    current = place.step("--profile", "current", "--wheels", str(attached))
    assert current.returncode == 0, current.stderr
    assert place.report["reason"] == "the profile current names torch 2.14.1"
    assert "(warning: the CPU is used: torch 2.14.1 has no kernels for" in current.stdout.splitlines()[-1]
    assert place.constraints == PINS.split()


def test_a_system_interpreter_is_refused_if_it_lacks_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    pins = [Pin("torch", "2.14.1"), Pin("torchvision", "0.29.1"), Pin("no-such-package-here", "1.0")]
    monkeypatch.setattr(install, "read_pins", lambda path: pins)
    monkeypatch.setattr(machine, "probe", lambda names: WORKING)
    for options in (["--dry-run"], []):
        with pytest.raises(LightningDiTError, match=r"fix: .*-m venv .venv && .venv/bin/python step1"):
            step1.main(options)

    # Without a package that steps 2 to 4 need, it is enough as it is.
    pins[2] = Pin("tqdm", "9.0")
    monkeypatch.setattr(install, "read_ranges", lambda path: {"tqdm": ">=8.0,<9.1"})
    monkeypatch.setattr(conflicts, "who_needs", lambda *question: "")
    monkeypatch.setattr(conflicts, "broken_requirements", dict)
    monkeypatch.setattr(environment, "CONSTRAINTS", tmp_path / "constraints.txt")
    monkeypatch.setattr(project, "REPORT", tmp_path / "report.json")
    assert step1.main(["--dry-run"]) == 0
    assert "\nWould install nothing: " in capsys.readouterr().out
    assert step1.main([]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nwarning: not all could be installed: .* belongs to the operating system", said)
    assert re.search(r"\nwarning: tqdm .* is outside the tested range >=8\.0,<9\.1 and imports, tqdm==9\.0 is", said)


def test_the_lowest_versions_are_right_and_need_no_network(other_python: Path, tmp_path: Path) -> None:
    folder = copy_project(tmp_path / "project")
    done = run_script(folder / "step1_install_environment.py", python=str(other_python), PIP_NO_INDEX="1")
    assert (done.returncode, done.stderr, "warning: " in done.stdout) == (0, "", False)
    packages = json.loads((folder / "environment_report.json").read_text())["packages"]
    others = {name: version for name, version in other_pins().items() if name in packages}
    assert len(others) >= 8
    assert {name: packages[name]["installed"] for name in others} == others
    assert all(packages[name]["state"].startswith("right") for name in others)


def test_configurations_and_pictures_are_the_same_with_the_lowest_versions(other_python: Path) -> None:
    """Their own tests, in a process with the lowest omegaconf, pillow and numpy."""
    files = [str(project.PROJECT / "tests" / f"test_{name}.py") for name in ("config", "images")]
    command = [str(other_python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", *files]
    done = subprocess.run(command, cwd=project.PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\n\d\d+ passed", done.stdout)


def test_every_profile_reads_its_own_pins() -> None:
    auto, current, official = (environment.read_profile(name, dev=False) for name in environment.PROFILES)
    assert (auto.asked, auto.pins) == (None, current.pins)
    assert (current.asked.torch, official.asked.torch, official.asked.torchvision) == (
        auto.lines[0].torch,
        "2.2.0",
        "0.17.0",
    )
    assert {pin.name for pin in auto.pins} < {pin.name for pin in environment.read_profile("auto", dev=True).pins}
    assert {"timm": "1.0.12", "numpy": "1.26.4"}.items() <= {pin.name: pin.version for pin in official.pins}.items()


def test_a_read_only_project_costs_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(environment, "CONSTRAINTS", tmp_path / "file" / "environment_constraints.txt")
    monkeypatch.setattr(machine, "probe", lambda names: WORKING)
    profile = environment.read_profile("auto", dev=False)
    state = environment.find_out(profile)
    environment.write_outputs(profile, state, state)
    said = capsys.readouterr().out
    assert said.startswith("note: ")
    assert (said.count("\n"), "cannot be written (Not a directory)" in said) == (1, True)


@pytest.mark.skipif(sys.platform == "win32", reason="quotes of a POSIX shell")
def test_the_dry_run_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bound and a folder with a space pass a shell whole; the versions that stay are named."""
    monkeypatch.setattr(install, "refuse_unfit_process", lambda rows: None)
    monkeypatch.setattr(install, "lacks_record", lambda name: False)
    wheels = tmp_path / "my wheels"
    make_wheel(wheels, "numpy", "1.26.4", "")
    decision = Decision(KEEP, "2.2.0", "0.17.*", "<2", "it works")
    rows = [Row("torch", "2.14.1", "2.2.0", "2.2.0+cpu"), Row("numpy", "2.4.6", "<2", "2.4.6")]
    step1.would_run(
        environment.State(Machine((3, 11), "", (), TorchFacts()), decision, rows), pip_calls.find_sources(wheels)
    )
    hold, run = capsys.readouterr().out.splitlines()
    assert hold == "Would hold, one a line in constraints.txt: torch==2.2.0+cpu"
    command = run.removeprefix("Would run: ")
    echoed = subprocess.run(f"printf '%s\\n' {command}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    options = ["--no-index", "--find-links", str(wheels), "--constraint", "constraints.txt"]
    assert echoed.stdout.splitlines() == pip_calls.pip_command(["numpy<2"], *options)
    assert list(tmp_path.iterdir()) == [wheels]

    rebuilt = [Row("torch", "2.7.1", "2.7.1", "2.7.1", fault="has no kernels")]
    decision = Decision(REPLACE, "2.7.1", "0.22.1", "", "has no kernels")
    step1.would_run(
        environment.State(Machine((3, 11), "", (), TorchFacts()), decision, rebuilt), pip_calls.find_sources(wheels)
    )
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" --force-reinstall --no-deps torch==2.7.1")
    assert second.endswith(f"--find-links '{wheels}' torch==2.7.1")


NO_KERNELS = Gpu("Tesla P100-PCIE-16GB", (6, 0), 17_059_545_088, "580.65.06", "no kernel image is available")
STOCK_ON_P100 = TorchFacts("2.14.1", True, cuda="13.0", archs=("sm_75", "compute_120"), gpus=(NO_KERNELS,))
CUT_SHORT = TorchFacts(note="torch does not import: invalid syntax", gpus=(NO_KERNELS,))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[TorchFacts, str], tuple[Profile, State]]:
    """A machine with a P100, the stock torch and no byte free; gives what step 1 finds out there."""

    def found(facts: TorchFacts, place: str) -> tuple[Profile, State]:
        monkeypatch.setattr(machine, "probe", lambda names: Probe(facts, {}))
        here = Machine((3, 11), "Linux x86_64", (place,), facts, facts.gpus)
        monkeypatch.setattr(machine, "look_around", lambda torch: here)
        pins = [Pin("torch", "2.14.1"), Pin("torchvision", "0.29.1")]
        profile = Profile("auto", "requirements.txt", pins, releases.release_lines("2.14.1", "0.29.1"), None)
        return profile, environment.find_out(profile)

    for module in (machine, install):
        monkeypatch.setattr(module, "installed_version", {"torch": "2.14.1", "torchvision": "0.29.1"}.get)
    monkeypatch.setattr(pip_calls, "attached_folder", lambda: None)
    monkeypatch.setattr(install, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(install, "refuse_unfit_process", lambda rows: None)
    monkeypatch.setattr(conflicts, "broken_requirements", dict)
    return found


@pytest.mark.parametrize("place", ["Kaggle", "Colab", "conda", "plain"])
def test_too_little_disk_keeps_a_torch_that_computes(full_disk: Callable, place: str) -> None:
    profile, state = full_disk(STOCK_ON_P100, place)
    assert state.decision.action == REPLACE
    last = environment.bring_right(profile, state, pip_calls.find_sources(None))
    assert (last.decision.action, last.decision.torch, last.lacking) == (KEEP, "2.14.1", [])
    assert last.decision.reason == "torch 2.14.1 computes on the CPU and could not be replaced"
    assert "has no kernels for Tesla P100" in last.decision.warning
    assert re.search(r", but the packages need up to .* at .*, 0 B are free; fix: free space", last.decision.warning)


def test_too_little_disk_is_an_error_where_no_torch_computes(full_disk: Callable) -> None:
    profile, state = full_disk(CUT_SHORT, "Kaggle")
    with pytest.raises(InstallError, match=r"the packages need up to .*, 0 B are free; fix: free space"):
        environment.bring_right(profile, state, pip_calls.find_sources(None))


def test_too_little_disk_is_an_error_for_a_named_profile(full_disk: Callable) -> None:
    profile, _ = full_disk(STOCK_ON_P100, "Kaggle")
    profile = replace(profile, name="official", asked=Asked("official", "2.2.0", "0.17.0"))
    with pytest.raises(InstallError, match="0 B are free"):
        environment.bring_right(profile, environment.find_out(profile), pip_calls.find_sources(None))
