"""Measurements of a GPU that stand by themselves: each with its first call, its peak of memory and its energy.

A row that fails, for lack of memory for instance, says so, and the others go on.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from LightningDiT.compiling import CODE_FOLDER
from LightningDiT.device import (
    gpu_peak_bytes,
    release_memory,
    synchronise,
)
from LightningDiT.errors import first_line

from .machine import power_readings, smi
from .rounds import Setting, product_case, seconds_of

SAMPLES, SHORTEST = 5, 0.03  # a median is over 5 samples of at least 0.03 seconds each
WATCHED_SECONDS = 2.0  # of a case while its power is read

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: of the measurement.
        units: images, or states of a forward, of one run.
        seconds: of one run, a median; None: it failed, and `note` says why.
        first: seconds until the end of the first run, from before anything was compiled or recorded.
        peak: most bytes of tensors on the GPU; None on the CPU.
        share: rate of its products over that of the large product measured beside it; 0 if it has no such count.
        joules: of one unit, by the GPU's own reading of its power; None: unknown.
        note: what else there is to say.
    """

    name: str
    units: int
    seconds: float | None = None
    first: float | None = None
    peak: int | None = None
    share: float = 0.0
    joules: float | None = None
    note: str = ""


def measured(
    name: str,
    units: int,
    build: Callable[[], Run],
    setting: Setting,
    flops: float = 0.0,
    trains: bool = False,
    once: bool = False,
) -> Row:
    """Return the row of a computation. `build` returns a function that runs it once; both are timed as the first run.

    Args:
        flops: operations of the products of one run.
        trains: whether it needs gradients.
        once: whether it is so long that it is not repeated; `build` has compiled its code, and its energy is unknown.
    """
    print(f"  {name}, {units} ...", end=" ", flush=True)
    clear_memory(setting.device)
    try:
        with torch.inference_mode(not trains):
            synchronise(setting.device)
            started = time.perf_counter()
            run = build()
            ran = seconds_of(run, setting.device, trains)
            first = time.perf_counter() - started
            seconds = ran if once else _median(run, setting.device, trains)
            row = Row(name, units, seconds, first, gpu_peak_bytes(setting.device))
            if not once:
                row = replace(row, joules=_joules(run, units, setting.device, trains))
    except Exception as error:  # a benchmark of hours goes on with its other rows
        row = Row(name, units, note=f"failed: {first_line(error)[:100]}")
    if flops and row.seconds:
        row = replace(row, share=flops / row.seconds / product_rate(setting))
    print(row.note or f"{1e3 * (row.seconds or 0):,.2f} ms", flush=True)
    return row


def clear_memory(device: torch.device) -> None:
    """Free what the last row used, compiled code too, and count the peak of memory from here."""
    torch.compiler.reset()
    gc.collect()
    release_memory()
    gpu_peak_bytes(device, restart=True)


def _median(run: Run, device: torch.device, trains: bool) -> float:
    once = seconds_of(run, device, trains)
    times = max(1, math.ceil(SHORTEST / max(once, 1e-6)))

    def several() -> None:
        for _ in range(times):
            run()

    return statistics.median(seconds_of(several, device, trains) / times for _ in range(SAMPLES))


def _joules(run: Run, units: int, device: torch.device, trains: bool) -> float | None:
    """Return the energy of a unit: the mean power while it runs, times its seconds; None if nothing tells the power."""
    if smi("power.draw") is None:
        return None
    with power_readings() as readings:
        count, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < WATCHED_SECONDS:
            seconds_of(run, device, trains)
            count += 1
    late = readings[len(readings) // 2 :]  # a reading is a mean over the last second
    return statistics.mean(late) * seconds / count / units if late else None


def product_rate(setting: Setting) -> float:
    """Return the operations a second of a large product, now."""
    product = product_case(setting.device, setting.dtype)
    seconds_of(product.run, setting.device)
    return product.flops / statistics.median(seconds_of(product.run, setting.device) for _ in range(SAMPLES))


@contextlib.contextmanager
def cold_code() -> Iterator[Path]:
    """Let torch keep compiled code in an empty folder within the block, so that first runs compile."""
    before = os.environ.get(CODE_FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CODE_FOLDER] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(CODE_FOLDER)
            if before is not None:
                os.environ[CODE_FOLDER] = before
