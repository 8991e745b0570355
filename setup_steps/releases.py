"""Which torch serves this machine: the table of releases and the decision made from it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from LightningDiT.errors import LightningDiTError
from setup_steps.machine import Gpu, Machine, TorchFacts, has_kernels
from setup_steps.project import STEP1

OLDEST_TORCH = (2, 2)  # the oldest release that the library's tests pass on
OLDEST_GPU = (5, 0)  # the lowest compute capability that a release of the table has kernels for
NUMPY2_TORCH = (2, 3)  # the first release that was built for numpy 2
GPU_SYSTEM = "Linux x86_64"  # the system for which the package index's wheels of every row hold GPU kernels
KEEP, INSTALL, REPLACE = "keep", "install", "replace"
#: A kernel's words if the device is at fault and no other torch would help.
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
        kernels: the architectures of its kernels, as torch lists them.
        oldest_python: (major, minor).
        newest_python: (major, minor); None if there is no end.
    """

    torch: str
    torchvision: str
    cuda: str
    driver: int
    kernels: tuple[str, ...]
    oldest_python: tuple[int, int]
    newest_python: tuple[int, int] | None

    def has_wheels(self, python: tuple[int, int]) -> bool:
        """Return whether the index has wheels for this Python."""
        return self.oldest_python <= python and (self.newest_python is None or python <= self.newest_python)

    def has_kernels(self, gpu: Gpu) -> bool:
        """Return whether it serves the GPU, as far as known; an unknown one is left to the kernel that runs later."""
        return gpu.capability == (0, 0) or has_kernels(self.kernels, gpu.capability)

    def takes_driver(self, gpu: Gpu) -> bool:
        """Return whether the GPU's driver is new enough; an unknown one is."""
        return not gpu.driver or driver_major(gpu) >= self.driver

    def served(self, machine: Machine) -> tuple[Gpu, ...]:
        """Return the GPUs of a machine that the index's wheels serve."""
        if machine.system != GPU_SYSTEM:
            return ()
        return tuple(gpu for gpu in machine.gpus if self.has_kernels(gpu) and self.takes_driver(gpu))


def release_lines(torch: str, torchvision: str) -> tuple[Release, ...]:
    """Return the releases to choose from, the newest first.

    Kernels are those of the index's Linux wheels, whose libtorch_python.so has the list; `sm_86` also runs on 8.9 (L4,
    RTX 40xx). Drivers are NVIDIA's minimum for the CUDA major version; Pythons are those with wheels in the index.
    These facts belong to other projects: the product that runs on the device after the installation is the proof.

    Args:
        torch, torchvision: the versions that requirements.txt pins; the facts of the first row go with them.
    """
    since_turing = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
    until_hopper = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
    return (
        # torch, torchvision, CUDA, driver, kernels, Pythons from, to
        Release(torch, torchvision, "13.0", 580, since_turing, (3, 10), None),  # T4, L4 and newer, and no GPU
        Release("2.10.0", "0.25.0", "12.8", 525, ("sm_70", *since_turing), (3, 10), (3, 14)),  # driver < 580; V100
        Release("2.7.1", "0.22.1", "12.6", 525, until_hopper, (3, 9), (3, 13)),  # P100
        Release("2.2.0", "0.17.0", "12.1", 525, until_hopper, (3, 8), (3, 12)),  # --profile official
    )


@dataclass(frozen=True)
class Asked:
    """A profile that names its torch and leaves no choice."""

    profile: str
    torch: str
    torchvision: str


@dataclass(frozen=True)
class Decision:
    """What becomes of torch.

    Args:
        action: KEEP, INSTALL (none is there) or REPLACE.
        torch: the version that stays or comes, without a local part ("+cu126").
        torchvision: the version that belongs to it, or "0.24.*" if any build of it does.
        numpy: "<2" for a torch that was built for numpy 1, else empty.
        reason: why, in one line.
        warning: what is not used and what would fix it; empty if all is well.
    """

    action: str
    torch: str
    torchvision: str
    numpy: str
    reason: str
    warning: str = ""

    def kept_anyway(self, torch: TorchFacts, why: str) -> Decision:
        """Return the decision to keep a torch that computes on the CPU because it could not be replaced."""
        reason = f"torch {torch.version} computes on the CPU and could not be replaced"
        return _keep(torch, reason, f"{self.reason}, but {why}")


