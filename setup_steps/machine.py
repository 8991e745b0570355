"""What this machine is: Python, place, memory, disk, GPUs, and whether torch works here, on which device.

`python -m setup_steps.machine NAME ...` imports the named distributions and prints what it found
as JSON: step 1 runs that in a process of its own, so that a broken torch cannot take it along and
nothing is replaced under an imported module.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from setup_steps.console import PROJECT, StepError, fix_packages, format_bytes, places

PROBE_SECONDS = 300
MODULE_SUFFIXES = (".py", ".so", ".pyd")
IMPORT_NAMES = {"pillow": "PIL", "torch-fidelity": "torch_fidelity"}  # distributions whose module has another name
NATIVE_BF16 = (8, 0)  # torch's own is_bf16_supported() is true where bf16 is emulated, too
SMI_SECONDS = 60
SMI_FIELDS = ("name", "compute_cap", "memory.total", "driver_version")
MIB = 1024 * 1024
#: Compute capability by a word of the name, for drivers that do not tell it.
CAPABILITIES = {"K80": (3, 7), "M40": (5, 2), "M60": (5, 2), "P4": (6, 1), "P40": (6, 1), "P100": (6, 0)} | {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
}


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Args:
        capability: compute capability; (0, 0) where it is not known.
        memory: bytes; 0 where it is not known.
        driver: version of the NVIDIA driver; empty where it is not known.
        fault: why no kernel ran on it; empty where one ran and came out right, None where torch,
            if there is one, does not see the device.
    """

    name: str
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    driver: str = ""
    fault: str | None = None

    @property
    def native_bf16(self) -> bool:
        """Whether bfloat16 is computed and not emulated."""
        return self.capability >= NATIVE_BF16

    @property
    def title(self) -> str:
        """'Tesla T4 (7.5)'."""
        return f"{self.name} ({'.'.join(map(str, self.capability))})" if self.capability > (0, 0) else self.name


@dataclass(frozen=True)
class TorchFacts:
    """torch by evidence: `works` is true when a product was really computed.

    Args:
        version: torch's version; empty where it does not import.
        works: the product on the CPU came out right.
        device: "cuda" where the product came out right there too, else "cpu".
        device_name: the accelerator's name, or the processor's.
        device_memory: bytes of the accelerator's memory; 0 on the CPU.
        note: why torch, or the accelerator, is not usable; empty where all is well.
        cuda: CUDA version that torch is built with; empty for a build without.
        hip: ROCm version that torch is built with (AMD devices); empty for a build without.
        archs: kernels that this build holds, as torch lists them ("sm_75", "compute_120").
        gpus: every accelerator that torch sees, each with the outcome of one real product.
    """

    version: str = ""
    works: bool = False
    device: str = "cpu"
    device_name: str = ""
    device_memory: int = 0
    note: str = ""
    cuda: str = ""
    hip: str = ""
    archs: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> TorchFacts:
        """The facts that `asdict` and JSON made lists of."""
        gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in facts["gpus"])
        return cls(**{**facts, "archs": tuple(facts["archs"]), "gpus": gpus})


def torch_facts() -> TorchFacts:
    """Import torch here and try it on the CPU and on every accelerator it names."""
    try:
        import torch
    except Exception as error:  # a package that is cut short raises whatever its rest leads to
        return TorchFacts(note=f"torch does not import: {one_line(error)}")

    name = platform.processor() or platform.machine()
    built = getattr(torch, "version", None)
    facts = TorchFacts(
        str(torch.__version__),
        device_name=name,
        cuda=str(getattr(built, "cuda", None) or ""),
        hip=str(getattr(built, "hip", None) or ""),
    )
    try:
        works = product_is_right(torch, "cpu")
    except Exception as error:
        return replace(facts, note=f"torch does not compute: {one_line(error)}")
    return gpu_facts(torch, replace(facts, works=works))


