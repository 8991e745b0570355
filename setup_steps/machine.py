"""This machine: Python, memory, disk, GPUs, and whether torch works here, on which device.

`python -m setup_steps.machine NAME ...` imports the named distributions and prints its findings as JSON. Step 1 runs
it as a separate process: a broken torch cannot end step 1, and no imported module is replaced.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from LightningDiT.console import format_bytes
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import free_bytes, memory_bytes
from setup_steps.project import PROJECT, environments, fix_packages

PROBE_SECONDS = 300
MODULE_SUFFIXES = (".py", ".so", ".pyd")
UNKNOWN = "unknown"  # the version of a distribution with damaged metadata
#: Distributions whose module has another name.
IMPORT_NAMES = {"pillow": "PIL", "torch-fidelity": "torch_fidelity", "pytest-xdist": "xdist"}
NATIVE_BF16 = (8, 0)  # torch's own is_bf16_supported() is also true for emulated bf16
SMI_SECONDS = 60
SMI_FIELDS = ("name", "compute_cap", "memory.total", "driver_version")
#: Compute capability by a word of the name, for drivers that do not report it.
CAPABILITIES = {"K80": (3, 7), "M40": (5, 2), "M60": (5, 2), "P100": (6, 0), "P4": (6, 1), "P40": (6, 1)}
CAPABILITIES.update({"V100": (7, 0), "T4": (7, 5), "A100": (8, 0)})


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Args:
        capability: compute capability; (0, 0) if unknown.
        memory: bytes; 0 if unknown.
        driver: version of the NVIDIA driver; empty if unknown.
        fault: why no kernel ran on it; empty if one ran correctly, None if torch does not see the device.
    """

    name: str
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    driver: str = ""
    fault: str | None = None

    @property
    def native_bf16(self) -> bool:
        """Whether bfloat16 is native and not emulated."""
        return self.capability >= NATIVE_BF16

    @property
    def title(self) -> str:
        """Name and capability: `Tesla T4 (7.5)`."""
        return f"{self.name} ({'.'.join(map(str, self.capability))})" if self.capability > (0, 0) else self.name


@dataclass(frozen=True)
class TorchFacts:
    """torch by evidence: one product is really computed on each device.

    Args:
        version: torch's version; empty if it does not import.
        works: the product on the CPU is right.
        device: "cuda" if the product is right there too, else "cpu".
        device_name: name of the GPU, or of the CPU.
        device_memory: bytes of the GPU's memory; 0 on the CPU.
        note: why torch or the GPU is not usable; empty if both are.
        cuda: CUDA version of this build; empty for one without.
        hip: ROCm version of this build (AMD devices); empty for one without.
        archs: kernels of this build, as torch lists them ("sm_75", "compute_120").
        gpus: every GPU that torch sees, with the outcome of its product.
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
        """Return the facts from what `asdict` and JSON made of them."""
        gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in facts["gpus"])
        return cls(**{**facts, "archs": tuple(facts["archs"]), "gpus": gpus})


def torch_facts() -> TorchFacts:
    """Import torch here and try it on the CPU and on every GPU that it sees."""
    try:
        import torch
    except Exception as error:  # a truncated package raises anything
        return TorchFacts(note=f"torch does not import: {first_line(error)}")

    cuda, hip = (str(getattr(getattr(torch, "version", None), name, None) or "") for name in ("cuda", "hip"))
    cpu = platform.processor() or platform.machine()
    facts = TorchFacts(str(torch.__version__), device_name=cpu, cuda=cuda, hip=hip)
    fault = product_fault(torch, "cpu")
    if fault:
        return replace(facts, note=f"torch does not compute: {fault}")
    return gpu_facts(torch, replace(facts, works=True))


def gpu_facts(torch: ModuleType, facts: TorchFacts) -> TorchFacts:
    """Return `facts` completed by what torch sees and computes on GPUs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception as error:
            return replace(facts, note=f"the GPU is not usable: {first_line(error)}")
    if not count:  # torch only warns about a driver that is too old
        return replace(facts, note=first_line(said[0].message) if said else "")
    archs = tuple(torch.cuda.get_arch_list())
    gpus = tuple(try_gpu(torch, index) for index in range(count))
    first = gpus[0]
    if first.fault:
        note = f"{first.title} is not usable: {first.fault}; kernels: {' '.join(archs)}"
        return replace(facts, archs=archs, gpus=gpus, note=note)
    return replace(facts, archs=archs, gpus=gpus, device="cuda", device_name=first.name, device_memory=first.memory)


