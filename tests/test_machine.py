"""What the machine is found to be: torch by a real product, GPUs by nvidia-smi, kernels by their names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from setup_steps import machine
from setup_steps.install import read_pins
from setup_steps.machine import Gpu, TorchFacts, installed_version, try_imports
from setup_steps.project import PROJECT
from tests.project_copy import copy_project, run_script
from tests.wheels import FAKE_TORCH, make_nvidia_smi

LEGACY = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")  # torch 2.7.1 with CUDA 12.6
CURRENT = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


def test_torch_facts_are_true_here() -> None:
    facts = machine.torch_facts()
    assert facts.version == torch.__version__
    assert facts.works
    assert facts.cuda == (torch.version.cuda or "")
    assert (facts.device_memory > 0) == (facts.device != "cpu")
    assert len(facts.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_probe_blames_only_what_is_broken(tmp_path: Path) -> None:
    probe = machine.probe(["json", "no_such_module_at_all"])
    assert probe.faults["json"] == ""
    assert "No module named" in probe.faults["no_such_module_at_all"]
    # `this_kills` ends the probing process: the others are then probed one by one.
    folder = copy_project(tmp_path / "copy")
    (folder / "this_kills.py").write_text("import os\nos._exit(3)\n")
    program = "from setup_steps import machine\nprint(machine.probe(['json', 'this_kills']).faults)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str({"json": "", "this_kills": "the process ended with code 3"})


def test_a_package_that_is_cut_short_is_a_fault_whatever_it_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {"cut_in_a_line": "def f(:\n", "cut_at_the_top": "f()\n", "cut_in_a_table": "TABLE = {}\nTABLE['x']\n"}
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    faults = machine.try_imports(list(bodies))
    assert "invalid syntax" in faults["cut_in_a_line"]
    assert faults["cut_at_the_top"] == "name 'f' is not defined"
    assert faults["cut_in_a_table"] == "'x'"


@pytest.mark.parametrize(
    "command",
    [
        ("step2_download_models.py", "--endpoint", "http://127.0.0.1:9"),
        ("step3_setup_configs.py",),
        ("fix_latents_stats.py",),
    ],
)
@pytest.mark.parametrize("body", ["def f(:\n", "f()\n"])
def test_a_torch_that_is_cut_short_is_one_line(tmp_path: Path, command: tuple[str, ...], body: str) -> None:
    folder = copy_project(tmp_path / "copy")
    (folder / "torch.py").write_text(body)
    done = run_script(folder / command[0], *command[1:], cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert re.search(r"torch.* does not import.*(invalid syntax|'f' is not defined).*; fix: ", done.stderr)


@pytest.mark.parametrize("archs", [("sm_75",), ("sm_60",)])
def test_the_probe_brings_a_gpu_and_what_its_kernel_said(tmp_path: Path, archs: tuple[str, ...]) -> None:
    folder = copy_project(tmp_path / "copy")
    (folder / "torch.py").write_text(FAKE_TORCH.format(version="2.9.0", cuda="12.8", archs=archs))
    program = (
        "import dataclasses, json\nfrom setup_steps import machine\n"
        "print(json.dumps(dataclasses.asdict(machine.probe(['torch']).torch)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    facts = TorchFacts.from_json(json.loads(done.stdout))
    said = "" if archs == ("sm_60",) else "CUDA error: no kernel image is available for execution on the device"
    gpu = Gpu("Tesla P100-PCIE-16GB", (6, 0), 17_059_545_088, fault=said)
    assert (facts.version, facts.works, facts.cuda, facts.archs, facts.gpus) == ("2.9.0", True, "12.8", archs, (gpu,))
    assert (facts.device, facts.device_memory) == (("cuda", gpu.memory) if not said else ("cpu", 0))
    assert facts.note == (f"{gpu.title} is not usable: {said}; kernels: sm_75" if said else "")


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (LEGACY, (6, 0), True),  # P100
        (LEGACY, (6, 1), True),  # P40: the same major number, a higher minor one
        (LEGACY, (3, 7), False),  # K80
        (LEGACY, (8, 9), True),  # L4
        (LEGACY, (10, 0), False),  # B200: no machine code, no PTX
        (CURRENT, (6, 0), False),
        (CURRENT, (7, 0), False),  # V100 is older than sm_75
        (CURRENT, (7, 5), True),
        (CURRENT, (9, 0), True),
        (CURRENT, (12, 1), True),
        (CURRENT, (13, 0), True),  # by PTX
        (("compute_80",), (7, 5), False),
        (("compute_50",), (6, 0), True),
        (("sm_90a",), (9, 0), True),
        (("sm_90a", "compute_90a"), (10, 0), False),  # a: this one kind alone
        (("sm_100a",), (10, 3), False),
        (("sm_100f",), (10, 3), True),  # f: its family
        (("compute_100f",), (12, 0), False),
        (("gfx90a",), (9, 0), False),
        ((), (7, 5), False),
    ],
)
def test_kernels_by_their_names(archs: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    assert machine.has_kernels(archs, capability) is runs


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    make_nvidia_smi(tmp_path, "Tesla T4, 7.5, 15360, 535.104.05", "NVIDIA H100 80GB HBM3, 9.0, 81559, 535.104.05")
    t4 = Gpu("Tesla T4", (7, 5), 15360 * 2**20, "535.104.05")
    h100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559 * 2**20, "535.104.05")
    assert machine.ask_nvidia_smi() == (t4, h100)
    assert (t4.native_bf16, h100.native_bf16) == (False, True)
    for chosen, gpus in {"1": (h100,), "1,0": (h100, t4), "": (), "-1": (), "5": (), "GPU-8a1": (t4, h100)}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert machine.ask_nvidia_smi() == gpus, chosen


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("Tesla T4", (7, 5)),
        ("Tesla K80", (3, 7)),
        ("NVIDIA Something New", (0, 0)),
    ],
)
def test_an_old_driver_is_asked_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    make_nvidia_smi(tmp_path, f"{name}, [N/A], 418.67", knows_capability=False)
    assert machine.ask_nvidia_smi() == (Gpu(name, capability, 0, "418.67"),)


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.ask_nvidia_smi() == ()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.ask_nvidia_smi() == ()


def test_what_torch_sees_comes_before_what_the_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    make_nvidia_smi(tmp_path, "Tesla T4, 7.5, 15360, 535.104.05")
    (unseen,) = machine.look_around(TorchFacts("2.14.1", True)).gpus
    assert (unseen.driver, unseen.fault) == ("535.104.05", None)
    (seen,) = machine.look_around(TorchFacts("2.14.1", True, gpus=(Gpu("Tesla T4", (7, 5), 1, fault=""),))).gpus
    assert seen == Gpu("Tesla T4", (7, 5), 1, "535.104.05", "")


@pytest.mark.parametrize(
    ("variables", "environment"),
    [
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "Kaggle"),
        ({"COLAB_RELEASE_TAG": "release-colab"}, "Colab"),
        ({}, "plain"),
    ],
)
def test_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], environment: str) -> None:
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    conda = ("conda",) if (Path(sys.prefix) / "conda-meta").is_dir() else ()
    expected = (*((environment,) if environment != "plain" else ()), *conda) or ("plain",)
    assert machine.look_around(TorchFacts()).environments == expected


def test_conda_and_virtual_environments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "COLAB_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert machine.look_around(TorchFacts()).environments == ("virtual environment",)
    (tmp_path / "conda-meta").mkdir()
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert machine.look_around(TorchFacts()).environments == ("conda",)


def test_the_machine_is_described_for_a_person(tmp_path: Path) -> None:
    p100 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 17_059_545_088, "535.1", "no kernel image is available")
    t4 = Gpu("Tesla T4", (7, 5), 15_800_000_000, "535.1", "")
    a100 = Gpu("A100", (8, 0), 42_000_000_000, "", None)
    facts = TorchFacts("2.14.1", True, cuda="13.0", archs=("sm_75",), note="a note")
    here = machine.Machine((3, 11), "Linux x86_64", ("Kaggle",), facts, (p100, t4, a100))
    rows = dict(machine.describe_machine(here, tmp_path))
    assert rows["GPU 0"] == (
        "Tesla P100-PCIE-16GB (6.0), 17.1 GB, driver 535.1, bf16 emulated, no kernel runs: no kernel image is available"
    )
    assert rows["GPU 1"] == "Tesla T4 (7.5), 15.8 GB, driver 535.1, bf16 emulated, a kernel ran"
    assert rows["GPU 2"] == "A100 (8.0), 42.0 GB, bf16 native, torch does not see it"
    assert (rows["torch"], rows["Kernels"], rows["Note"]) == ("2.14.1 (CUDA 13.0)", "sm_75", "a note")
    assert rows["Python"].endswith("Kaggle)")


@pytest.mark.parametrize("damaged", [b"", "Name: tinyprobe\nVersion: 1\nAuthor: André\n".encode("latin-1")])
def test_damaged_metadata_have_no_version(damaged: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tinyprobe-1.0.dist-info").mkdir()
    (tmp_path / "tinyprobe-1.0.dist-info" / "METADATA").write_bytes(damaged)
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version("tinyprobe") == machine.UNKNOWN
    assert machine.lacks_record("tinyprobe")


def test_every_pin_is_imported_by_the_name_of_its_module() -> None:
    """A distribution whose module is called otherwise needs a row of `IMPORT_NAMES`."""
    names = [pin.name for pin in read_pins(PROJECT / "requirements.txt") if installed_version(pin.name)]
    assert {"pillow", "torch"} <= set(names)
    assert {name: fault for name, fault in try_imports(names).items() if fault} == {}
    names = [pin.name for pin in read_pins(PROJECT / "requirements-dev.txt") if installed_version(pin.name)]
    modules = {name: machine.IMPORT_NAMES.get(name, name) for name in names}
    assert {name for name, module in modules.items() if find_spec(module) is None} == set()