def gpu_facts(torch: ModuleType, facts: TorchFacts) -> TorchFacts:
    """`facts` with what torch sees and can do on its accelerators."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:
            return replace(facts, note=f"the GPU is not usable: {one_line(error)}")
    if not count:  # a driver that is too old is a mere warning of torch's
        return replace(facts, note=one_line(said[0].message) if said else "")
    archs = tuple(torch.cuda.get_arch_list())
    gpus = tuple(try_gpu(torch, index) for index in range(count))
    first = gpus[0]
    if first.fault:
        note = f"{first.title} is not usable: {first.fault}; kernels: {' '.join(archs)}"
        return replace(facts, archs=archs, gpus=gpus, note=note)
    return replace(facts, archs=archs, gpus=gpus, device="cuda", device_name=first.name, device_memory=first.memory)


def try_gpu(torch: ModuleType, index: int) -> Gpu:
    """One accelerator that torch sees, and whether a product on it comes out right."""
    try:
        found = torch.cuda.get_device_properties(index)
        gpu = Gpu(found.name, (found.major, found.minor), found.total_memory)
    except Exception as error:  # a device that torch has no kernels for raises classes of torch's own
        return Gpu(f"GPU {index}", fault=one_line(error))
    try:
        right = product_is_right(torch, f"cuda:{index}")
    except Exception as error:
        return replace(gpu, fault=one_line(error))
    return replace(gpu, fault="" if right else "computes wrongly")


def product_is_right(torch: ModuleType, device: str) -> bool:
    """Multiply two matrices of ones (64, 64) on the device: every entry must be 64."""
    ones = torch.ones(64, 64, device=device)
    return bool(((ones @ ones) == 64).all().item())


def has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether a build with these kernels runs on a device of this capability: machine code ("sm_XY")
    runs on the same major number from its minor number on, PTX ("compute_XY") on all that is newer;
    a letter behind the number binds both to that one kind (a) or its family (f).
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        reaches = built[0] == capability[0] or (match[1] == "compute" and not match[4])
        if built == capability or (built < capability and reaches and match[4] != "a"):
            return True
    return False


def ask_nvidia_smi() -> tuple[Gpu, ...]:
    """The GPUs that the NVIDIA driver names and this process may use; none where there is no driver."""
    # Drivers before 510 refuse the whole question for the sake of compute_cap.
    for fields in (SMI_FIELDS, tuple(field for field in SMI_FIELDS if field != "compute_cap")):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SMI_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return ()
        if done.returncode == 0:
            lines = [line.split(", ") for line in done.stdout.splitlines()]
            answers = [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]
            return visible(tuple(_gpu_of(answer) for answer in answers))
    return ()


def _gpu_of(answer: dict[str, str]) -> Gpu:
    """One line of nvidia-smi; what it does not know is written in brackets there."""
    match = re.fullmatch(r"(\d+)\.(\d+)", answer.get("compute_cap", "").strip())
    words = re.split(r"[\s-]", answer["name"])
    known = next((CAPABILITIES[word] for word in words if word in CAPABILITIES), (0, 0))
    memory, driver = answer["memory.total"].strip(), answer["driver_version"].strip()
    return Gpu(
        answer["name"].strip(),
        (int(match[1]), int(match[2])) if match else known,
        int(memory) * MIB if memory.isdigit() else 0,
        driver if driver[:1].isdigit() else "",
    )


def visible(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Those of all GPUs that CUDA_VISIBLE_DEVICES leaves to this process; nvidia-smi ignores it."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or "GPU-" in chosen or "MIG-" in chosen:  # by name: which ones is not told here
        return gpus
    indices = [int(word) for word in chosen.split(",") if word.strip().isdigit()]
    return tuple(gpus[index] for index in indices if index < len(gpus))


def require_torch(purpose: str) -> None:
    """Raise StepError where torch does not import here, which `purpose` needs."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        raise StepError(
            f"{purpose} needs torch, which does not import ({one_line(error)})",
            fix_packages(),
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def memory_bytes() -> int | None:
    """Memory of this machine or of the container it is limited to; None where that is unknown."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def free_bytes(folder: Path) -> int:
    """Free space on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def try_imports(names: list[str]) -> dict[str, str]:
    """Import each distribution's module; map its name to "" or to why it does not import."""
    faults = {}
    for name in names:
        try:
            importlib.import_module(IMPORT_NAMES.get(name, name))
            faults[name] = emptied_file(name)
        except Exception as error:
            faults[name] = one_line(error)
    return faults


def emptied_file(name: str) -> str:
    """Name a module of a distribution that holds nothing although it was installed with something, as
    a full disk or a killed installation leaves it; empty where there is none.
    """
    try:
        files = metadata.files(name) or ()
    except metadata.PackageNotFoundError:
        return ""
    for file in files:
        if file.size and file.suffix in MODULE_SUFFIXES:
            place = Path(str(file.locate()))
            if place.is_file() and not place.stat().st_size:
                return f"{place} is empty"
    return ""


def lacks_record(name: str) -> bool:
    """True for an installed distribution that pip cannot uninstall: its list of files is not there."""
    try:
        return metadata.files(name) is None
    except metadata.PackageNotFoundError:
        return False


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, from its metadata alone (no import)."""
    importlib.invalidate_caches()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Probe:
    """Answer of the probing process: torch's facts and, by distribution, why it does not import."""

    torch: TorchFacts
    faults: dict[str, str]


