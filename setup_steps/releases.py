"""Which torch serves this machine: the table of releases and the decision made from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from setup_steps.console import StepError
from setup_steps.machine import Gpu, Machine, TorchFacts, has_kernels

OLDEST_TORCH = (2, 2)  # the oldest release that the library's tests pass on
NUMPY2_TORCH = (2, 3)  # the first release that was built for numpy 2
GPU_SYSTEM = "Linux x86_64"  # where the package index's wheels of every row hold GPU kernels
KEEP, INSTALL, REPLACE = "keep", "install", "replace"
#: What a kernel says where the device is at fault and no other torch would help.
DEVICE_TROUBLE = re.compile(
    r"out of memory|busy or unavailable|ECC|no CUDA-capable device|not yet initialized|version mismatch|has fallen off",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Release:
    """One release as the package index has it.

    Args:
        torch: version.
        torchvision: the version that is built for it.
        cuda: CUDA version of its kernels.
        driver: oldest major version of the NVIDIA driver on Linux.
        oldest_gpu: lowest compute capability that it has kernels for.
        newest_gpu: highest major capability that it has kernels for; None where there is no end.
        oldest_python: (major, minor).
        newest_python: (major, minor); None where there is no end.
    """

    torch: str
    torchvision: str
    cuda: str
    driver: int
    oldest_gpu: tuple[int, int]
    newest_gpu: int | None
    oldest_python: tuple[int, int]
    newest_python: tuple[int, int] | None

    def has_wheels(self, python: tuple[int, int]) -> bool:
        """Whether the index has wheels for this Python."""
        return self.oldest_python <= python and (self.newest_python is None or python <= self.newest_python)

    def has_kernels(self, gpu: Gpu) -> bool:
        """Whether it is known to serve the GPU; an unknown one is left to the kernel that runs later."""
        newest = self.newest_gpu or gpu.capability[0]
        return gpu.capability == (0, 0) or (self.oldest_gpu <= gpu.capability and gpu.capability[0] <= newest)

    def takes_driver(self, gpu: Gpu) -> bool:
        """Whether the GPU's driver is new enough; an unknown one is."""
        return not gpu.driver or driver_major(gpu) >= self.driver


def release_lines(torch: str, torchvision: str) -> tuple[Release, ...]:
    """The releases to choose from, the newest first.

    Capabilities are those that the published builds are compiled for, read from PyTorch's release
    matrix and build scripts; drivers are NVIDIA's minimum for the CUDA major version; Pythons are
    those that the index has wheels for. All that is knowledge about other people's files: the
    product that runs on the device after the installation is the proof.

    Args:
        torch, torchvision: the versions that requirements.txt pins; their facts go with the pins.
    """
    return (
        # torch, torchvision, CUDA, driver, GPUs from, to (major), Pythons from, to
        Release(torch, torchvision, "13.0", 580, (7, 5), None, (3, 10), None),  # T4 and newer, and no GPU
        Release("2.10.0", "0.25.0", "12.8", 525, (7, 0), 12, (3, 10), (3, 14)),  # V100, or a driver before 580
        Release("2.7.1", "0.22.1", "12.6", 525, (5, 0), 9, (3, 9), (3, 13)),  # P100
        Release("2.2.0", "0.17.0", "12.1", 525, (5, 0), 9, (3, 8), (3, 12)),  # --profile official
    )


@dataclass(frozen=True)
class Asked:
    """A profile that names its torch: nothing is chosen then."""

    profile: str
    torch: str
    torchvision: str


@dataclass(frozen=True)
class Decision:
    """What becomes of torch.

    Args:
        action: KEEP, INSTALL (none is there) or REPLACE.
        torch: the version that stays or comes, without a local part ("+cu126").
        torchvision: the version that belongs to it, or "0.24.*" where any build of it does.
        numpy: "<2" for a torch that was built for numpy 1, else empty.
        reason: why, in one line.
        warning: what is not used and what would fix it; empty where all is well.
    """

    action: str
    torch: str
    torchvision: str
    numpy: str
    reason: str
    warning: str = ""

    def kept_anyway(self, torch: TorchFacts, why: str) -> Decision:
        """Stay with a torch that computes on the processor, after all: it could not be replaced."""
        version = public(torch.version)
        return replace(
            self,
            action=KEEP,
            torch=version,
            torchvision=vision_of(version),
            numpy=numpy_of(version),
            reason=f"torch {torch.version} computes on the processor and could not be replaced",
            warning=f"{self.reason}, but {why}",
        )


