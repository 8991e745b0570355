"""Timing in rounds in which all cases take turns, beside a large matrix product and a triad."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from LightningDiT.console import Progress
from LightningDiT.device import synchronise

TRIAD = "triad"
PRODUCT_SIDES = {"cpu": 2048}  # side of the square matrices by kind of device
LARGE_SIDE = 8192
TRIAD_VALUES = 1 << 25  # 128 MiB an array, beyond the caches of a processor


@dataclass(frozen=True)
class Setting:
    """Device, precision and size of one run of the benchmark.

    Attributes:
        dtype: of the transformer.
        quick: fewer rounds and smaller cases.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """Something to be timed.

    Attributes:
        name: in the table.
        run: does it once.
        flops: floating-point operations of its matrix products and convolutions.
        moved: bytes that it reads and writes.
        units: images or evaluations of one run.
    """

    name: str
    run: Callable[[], object]
    flops: float = 0.0
    moved: float = 0.0
    units: int = 1


@dataclass(frozen=True)
class Result:
    """Medians of one case.

    Attributes:
        name, flops, moved, units: the case's.
        seconds: of one run.
        product_share: its rate over that of the matrix product in the same rounds.
        memory_share: its rate over that of the triad in the same rounds.
    """

    name: str
    seconds: float
    flops: float
    moved: float
    units: int
    product_share: float
    memory_share: float

    @property
    def gflops(self) -> float:
        """Billions of operations a second."""
        return self.flops / self.seconds / 1e9

    @property
    def gbytes(self) -> float:
        """Billions of bytes a second."""
        return self.moved / self.seconds / 1e9


def product_case(device: torch.device, dtype: torch.dtype) -> Case:
    """Return the product of two large square matrices by torch, the reference of all products."""
    side, generator = PRODUCT_SIDES.get(device.type, LARGE_SIDE), torch.Generator(device).manual_seed(1)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    name = f"matrix product of {side} x {side} in {str(dtype).removeprefix('torch.')}"
    return Case(name, lambda: torch.mm(left, right, out=out), flops=2.0 * side**3)


def triad_case(device: torch.device, values: int = TRIAD_VALUES, name: str = TRIAD) -> Case:
    """Return a = b + 2 c of float32 arrays of `values`; two are read and one is written, 12 bytes a value."""
    b, c = (torch.ones(values, device=device) for _ in range(2))
    a = torch.empty_like(b)
    return Case(name, lambda: torch.add(b, c, alpha=2.0, out=a), moved=12.0 * values)


def seconds_of(run: Callable[[], object], device: torch.device, trains: bool = False) -> float:
    """Return the wall clock of one run until the device has finished, without gradients unless it `trains`."""
    synchronise(device)
    started = time.perf_counter()
    with torch.inference_mode(not trains):
        run()
    synchronise(device)
    return time.perf_counter() - started


def measure(
    cases: Sequence[Case], rounds: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Result]:
    """Time the product, the triad and all cases in turn, `rounds` times after one to warm up, and return medians.

    A share is the median over rounds of the case's rate divided by that round's product or triad.
    """
    listed = [product_case(device, dtype), triad_case(device), *cases]
    progress = Progress((rounds + 1) * len(listed), "run")
    times: list[list[float]] = [[] for _ in listed]  # by case
    for _ in range(rounds + 1):
        for case, taken in zip(listed, times, strict=True):
            taken.append(seconds_of(case.run, device))
            progress.update()
    progress.close()
    (product, triad), (product_times, triad_times) = listed[:2], times[:2]

    def result(case: Case, taken: list[float]) -> Result:
        products = [case.flops / product.flops * other / own for own, other in zip(taken, product_times, strict=True)]
        triads = [case.moved / triad.moved * other / own for own, other in zip(taken, triad_times, strict=True)]
        seconds, *shares = (statistics.median(values[1:]) for values in (taken, products, triads))
        return Result(case.name, seconds, case.flops, case.moved, case.units, *shares)

    return [result(case, taken) for case, taken in zip(listed, times, strict=True)]