def try_gpu(torch: ModuleType, index: int) -> Gpu:
    """Return a GPU that torch sees, with the outcome of a product on it."""
    try:
        found = torch.cuda.get_device_properties(index)
    except Exception as error:
        return Gpu(f"GPU {index}", fault=first_line(error))
    fault = product_fault(torch, f"cuda:{index}")
    return Gpu(found.name, (found.major, found.minor), found.total_memory, fault=fault)


def product_fault(torch: ModuleType, device: str) -> str:
    """Return why two matrices of ones (64, 64) do not give 64 in every entry on the device; empty if they do."""
    try:
        ones = torch.ones(64, 64, device=device)
        return "" if bool(((ones @ ones) == 64).all().item()) else "computes wrongly"
    except Exception as error:  # torch raises classes of its own for a device without kernels
        return first_line(error)


def has_kernels(archs: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Return whether a build with these kernels runs on a device of this capability.

    Machine code ("sm_XY") runs on the same major number from its minor number on, PTX ("compute_XY") on all newer
    devices. A letter behind the number limits both to that one kind (a) or to its family (f).
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
    """Return the GPUs that the NVIDIA driver reports and this process may use; none without a driver."""
    # drivers before 510 refuse the whole query because of compute_cap
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
    """Return the GPU of one line of nvidia-smi, which puts what it does not know in brackets."""
    match = re.fullmatch(r"(\d+)\.(\d+)", answer.get("compute_cap", "").strip())
    words = re.split(r"[\s-]", answer["name"])
    known = next((CAPABILITIES[word] for word in words if word in CAPABILITIES), (0, 0))
    memory, driver = answer["memory.total"].strip(), answer["driver_version"].strip()
    return Gpu(
        answer["name"].strip(),
        (int(match[1]), int(match[2])) if match else known,
        int(memory) * 2**20 if memory.isdigit() else 0,
        driver if driver[:1].isdigit() else "",
    )


def visible(gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES, which nvidia-smi ignores, leaves to this process."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or "GPU-" in chosen or "MIG-" in chosen:  # names, which nothing here relates to an index
        return gpus
    indices = [int(word) for word in chosen.split(",") if word.strip().isdigit()]
    return tuple(gpus[index] for index in indices if index < len(gpus))


def require_torch(purpose: str) -> None:
    """Raise LightningDiTError if torch, which `purpose` needs, does not import here."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        message = f"{purpose} needs torch, which does not import ({first_line(error)})"
        raise LightningDiTError(message, fix_packages()) from error


def try_imports(names: list[str]) -> dict[str, str]:
    """Import each distribution's module; return by name why it does not import, or ""."""
    faults = {}
    for name in names:
        try:
            importlib.import_module(IMPORT_NAMES.get(name, name))
            faults[name] = emptied_file(name)
        except Exception as error:
            faults[name] = first_line(error)
    return faults


def emptied_file(name: str) -> str:
    """Return that a module of a distribution lost its content, as by a full disk or a killed installation, or ""."""
    for file in _files_of(name) or ():
        if file.size and file.suffix in MODULE_SUFFIXES:
            path = Path(str(file.locate()))
            if path.is_file() and not path.stat().st_size:
                return f"{path} is empty"
    return ""


def lacks_record(name: str) -> bool:
    """Return whether pip cannot uninstall an installed distribution, because its list of files is missing."""
    return _files_of(name) is None


def _files_of(name: str) -> list[metadata.PackagePath] | None:
    """Return the files of a distribution, none if it is absent; None if their list is missing."""
    try:
        return metadata.files(name)
    except metadata.PackageNotFoundError:
        return []
    except UnicodeError:
        return None


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution by its metadata, without an import; None if it is absent, UNKNOWN
    if they are damaged.
    """
    importlib.invalidate_caches()
    try:
        return metadata.version(name) or UNKNOWN
    except metadata.PackageNotFoundError:
        return None
    except (UnicodeError, KeyError):
        return UNKNOWN


@dataclass(frozen=True)
class Probe:
    """Findings of the probing process: torch's facts and, by distribution, why it does not import."""

    torch: TorchFacts
    faults: dict[str, str]


def probe(names: list[str]) -> Probe:
    """Import `names`, and try torch if it is among them, in a separate process. If it dies, probe each alone: one
    broken package is not blamed on all.
    """
    command = [sys.executable, "-m", "setup_steps.machine", *names]
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
        parts = [probe([name]) for name in names]
        facts = next((part.torch for part in parts if part.torch != TorchFacts()), TorchFacts())
        return Probe(facts, {name: fault for part in parts for name, fault in part.faults.items()})
    note = f"torch: {reason}" if "torch" in names else ""
    return Probe(TorchFacts(note=note), dict.fromkeys(names, reason))


@dataclass(frozen=True)
class Machine:
    """The basis of the decision about torch.

    Args:
        python: (major, minor) of this interpreter.
        system: as "Linux x86_64".
        environments: what keeps this interpreter's packages apart, as "Kaggle"; "plain" if nothing does.
        torch: the installed torch, by evidence.
        gpus: every GPU of this process: those that torch sees, or else those of the driver.
    """

    python: tuple[int, int]
    system: str
    environments: tuple[str, ...]
    torch: TorchFacts
    gpus: tuple[Gpu, ...] = ()


def look_around(torch: TorchFacts) -> Machine:
    """Return this machine, given the probe's findings about torch."""
    by_driver = ask_nvidia_smi()
    driver = by_driver[0].driver if by_driver else ""
    return Machine(
        sys.version_info[:2],
        f"{platform.system()} {platform.machine()}",
        environments() or ("plain",),
        torch,
        tuple(replace(gpu, driver=driver) for gpu in torch.gpus) or by_driver,
    )


def describe_machine(machine: Machine, folder: Path) -> list[tuple[str, str]]:
    """Return rows for a person: what was examined and the finding."""
    memory, torch = memory_bytes(), machine.torch
    build = f" (CUDA {torch.cuda})" if torch.cuda else f" (ROCm {torch.hip})" if torch.hip else ""
    rows = [
        ("Python", f"{platform.python_version()} ({sys.executable}, {', '.join(machine.environments)})"),
        ("System", f"{machine.system}, {os.cpu_count()} cores"),
        ("Memory", format_bytes(memory) if memory else "unknown"),
        ("Disk", f"{format_bytes(free_bytes(folder))} free at {folder}"),
        ("torch", f"{torch.version}{build}" if torch.version else "absent or broken"),
    ]
    rows.append(("Kernels", " ".join(torch.archs)))
    rows += [(f"GPU {index}", describe_gpu(gpu)) for index, gpu in enumerate(machine.gpus)]
    rows.append(("Device", f"{torch.device} ({torch.device_name or 'CPU'})" if torch.version else ""))
    return [(name, value) for name, value in [*rows, ("Note", torch.note)] if value]


def describe_gpu(gpu: Gpu) -> str:
    """Return one line: `Tesla T4 (7.5), 15.8 GB, driver 580.1, bf16 emulated, a kernel ran`."""
    parts = [gpu.title, format_bytes(gpu.memory) if gpu.memory else "memory unknown"]
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    if gpu.capability > (0, 0):
        parts.append("bf16 native" if gpu.native_bf16 else "bf16 emulated")
    kernel = "torch does not see it" if gpu.fault is None else f"no kernel runs: {gpu.fault}"
    return ", ".join([*parts, "a kernel ran" if gpu.fault == "" else kernel])


def main() -> int:
    """Print the probe's findings as one line of JSON."""
    names = sys.argv[1:]
    facts = torch_facts() if "torch" in names else TorchFacts()
    print(json.dumps({"torch": asdict(facts), "faults": try_imports(names)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
