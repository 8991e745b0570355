"""What this machine is: Python, memory, disk, and whether torch works here, on which device.

`python -m setup_steps.machine NAME ...` imports the named distributions and prints what it found
as JSON: step 1 runs that in a process of its own, so that a broken torch cannot take it along and
nothing is replaced under an imported module.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from setup_steps.console import PROJECT, StepError, format_bytes, mend_packages

PROBE_SECONDS = 300
# What an import, or an operation on a device without kernels, raises when a package is broken.
BROKEN = (ImportError, OSError, RuntimeError, AssertionError, AttributeError, TypeError, ValueError)
IMPORT_NAMES = {"pillow": "PIL"}  # distributions whose module has another name


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
    """

    version: str = ""
    works: bool = False
    device: str = "cpu"
    device_name: str = ""
    device_memory: int = 0
    note: str = ""


def torch_facts() -> TorchFacts:
    """Import torch here and try it on the CPU and on the accelerator it names."""
    try:
        import torch
    except BROKEN as error:
        return TorchFacts(note=f"torch does not import: {one_line(error)}")

    def product_is_right(device: str) -> bool:
        ones = torch.ones(64, 64, device=device)
        return bool(((ones @ ones) == 64).all().item())

    version, name = str(torch.__version__), platform.processor() or platform.machine()
    try:
        works = product_is_right("cpu")
    except BROKEN as error:
        return TorchFacts(version, note=f"torch does not compute: {one_line(error)}")
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        try:
            if product_is_right("cuda"):
                return TorchFacts(version, works, "cuda", gpu.name, gpu.total_memory)
            reason = "computes wrongly"
        except BROKEN as error:
            reason = one_line(error)
        kernels = " ".join(torch.cuda.get_arch_list())
        note = f"{gpu.name} ({gpu.major}.{gpu.minor}) is not usable: {reason}; kernels: {kernels}"
        return TorchFacts(version, works, "cpu", name, note=note)
    return TorchFacts(version, works, "cpu", name)


def require_torch(purpose: str) -> None:
    """Raise StepError where torch does not import here, which `purpose` needs."""
    try:
        import torch  # noqa: F401
    except BROKEN as error:
        raise StepError(
            f"{purpose} needs torch, which does not import ({one_line(error)})",
            mend_packages(),
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
            faults[name] = ""
        except BROKEN as error:
            faults[name] = one_line(error)
    return faults


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
        return Probe(TorchFacts(**answer["torch"]), answer["faults"])
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


def describe_machine(torch: TorchFacts | None, folder: Path) -> list[tuple[str, str]]:
    """Rows for a person: what is looked at and what it is."""
    memory = memory_bytes()
    rows = [
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("System", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
        ("Memory", format_bytes(memory) if memory else "unknown"),
        ("Disk", f"{format_bytes(free_bytes(folder))} free at {folder}"),
    ]
    if torch is not None:
        device = torch.device_name or "processor"
        if torch.device_memory:
            device += f", {format_bytes(torch.device_memory)}"
        rows.append(("torch", torch.version or "absent"))
        if torch.version:
            rows.append(("Device", f"{torch.device} ({device})"))
    return rows


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
