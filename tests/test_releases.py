"""The decision about torch, on simulated machines: one row a machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from LightningDiT.errors import LightningDiTError
from setup_steps import install, releases
from setup_steps.machine import Gpu, Machine, TorchFacts
from setup_steps.project import PROJECT
from setup_steps.releases import INSTALL, KEEP, REPLACE, Asked

LINES = releases.release_lines("2.14.1", "0.29.1")
CU130, CU128, CU126, CU121 = (line.kernels for line in LINES)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
P100 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 17_000_000_000, "580.65.06")
V100 = Gpu("Tesla V100-SXM2-16GB", (7, 0), 17_000_000_000, "580.65.06")
T4 = Gpu("Tesla T4", (7, 5), 15_800_000_000, "580.65.06")
L4 = Gpu("NVIDIA L4", (8, 9), 24_000_000_000, "580.65.06")
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25_700_000_000, "580.65.06")
RTX5090 = Gpu("NVIDIA GeForce RTX 5090", (12, 0), 34_000_000_000, "580.65.06")
RTXPRO6000 = Gpu("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 102_000_000_000, "580.65.06")
GB10 = Gpu("NVIDIA GB10", (12, 1), 128_000_000_000, "580.65.06")
NEXT = Gpu("NVIDIA Next", (14, 0), 300_000_000_000, "700.10")
A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 42_000_000_000, "580.65.06")
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_000_000_000, "580.65.06")
B200 = Gpu("NVIDIA B200", (10, 0), 192_000_000_000, "580.65.06")
K80 = Gpu("Tesla K80", (3, 7), 12_000_000_000, "580.65.06")
UNKNOWN = Gpu("NVIDIA Something New", (0, 0), 0, "580.65.06")


def tried(gpu: Gpu, fault: str | None, driver: str = "") -> Gpu:
    """The GPU after a kernel was run on it."""
    return replace(gpu, fault=fault, driver=driver or gpu.driver)


def built(version: str, cuda: str, archs: tuple[str, ...] = (), note: str = "") -> TorchFacts:
    """A torch that computes on the CPU."""
    return TorchFacts(version, True, cuda=cuda, archs=archs, note=note)


def machine(torch: TorchFacts, *gpus: Gpu, python: tuple[int, int] = (3, 11), system: str = "Linux x86_64") -> Machine:
    return Machine(python, system, ("Kaggle",), torch, gpus)


ABSENT = TorchFacts()
STOCK = built("2.10.0+cu128", "12.8", CU128)  # of Kaggle's image: no sm_60
NEWEST = built("2.14.1", "13.0", CU130)
BROKEN = TorchFacts("", note="torch does not import: libcudart.so.13 is not there")
OLD_DRIVER = "driver on your system is too old"

#: machine, action, torch, torchvision, words of the reason, words of the warning (empty: there is none)
TABLE = {
    # nothing there: the newest release that serves the device, its driver and the Python
    "absent, no GPU": (machine(ABSENT), INSTALL, "2.14.1", "0.29.1", "computes on the CPU", ""),
    "absent, P100": (machine(ABSENT, P100), INSTALL, "2.7.1", "0.22.1", "newest that serves Tesla P100", ""),
    "absent, V100": (machine(ABSENT, V100), INSTALL, "2.10.0", "0.25.0", "newest that serves Tesla V100", ""),
    "absent, T4 x2": (machine(ABSENT, T4, T4), INSTALL, "2.14.1", "0.29.1", "serves 2 x Tesla T4 (7.5)", ""),
    "absent, A100": (machine(ABSENT, A100), INSTALL, "2.14.1", "0.29.1", "NVIDIA A100", ""),
    "absent, H100": (machine(ABSENT, H100), INSTALL, "2.14.1", "0.29.1", "NVIDIA H100", ""),
    "absent, B200": (machine(ABSENT, B200), INSTALL, "2.14.1", "0.29.1", "NVIDIA B200", ""),
    "absent, unknown GPU": (machine(ABSENT, UNKNOWN), INSTALL, "2.14.1", "0.29.1", "Something New", ""),
    "absent, P100 and T4": (
        machine(ABSENT, T4, P100),
        *(INSTALL, "2.7.1", "0.22.1", "the weakest GPU, Tesla P100-PCIE-16GB (6.0), decides", ""),
    ),
    "absent, K80": (
        machine(ABSENT, K80),
        *(
            INSTALL,
            "2.14.1",
            "0.29.1",
            "CPU",
            "CPU is used: Tesla K80 (3.7) is not used (no torch from 2.2.0",
        ),
    ),
    "absent, K80 and T4": (machine(ABSENT, K80, T4), INSTALL, "2.14.1", "0.29.1", "serves Tesla T4", "Tesla K80 (3.7)"),
    "absent, B200 and P100": (
        machine(ABSENT, B200, P100),
        *(INSTALL, "2.14.1", "0.29.1", "serves NVIDIA B200", "Tesla P100-PCIE-16GB (6.0) is not used (torch 2.7.1"),
    ),
    "absent, T4, driver 550": (
        machine(ABSENT, replace(T4, driver="550.90.07")),
        *(INSTALL, "2.10.0", "0.25.0", "with driver 550.90.07", ""),
    ),
    "absent, T4, driver 470": (
        machine(ABSENT, replace(T4, driver="470.82.01")),
        *(INSTALL, "2.14.1", "0.29.1", "CPU", "its driver 470.82.01 is too old, install 525 or newer"),
    ),
    "absent, P100, Python 3.14": (
        machine(ABSENT, P100, python=(3, 14)),
        *(INSTALL, "2.14.1", "0.29.1", "CPU", "torch 2.7.1 serves it on Python 3.13: python3.13 -m venv"),
    ),
    "absent, V100, Python 3.14": (machine(ABSENT, V100, python=(3, 14)), INSTALL, "2.10.0", "0.25.0", "V100", ""),
    "absent, Windows, P100": (
        machine(ABSENT, P100, system="Windows AMD64"),
        *(INSTALL, "2.14.1", "0.29.1", "CPU", "install a torch with CUDA for Windows AMD64 by hand"),
    ),
    "absent, L4 x4": (machine(ABSENT, *[L4] * 4), INSTALL, "2.14.1", "0.29.1", "serves 4 x NVIDIA L4 (8.9) with", ""),
    "absent, RTX 4090, driver 535": (
        machine(ABSENT, replace(RTX4090, driver="535.183.01")),
        *(INSTALL, "2.10.0", "0.25.0", "serves NVIDIA GeForce RTX 4090 (8.9) with driver 535.183.01", ""),
    ),
    "absent, RTX PRO 6000": (machine(ABSENT, RTXPRO6000), INSTALL, "2.14.1", "0.29.1", "RTX PRO 6000 Blackwell", ""),
    "absent, GB10": (machine(ABSENT, GB10), INSTALL, "2.14.1", "0.29.1", "serves NVIDIA GB10 (12.1)", ""),
    "absent, RTX 5090, driver 570": (
        machine(ABSENT, replace(RTX5090, driver="570.86.10")),
        *(INSTALL, "2.10.0", "0.25.0", "(CUDA 12.8) is the newest that serves NVIDIA GeForce RTX 5090 (12.0)", ""),
    ),
    "absent, L4 and T4": (
        machine(ABSENT, L4, T4),
        *(INSTALL, "2.14.1", "0.29.1", "the weakest GPU, Tesla T4 (7.5), decides", ""),
    ),
    "absent, RTX 5090 and V100": (
        machine(ABSENT, RTX5090, V100),
        *(INSTALL, "2.10.0", "0.25.0", "the weakest GPU, Tesla V100-SXM2-16GB (7.0), decides", ""),
    ),
    "absent, RTX 4090 and P100": (
        machine(ABSENT, RTX4090, P100),
        *(INSTALL, "2.7.1", "0.22.1", "the weakest GPU, Tesla P100-PCIE-16GB (6.0), decides", ""),
    ),
    "absent, a GPU newer than the table": (
        machine(ABSENT, NEXT),
        *(INSTALL, "2.14.1", "0.29.1", "CPU", "it is newer than torch 2.14.1: install a newer torch by hand"),
    ),
    # not usable at all
    "broken, no GPU": (machine(BROKEN), REPLACE, "2.14.1", "0.29.1", "does not import: libcudart", ""),
    "broken, P100": (machine(BROKEN, P100), REPLACE, "2.7.1", "0.22.1", "does not import: libcudart", ""),
    "too old": (machine(built("2.1.0", "12.1")), REPLACE, "2.14.1", "0.29.1", "torch 2.1.0 is older than 2.2", ""),
    # what works is kept, whatever release it is
    "works, no GPU": (
        machine(built("2.9.0+cpu", "")),
        KEEP,
        "2.9.0",
        "0.24.*",
        "on the CPU (there is no GPU)",
        "",
    ),
    "works, newest": (machine(NEWEST), KEEP, "2.14.1", "0.29.1", "torch 2.14.1 works here", ""),
    "works, L4 x4": (
        machine(built("2.7.1+cu126", "12.6", CU126), *[tried(L4, "")] * 4),  # sm_86 kernels
        *(KEEP, "2.7.1", "0.22.*", "works here, on 4 x NVIDIA L4 (8.9)", ""),
    ),
    "works, T4 x2": (
        machine(STOCK, tried(T4, ""), tried(T4, "")),
        *(KEEP, "2.10.0", "0.25.*", "works here, on 2 x Tesla T4 (7.5)", ""),
    ),
    "works, V100": (machine(STOCK, tried(V100, "")), KEEP, "2.10.0", "0.25.*", "on Tesla V100", ""),
    "works, P100": (machine(built("2.8.0+cu126", "12.6", CU126), tried(P100, "")), KEEP, "2.8.0", "0.23.*", "P100", ""),
    "works, newer than the table": (
        machine(built("2.16.0", "13.2", CU130), tried(H100, "")),
        KEEP,
        "2.16.0",
        "0.31.*",
        "",
        "",
    ),
    "works, AMD": (
        machine(replace(built("2.9.0", ""), hip="6.4"), tried(Gpu("MI250", (9, 0)), "")),
        *(KEEP, "2.9.0", "0.24.*", "on MI250", ""),
    ),
    "AMD device fails": (
        machine(
            replace(built("2.9.0", ""), hip="6.4"), tried(Gpu("Radeon", (10, 3)), "HIP error: invalid device function")
        ),
        *(KEEP, "2.9.0", "0.24.*", "on the CPU", "cannot use Radeon (10.3): HIP error"),
    ),
    "Apple": (machine(built("2.14.1", ""), system="Darwin arm64"), KEEP, "2.14.1", "0.29.1", "on the CPU", ""),
    # what does not run a kernel is replaced
    "stock on P100": (
        machine(STOCK, tried(P100, NO_KERNEL)),
        *(REPLACE, "2.7.1", "0.22.1", "has no kernels for Tesla P100-PCIE-16GB (6.0), only sm_70", ""),
    ),
    "newest on V100": (
        machine(NEWEST, tried(V100, NO_KERNEL)),
        REPLACE,
        "2.10.0",
        "0.25.0",
        "no kernels for Tesla V100",
        "",
    ),
    "stock on P100 and T4": (
        machine(STOCK, tried(T4, ""), tried(P100, NO_KERNEL)),
        *(REPLACE, "2.7.1", "0.22.1", "the weakest GPU, Tesla P100-PCIE-16GB (6.0), decides", ""),
    ),
    "listed, but does not run": (
        machine(STOCK, tried(T4, "CUBLAS_STATUS_NOT_SUPPORTED")),
        *(REPLACE, "2.14.1", "0.29.1", "cannot use Tesla T4 (7.5): CUBLAS_STATUS_NOT_SUPPORTED", ""),
    ),
    "newest, T4, driver 550": (
        machine(replace(NEWEST, archs=(), note=OLD_DRIVER), tried(T4, None, "550.90.07")),
        *(REPLACE, "2.10.0", "0.25.0", "(CUDA 13.0) needs the NVIDIA driver 580 or newer, 550.90.07 is here", ""),
    ),
    "CPU build, T4": (
        machine(built("2.14.1+cpu", ""), tried(T4, None)),
        *(REPLACE, "2.14.1", "0.29.1", "is built for the CPU alone and cannot use Tesla T4", ""),
    ),
    "too old a torch on RTX 5090": (
        machine(built("2.7.1+cu126", "12.6", CU126), tried(RTX5090, NO_KERNEL)),
        *(REPLACE, "2.14.1", "0.29.1", "has no kernels for NVIDIA GeForce RTX 5090 (12.0), only sm_50", ""),
    ),
    "too old a torch on RTX 5090, driver 570": (
        machine(built("2.2.0+cu121", "12.1", CU121), tried(RTX5090, NO_KERNEL, "570.86.10")),
        *(REPLACE, "2.10.0", "0.25.0", "has no kernels for NVIDIA GeForce RTX 5090 (12.0), only sm_50", ""),
    ),
    "newest, RTX 4090, driver 535": (
        machine(replace(NEWEST, archs=(), note=OLD_DRIVER), tried(RTX4090, None, "535.183.01")),
        *(REPLACE, "2.10.0", "0.25.0", "needs the NVIDIA driver 580 or newer, 535.183.01 is here", ""),
    ),
    # where no other torch helps, the one that computes is kept and the CPU used
    "stock on K80": (
        machine(STOCK, tried(K80, NO_KERNEL)),
        *(
            KEEP,
            "2.10.0",
            "0.25.*",
            "on the CPU",
            "no torch from 2.2.0 on has kernels for it, another GPU is needed",
        ),
    ),
    "stock on T4 and K80": (
        machine(STOCK, tried(T4, ""), tried(K80, NO_KERNEL)),
        *(KEEP, "2.10.0", "0.25.*", "on Tesla T4", "no kernels for Tesla K80 (3.7)"),
    ),
    "stock on K80 and T4": (
        machine(STOCK, tried(K80, NO_KERNEL), tried(T4, "")),
        *(KEEP, "2.10.0", "0.25.*", "on Tesla T4", "CPU is used unless CUDA_VISIBLE_DEVICES=1 names"),
    ),
    "newest, driver 470": (
        machine(replace(NEWEST, archs=(), note=OLD_DRIVER), tried(T4, None, "470.82.01")),
        *(KEEP, "2.14.1", "0.29.1", "on the CPU", "its driver 470.82.01 is too old, install 525 or newer"),
    ),
    "full T4": (
        machine(STOCK, tried(T4, "CUDA out of memory. Tried to allocate 20.00 MiB")),
        *(KEEP, "2.10.0", "0.25.*", "on the CPU", "cannot use Tesla T4 (7.5) now: CUDA out of memory"),
    ),
    "2.7.1 on P100 that fails": (
        machine(built("2.7.1+cu126", "12.6", CU126), tried(P100, "unspecified launch failure")),
        *(KEEP, "2.7.1", "0.22.*", "on the CPU", "unspecified launch failure (nvidia-smi shows its state"),
    ),
    "unseen without a reason": (
        machine(replace(STOCK, archs=()), tried(T4, None)),
        *(KEEP, "2.10.0", "0.25.*", "on the CPU", "does not see Tesla T4 (7.5) (nvidia-smi"),
    ),
    "CPU build, Windows": (
        machine(built("2.14.1+cpu", ""), tried(T4, None), system="Windows AMD64"),
        *(KEEP, "2.14.1", "0.29.1", "on the CPU", "install a torch with CUDA for Windows AMD64 by hand"),
    ),
}


@pytest.mark.parametrize("environment", ["Kaggle", "Colab", "conda", "virtual environment", "plain"])
@pytest.mark.parametrize("name", TABLE)
def test_the_decision(name: str, environment: str) -> None:
    """By evidence alone, in any environment."""
    here, action, torch, torchvision, reason, warning = TABLE[name]
    decision = releases.decide(replace(here, environments=(environment,)), LINES)
    assert (decision.action, decision.torch, decision.torchvision) == (action, torch, torchvision)
    assert reason in decision.reason
    assert warning in decision.warning
    assert bool(decision.warning) == bool(warning)
    assert "\n" not in decision.reason + decision.warning


def test_the_newest_row_is_what_is_pinned_and_the_last_the_official_profile() -> None:
    for line, file in ((LINES[0], "requirements.txt"), (LINES[-1], "requirements-official.txt")):
        pins = {pin.name: pin.version for pin in install.read_pins(PROJECT / file)}
        assert (line.torch, line.torchvision) == (pins["torch"], pins["torchvision"])


def test_the_kernels_of_the_table_are_those_of_the_installed_wheel() -> None:
    """torch lists them without a GPU."""
    torch = pytest.importorskip("torch")
    line = next((line for line in LINES if line.torch == releases.public(torch.__version__)), None)
    if line is None or not torch.version.cuda:
        pytest.skip(f"torch {torch.__version__} is no wheel with GPU kernels of the table")
    assert tuple(torch._C._cuda_getArchFlags().split()) == line.kernels
    assert torch.version.cuda == line.cuda


def test_every_torchvision_is_that_of_its_torch() -> None:
    for line in LINES:
        assert install.satisfies(line.torchvision, releases.vision_of(line.torch))


def test_numpy_is_bound_for_old_releases_alone() -> None:
    for version, numpy in (("2.2.0", "<2"), ("2.2.2+cu121", "<2"), ("2.3.0", ""), ("2.7.1", ""), ("2.14.1", "")):
        assert releases.decide(machine(built(version, "12.1")), LINES).numpy == numpy


@pytest.mark.parametrize("version", ["2.9.0", ""])
def test_a_named_profile_takes_its_torch_whatever_works(version: str) -> None:
    there = built(version, "12.6") if version else ABSENT
    decision = releases.decide(machine(there), LINES, Asked("official", "2.2.0", "0.17.0"))
    expected = (REPLACE if version else INSTALL, "2.2.0", "0.17.0", "")
    assert (decision.action, decision.torch, decision.torchvision, decision.numpy) == expected
    assert decision.reason == "the profile official names torch 2.2.0"


def test_a_named_profile_keeps_its_own_torch_and_says_what_that_does_not_serve() -> None:
    here = machine(NEWEST, tried(P100, NO_KERNEL))
    decision = releases.decide(here, LINES, Asked("current", "2.14.1", "0.29.1"))
    assert (decision.action, decision.torchvision) == (KEEP, "0.29.1")
    assert "no kernels for Tesla P100" in decision.warning


@pytest.mark.parametrize("python", [(3, 13), (3, 14)])
def test_the_official_profile_wants_python_up_to_3_12(python: tuple[int, int]) -> None:
    asked = Asked("official", "2.2.0", "0.17.0")
    assert releases.decide(machine(ABSENT, python=(3, 12)), LINES, asked).torch == "2.2.0"
    with pytest.raises(
        LightningDiTError, match=r"torch 2.2.0 has no wheels for Python 3.1[34], 3.12 is the newest"
    ) as refusal:
        releases.decide(machine(ABSENT, python=python), LINES, asked)
    assert refusal.value.fix == (
        "python3.12 -m venv official && official/bin/python step1_install_environment.py --profile official"
    )


def test_a_torch_that_cannot_be_replaced_is_kept_with_the_reason() -> None:
    here = machine(STOCK, tried(P100, NO_KERNEL))
    kept = releases.decide(here, LINES).kept_anyway(here.torch, "there is no connection")
    assert (kept.action, kept.torch, kept.torchvision) == (KEEP, "2.10.0", "0.25.*")
    assert "no kernels for Tesla P100" in kept.warning
    assert kept.warning.endswith("but there is no connection")
