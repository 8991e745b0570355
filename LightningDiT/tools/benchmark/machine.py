"""The machine on which figures are measured, its free memory, and the peak of this process."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from LightningDiT.device import gpu_name, processor_name

PROJECT = Path(__file__).resolve().parents[3]
STATUS = Path("/proc/self/status")
MEMINFO = Path("/proc/meminfo")
SMI_SECONDS = 10  # nvidia-smi gets to answer


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the facts of this machine that stand beside figures."""
    return {
        "device": gpu_name(device) or processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **({"driver": driver} if (driver := smi("driver_version")) and gpu_name(device) else {}),
        "precision": str(dtype).removeprefix("torch."),
    }


def machine_line(facts: dict[str, Any]) -> str:
    """Return the facts in one line."""
    processor = "" if facts["device"] == facts["processor"] else f" in a machine with {facts['processor']}"
    driver = f", driver {facts['driver']}" if "driver" in facts else ""
    return (
        f"{facts['device']}{processor}, {facts['cores']} cores, {facts['threads']} threads,"
        f" Python {facts['python']}, torch {facts['torch']}{driver}, {facts['precision']}"
    )


def smi(field: str) -> str | None:
    """Return what nvidia-smi says of the machine's one GPU; None without it, or if there are several."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")[:-1]
    return lines[0].strip() if done.returncode == 0 and len(lines) == 1 else None


@contextlib.contextmanager
def power_readings() -> Iterator[list[float]]:
    """Fill the list within the block with the power of the GPU in watts, as often as nvidia-smi answers."""
    readings: list[float] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                readings.append(float(smi("power.draw") or ""))
            except ValueError:  # nothing, or [N/A]
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield readings
    finally:
        stop.set()
        reader.join()


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
