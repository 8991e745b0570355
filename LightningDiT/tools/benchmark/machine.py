"""The machine on which figures are measured, its free memory, and the peak of this process."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from LightningDiT.device import gpu_name, processor_name

PROJECT = Path(__file__).resolve().parents[3]
STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the facts of this machine that stand beside figures."""
    return {
        "device": gpu_name(device) or processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": str(dtype).removeprefix("torch."),
    }


def machine_line(facts: dict[str, Any]) -> str:
    """Return the facts in one line."""
    processor = "" if facts["device"] == facts["processor"] else f" in a machine with {facts['processor']}"
    return (
        f"{facts['device']}{processor}, {facts['cores']} cores, {facts['threads']} threads,"
        f" Python {facts['python']}, torch {facts['torch']}, {facts['precision']}"
    )


def _stated_bytes(file: Path, name: str) -> int | None:
    found = (
        re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="utf-8"), re.MULTILINE) if file.exists() else None
    )
    return int(found[1]) * 1024 if found else None


def peak_resident_bytes() -> int | None:
    """Return the largest resident size of this process so far; None if the system is not Linux."""
    return _stated_bytes(STATUS, "VmHWM")


def free_memory_bytes() -> int | None:
    """Return the main memory that is available; None if the system is not Linux."""
    return _stated_bytes(MEMINFO, "MemAvailable")


def lack_of(needed: dict[str, tuple[int, int | None]]) -> str | None:
    """Return in words the first resource that does not suffice, or None.

    Args:
        needed: bytes needed and bytes free by name; unknown free bytes (None) count as enough.
    """
    for name, (need, there) in needed.items():
        if there is not None and there < need:
            return f"{need / 1e9:.1f} GB of {name} are needed, {there / 1e9:.1f} GB are free"
    return None