def probe(names: list[str], with_torch: bool) -> Probe:
    """Import `names`, and try torch if `with_torch`, in a process of its own; where that process
    dies, each in its own, so that one broken package is not blamed on all.
    """
    command = [sys.executable, "-m", "setup_steps.machine", *(["--torch"] * with_torch), *names]
    try:
        done = subprocess.run(command, check=False, cwd=PROJECT, capture_output=True, text=True, timeout=PROBE_SECONDS)
        answer = json.loads(done.stdout.splitlines()[-1])
        return Probe(TorchFacts.from_json(answer["torch"]), answer["faults"])
    except subprocess.TimeoutExpired:
        reason = f"no answer within {PROBE_SECONDS} s"
    except (IndexError, ValueError, KeyError, TypeError):
        tail = done.stderr.strip().splitlines()
        reason = tail[-1] if tail else f"the process ended with code {done.returncode}"
    if len(names) > 1:
        parts = [probe([name], with_torch and name == "torch") for name in names]
        facts = next((part.torch for part in parts if part.torch != TorchFacts()), TorchFacts())
        return Probe(facts, {name: fault for part in parts for name, fault in part.faults.items()})
    note = f"torch: {reason}" if with_torch else ""
    return Probe(TorchFacts(note=note), dict.fromkeys(names, reason))


@dataclass(frozen=True)
class Machine:
    """What a decision is made from.

    Args:
        python: (major, minor) of this interpreter.
        system: as "Linux x86_64".
        places: what keeps this interpreter, as "Kaggle"; "plain" where nothing does.
        torch: what is installed, by evidence.
        gpus: every GPU of this process, by torch where it sees them, else by the driver.
    """

    python: tuple[int, int]
    system: str
    places: tuple[str, ...]
    torch: TorchFacts
    gpus: tuple[Gpu, ...] = ()


def look_around(torch: TorchFacts) -> Machine:
    """This machine, given what the probe found out about torch."""
    by_driver = ask_nvidia_smi()
    driver = by_driver[0].driver if by_driver else ""
    return Machine(
        sys.version_info[:2],
        f"{platform.system()} {platform.machine()}",
        places() or ("plain",),
        torch,
        tuple(replace(gpu, driver=driver) for gpu in torch.gpus) or by_driver,
    )


def describe_machine(machine: Machine, folder: Path) -> list[tuple[str, str]]:
    """Rows for a person: what is looked at and what it is."""
    memory, torch = memory_bytes(), machine.torch
    build = f" (CUDA {torch.cuda})" if torch.cuda else f" (ROCm {torch.hip})" if torch.hip else ""
    rows = [
        ("Python", f"{platform.python_version()} ({sys.executable}, {', '.join(machine.places)})"),
        ("System", f"{machine.system}, {os.cpu_count()} cores"),
        ("Memory", format_bytes(memory) if memory else "unknown"),
        ("Disk", f"{format_bytes(free_bytes(folder))} free at {folder}"),
        ("torch", f"{torch.version}{build}" if torch.version else "absent or broken"),
    ]
    if torch.archs:
        rows.append(("Kernels", " ".join(torch.archs)))
    rows += [(f"GPU {index}", describe_gpu(gpu)) for index, gpu in enumerate(machine.gpus)]
    if torch.version:
        rows.append(("Device", f"{torch.device} ({torch.device_name or 'processor'})"))
    if torch.note:
        rows.append(("note", torch.note))
    return rows


def describe_gpu(gpu: Gpu) -> str:
    """One line: 'Tesla T4 (7.5), 15.8 GB, driver 580.1, bf16 emulated, a kernel ran'."""
    parts = [gpu.title, format_bytes(gpu.memory) if gpu.memory else "memory unknown"]
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    if gpu.capability > (0, 0):
        parts.append("bf16 native" if gpu.native_bf16 else "bf16 emulated")
    kernel = "torch does not see it" if gpu.fault is None else f"no kernel runs: {gpu.fault}"
    return ", ".join([*parts, "a kernel ran" if gpu.fault == "" else kernel])


def main(argv: list[str] | None = None) -> int:
    """Print the probe's answer as one line of JSON."""
    names = list(sys.argv[1:] if argv is None else argv)
    with_torch = "--torch" in names
    names = [name for name in names if name != "--torch"]
    facts = torch_facts() if with_torch else TorchFacts()
    print(json.dumps({"torch": asdict(facts), "faults": try_imports(names)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