def decide(machine: Machine, lines: tuple[Release, ...], asked: Asked | None = None) -> Decision:
    """Choose by evidence: keep any torch that works on this machine; else take the newest release that serves most of
    its GPUs (so the weakest counts), its driver and its Python. Raise LightningDiTError if the profile's torch has no
    wheels for this Python.
    """
    if asked is not None:
        return _as_asked(machine, lines, asked)
    present, best = machine.torch, choose(machine, lines)
    action = REPLACE
    if not usable(present):
        fault = f"torch {present.version} is older than 2.2" if present.works else present.note
        action, fault = (REPLACE, fault) if fault else (INSTALL, "no torch is here")
    else:
        troubles = [why_unused(present, gpu, lines) for gpu in machine.gpus]
        lacking = [text for text, another_torch in troubles if another_torch]
        same = best.torch == public(present.version) and present.cuda
        if not lacking or same or len(best.served(machine)) <= len(_running(machine)):
            return _kept(machine, lines, best)
        fault = f"torch {present.version} {lacking[0]}"
    reason = f"{fault}; {_why_best(machine, best)}"
    numpy = numpy_of(best.torch)
    return Decision(action, best.torch, best.torchvision, numpy, reason, _unserved(machine, lines, best))


def choose(machine: Machine, lines: tuple[Release, ...]) -> Release:
    """Return the newest of the releases that serve most GPUs, among those with wheels for this Python."""
    fitting = (line for line in lines if line.has_wheels(machine.python))
    return max(fitting, key=lambda line: len(line.served(machine)))


def usable(torch: TorchFacts) -> bool:
    """Return whether a torch is new enough and computes here, at least on the CPU."""
    return torch.works and version_pair(torch.version) >= OLDEST_TORCH


def why_unused(torch: TorchFacts, gpu: Gpu, lines: tuple[Release, ...]) -> tuple[str, bool]:
    """Return why a torch does not use a GPU, by the kernel that ran or did not, and whether another torch might use it.

    The reason is empty for a GPU in use.
    """
    needed = max((line.driver for line in lines if line.cuda.split(".")[0] == torch.cuda.split(".")[0]), default=0)
    fault, title = gpu.fault, gpu.title
    if fault == "":
        return "", False
    if torch.hip:
        return f"cannot use {title}: {fault}", False
    if not torch.cuda:
        return f"is built for the CPU alone and cannot use {title}", True
    if fault is None and gpu.driver and driver_major(gpu) < needed:
        return f"(CUDA {torch.cuda}) needs the NVIDIA driver {needed} or newer, {gpu.driver} is here", True
    if fault is None:
        return f"does not see {title}" + f": {torch.note}" * bool(torch.note), False
    if DEVICE_TROUBLE.search(fault):
        return f"cannot use {title} now: {fault}", False
    if torch.archs and not has_kernels(torch.archs, gpu.capability):
        return f"has no kernels for {title}, only {' '.join(torch.archs)}", True
    return f"cannot use {title}: {fault}", True


def what_fixes(machine: Machine, lines: tuple[Release, ...], gpu: Gpu) -> str:
    """Return what would let a GPU be used that the chosen release does not serve."""
    if machine.system != GPU_SYSTEM:
        return f"install a torch with CUDA for {machine.system} by hand, step 1 keeps one that works"
    built = [line for line in lines if line.has_kernels(gpu)]
    if not built and gpu.capability > OLDEST_GPU:
        return f"it is newer than torch {lines[0].torch}: install a newer torch by hand, step 1 keeps one that works"
    if not built:
        return f"no torch from {lines[-1].torch} on has kernels for it, another GPU is needed"
    driven = [line for line in built if line.takes_driver(gpu)]
    if not driven:
        return f"its driver {gpu.driver} is too old, install {min(line.driver for line in built)} or newer"
    fitting = [line for line in driven if line.has_wheels(machine.python)]
    if not fitting:
        python = dotted(driven[0].newest_python or machine.python)
        return f"torch {driven[0].torch} serves it on Python {python}: python{python} -m venv .venv, then step 1 there"
    return f"torch {fitting[0].torch} serves it but fewer of the others: hide those with CUDA_VISIBLE_DEVICES"


def driver_major(gpu: Gpu) -> int:
    """Return 580 for '580.65.06'."""
    return int(gpu.driver.split(".")[0])


def dotted(version: tuple[int, int]) -> str:
    """Return '3.12' for (3, 12)."""
    return ".".join(map(str, version))