def decide(machine: Machine, lines: tuple[Release, ...], asked: Asked | None = None) -> Decision:
    """Choose by evidence: a torch that works on this machine is kept, wherever it came from; else the
    newest release that serves most of its GPUs (so the weakest counts), its driver and its Python.

    Raises:
        StepError: the profile's torch has no wheels for this Python.
    """
    present = machine.torch
    if asked is not None:
        return _as_asked(machine, lines, asked)
    best = choose(machine, lines)
    if not usable(present):
        fault = f"torch {present.version} is older than 2.2" if present.works else present.note
        action = REPLACE if fault else INSTALL
        return _new(action, best, fault or "no torch is here", machine, lines)
    troubles = [why_unused(present, gpu, lines) for gpu in machine.gpus]
    lacking = [trouble for trouble in troubles if trouble.another_torch]
    running = [gpu for gpu in machine.gpus if gpu.fault == ""]
    same = best.torch == public(present.version) and present.cuda
    if not lacking or same or len(served_by(best, machine)) <= len(running):
        return _kept(machine, lines, best)
    return _new(REPLACE, best, f"torch {present.version} {lacking[0].text}", machine, lines)


def choose(machine: Machine, lines: tuple[Release, ...]) -> Release:
    """The newest of the releases that serve most GPUs, among those with wheels for this Python."""
    return max(
        (line for line in lines if line.has_wheels(machine.python)),
        key=lambda line: len(served_by(line, machine)),
    )