def version_pair(version: str) -> tuple[int, int]:
    """Return (2, 14) for '2.14.1+cpu'; (0, 0) for a text without such a beginning."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def public(version: str) -> str:
    """Return '2.14.1' for '2.14.1+cpu': a local build of a release is that release."""
    return version.split("+")[0]


def vision_of(torch: str) -> str:
    """Return '0.24.*' for '2.9.0': torchvision 0.(x + 15) belongs to torch 2.x."""
    return f"0.{version_pair(torch)[1] + 15}.*"


def numpy_of(torch: str) -> str:
    """Return the bound that a release puts on numpy; empty if there is none."""
    return "<2" if version_pair(torch) < NUMPY2_TORCH else ""


def name_gpus(gpus: tuple[Gpu, ...]) -> str:
    """Return '2 x Tesla T4 (7.5)'."""
    counts = Counter(gpu.title for gpu in gpus)
    return ", ".join(f"{count} x {title}" if count > 1 else title for title, count in counts.items())


def _running(machine: Machine) -> tuple[Gpu, ...]:
    return tuple(gpu for gpu in machine.gpus if gpu.fault == "")


def _keep(torch: TorchFacts, reason: str, warning: str) -> Decision:
    version = public(torch.version)
    return Decision(KEEP, version, vision_of(version), numpy_of(version), reason, warning)


def _kept(machine: Machine, lines: tuple[Release, ...], best: Release) -> Decision:
    """Keep the torch that is here; say which GPUs it does not use and why."""
    torch, running = machine.torch, _running(machine)
    where = f"on {name_gpus(running)}" if running else "on the CPU"
    reason = f"torch {torch.version} works here, {where}" + ("" if machine.gpus else " (there is no GPU)")
    texts = []
    for gpu in machine.gpus:
        if gpu not in running:
            fix = "nvidia-smi shows its state; then run step 1 again"
            if gpu not in best.served(machine):
                fix = what_fixes(machine, lines, gpu)
            texts.append(f"torch {torch.version} {why_unused(torch, gpu, lines)[0]} ({fix})")
    warning = "; ".join(dict.fromkeys(texts))
    if warning and machine.gpus[0] not in running:  # the first is the one that the project computes on
        index = machine.gpus.index(running[0]) if running else 0
        instead = f" unless CUDA_VISIBLE_DEVICES={index} names another first" if index else ""
        warning = f"the CPU is used{instead}: {warning}"
    kept = _keep(torch, reason, warning)
    return replace(kept, torchvision=lines[0].torchvision) if kept.torch == lines[0].torch else kept


def _as_asked(machine: Machine, lines: tuple[Release, ...], asked: Asked) -> Decision:
    """Take the profile's torch, whatever is there."""
    release = next((line for line in lines if line.torch == asked.torch), None)
    if release is not None and not release.has_wheels(machine.python):
        python = dotted(release.newest_python or release.oldest_python)
        raise LightningDiTError(
            f"profile {asked.profile}: torch {asked.torch} has no wheels for Python {dotted(machine.python)}, "
            f"{python} is the newest that it has some for",
            f"python{python} -m venv {asked.profile} && {asked.profile}/bin/python {STEP1} --profile {asked.profile}",
        )
    present = machine.torch
    if present.works and public(present.version) == asked.torch:
        kept = _kept(machine, lines, choose(machine, lines))
        return replace(kept, torchvision=asked.torchvision, numpy="")
    action = REPLACE if present.version or present.note else INSTALL
    reason = f"the profile {asked.profile} names torch {asked.torch}"
    return Decision(action, asked.torch, asked.torchvision, "", reason)


def _why_best(machine: Machine, best: Release) -> str:
    """Return why a release is the one to install."""
    served = best.served(machine)
    if not served:
        return f"{best.torch} is the current one and computes on the CPU"
    driver = f" with driver {served[0].driver}" if served[0].driver else ""
    whom = f"{name_gpus(served)}{driver} on Python {dotted(machine.python)}"
    weakest = min(served, key=lambda gpu: gpu.capability)
    decides = f"; the weakest GPU, {weakest.title}, decides" * (len({gpu.capability for gpu in served}) > 1)
    return f"{best.torch} (CUDA {best.cuda}) is the newest that serves {whom}{decides}"


def _unserved(machine: Machine, lines: tuple[Release, ...], best: Release) -> str:
    """Return the GPUs that the chosen release does not serve and what would fix that; empty if it serves all."""
    left = [gpu for gpu in machine.gpus if gpu not in best.served(machine)]
    texts = [f"{gpu.title} is not used ({what_fixes(machine, lines, gpu)})" for gpu in left]
    lead = "the CPU is used: " if left and len(left) == len(machine.gpus) else ""
    return lead + "; ".join(dict.fromkeys(texts))