def served_by(release: Release, machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs of a machine that the index's wheels of a release serve."""
    if machine.system != GPU_SYSTEM:
        return ()
    return tuple(gpu for gpu in machine.gpus if release.has_kernels(gpu) and release.takes_driver(gpu))


def usable(torch: TorchFacts) -> bool:
    """Whether a torch computes here, be it on the processor alone, and is new enough."""
    return torch.works and version_pair(torch.version) >= OLDEST_TORCH


@dataclass(frozen=True)
class Trouble:
    """Why a GPU is not used by the torch that is there, and whether another torch might use it."""

    text: str = ""
    another_torch: bool = False


def why_unused(torch: TorchFacts, gpu: Gpu, lines: tuple[Release, ...]) -> Trouble:
    """Judge one GPU by the kernel that ran or did not; the first row that holds is the reason."""
    same_cuda = [line.driver for line in lines if line.cuda.split(".")[0] == torch.cuda.split(".")[0]]
    needed = max(same_cuda, default=0)
    unseen = gpu.fault is None
    rows = (
        (gpu.fault == "", Trouble()),
        (bool(torch.hip), Trouble(f"cannot use {gpu.title}: {gpu.fault}")),
        (not torch.cuda, Trouble(f"is built for the processor alone and cannot use {gpu.title}", True)),
        (
            unseen and bool(gpu.driver) and driver_major(gpu) < needed,
            Trouble(f"(CUDA {torch.cuda}) needs the NVIDIA driver {needed} or newer, {gpu.driver} is here", True),
        ),
        (unseen, Trouble(f"does not see {gpu.title}" + f": {torch.note}" * bool(torch.note))),
        (bool(DEVICE_TROUBLE.search(gpu.fault or "")), Trouble(f"cannot use {gpu.title} now: {gpu.fault}")),
        (
            bool(torch.archs) and not has_kernels(torch.archs, gpu.capability),
            Trouble(f"has no kernels for {gpu.title}, only {' '.join(torch.archs)}", True),
        ),
    )
    return next((trouble for holds, trouble in rows if holds), Trouble(f"cannot use {gpu.title}: {gpu.fault}", True))


def what_fixes(machine: Machine, lines: tuple[Release, ...], gpu: Gpu) -> str:
    """What would let a GPU be used that the chosen release does not serve."""
    if machine.system != GPU_SYSTEM:
        return f"install a torch with CUDA for {machine.system} by hand, step 1 keeps one that works"
    built = [line for line in lines if line.has_kernels(gpu)]
    if not built:
        return f"no torch from {lines[-1].torch} on has kernels for it, another GPU is needed"
    driven = [line for line in built if line.takes_driver(gpu)]
    if not driven:
        return f"its driver {gpu.driver} is too old, install {min(line.driver for line in built)} or newer"
    fitting = [line for line in driven if line.has_wheels(machine.python)]
    if not fitting:
        newest = driven[0].newest_python or machine.python
        python = ".".join(map(str, newest))
        return f"torch {driven[0].torch} serves it on Python {python}: python{python} -m venv .venv, then step 1 there"
    return f"torch {fitting[0].torch} serves it but fewer of the others: hide those with CUDA_VISIBLE_DEVICES"


def driver_major(gpu: Gpu) -> int:
    """580 of '580.65.06'."""
    return int(gpu.driver.split(".")[0])


def version_pair(version: str) -> tuple[int, int]:
    """'2.14.1+cpu' -> (2, 14); (0, 0) where there is no such beginning."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def public(version: str) -> str:
    """'2.14.1+cpu' -> '2.14.1': a local build of a release is that release."""
    return version.split("+")[0]


def vision_of(torch: str) -> str:
    """'2.9.0' -> '0.24.*': torchvision 0.(x + 15) belongs to torch 2.x."""
    return f"0.{version_pair(torch)[1] + 15}.*"


def numpy_of(torch: str) -> str:
    """The bound that a release puts on numpy; empty where there is none."""
    return "<2" if version_pair(torch) < NUMPY2_TORCH else ""


def name_gpus(gpus: tuple[Gpu, ...]) -> str:
    """'2 x Tesla T4 (7.5)'."""
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.title] = counts.get(gpu.title, 0) + 1
    return ", ".join(f"{count} x {title}" if count > 1 else title for title, count in counts.items())


def _new(action: str, release: Release, fault: str, machine: Machine, lines: tuple[Release, ...]) -> Decision:
    """Install a release, because of `fault`; what it leaves aside is the warning."""
    reason = f"{fault}; {_why_best(machine, release)}"
    warning = _unserved(machine, lines, release)
    return Decision(action, release.torch, release.torchvision, numpy_of(release.torch), reason, warning)


def _kept(machine: Machine, lines: tuple[Release, ...], best: Release) -> Decision:
    """Keep what is there; say which GPUs it does not use and why."""
    torch = machine.torch
    version = public(torch.version)
    pinned = lines[0]
    vision = pinned.torchvision if version == pinned.torch else vision_of(version)
    running = tuple(gpu for gpu in machine.gpus if gpu.fault == "")
    place = f"on {name_gpus(running)}" if running else "on the processor"
    reason = f"torch {torch.version} works here, {place}" + ("" if machine.gpus else " (there is no GPU)")
    texts = []
    for gpu in machine.gpus:
        if gpu.fault == "":
            continue
        trouble = why_unused(torch, gpu, lines)
        fix = "nvidia-smi shows its state; then run step 1 again"
        if gpu not in served_by(best, machine):
            fix = what_fixes(machine, lines, gpu)
        texts.append(f"torch {torch.version} {trouble.text} ({fix})")
    warning = "; ".join(dict.fromkeys(texts))
    if warning and machine.gpus[0].fault != "":  # the first is the one that the project computes on
        place = machine.gpus.index(running[0]) if running else 0
        instead = f" unless CUDA_VISIBLE_DEVICES={place} names another first" if place else ""
        warning = f"the processor is used{instead}: {warning}"
    return Decision(KEEP, version, vision, numpy_of(version), reason, warning)


def _as_asked(machine: Machine, lines: tuple[Release, ...], asked: Asked) -> Decision:
    """The profile's torch, whatever is there."""
    release = next((line for line in lines if line.torch == asked.torch), None)
    if release is not None and not release.has_wheels(machine.python):
        python = ".".join(map(str, release.newest_python or release.oldest_python))
        raise StepError(
            f"profile {asked.profile}: torch {asked.torch} has no wheels for Python "
            f"{'.'.join(map(str, machine.python))}, {python} is the newest that it has some for",
            f"python{python} -m venv {asked.profile} && "
            f"{asked.profile}/bin/python step1_install_environment.py --profile {asked.profile}",
        )
    present = machine.torch
    if present.works and public(present.version) == asked.torch:
        kept = _kept(machine, lines, choose(machine, lines))
        return replace(kept, torchvision=asked.torchvision, numpy="")
    action = REPLACE if present.version or present.note else INSTALL
    reason = f"the profile {asked.profile} names torch {asked.torch}"
    return Decision(action, asked.torch, asked.torchvision, "", reason)


def _why_best(machine: Machine, best: Release) -> str:
    """Why a release is the one to install."""
    served = served_by(best, machine)
    if not served:
        return f"{best.torch} is the current one and computes on the processor"
    python = "Python " + ".".join(map(str, machine.python))
    driver = f" with driver {served[0].driver}" if served[0].driver else ""
    reason = f"{best.torch} (CUDA {best.cuda}) is the newest that serves {name_gpus(served)}{driver} on {python}"
    weakest = min(served, key=lambda gpu: gpu.capability)
    return reason + f"; the weakest GPU, {weakest.title}, decides" * (len({gpu.capability for gpu in served}) > 1)


def _unserved(machine: Machine, lines: tuple[Release, ...], best: Release) -> str:
    """The GPUs that the chosen release leaves aside and what would fix that; empty where it serves all."""
    left = [gpu for gpu in machine.gpus if gpu not in served_by(best, machine)]
    texts = [f"{gpu.title} is not used ({what_fixes(machine, lines, gpu)})" for gpu in left]
    lead = "the processor is used: " if left and len(left) == len(machine.gpus) else ""
    return lead + "; ".join(dict.fromkeys(texts))
