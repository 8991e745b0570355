"""Calibrated solvers: few-step solvers fitted to one model and its guidance, kept in a small YAML file.

Each is x_n+1 = x_n + sum_j<=n c_nj v_j on times of its own (idea: Wang et al., "Differentiable Solver Search for Fast
Diffusion Sampling", arXiv 2505.21114). `python -m LightningDiT.tools.calibrate_solver` writes the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.checkpoint import inspect, load_weights
from LightningDiT.config import SampleConfig, describe_guidance, read_yaml, typed
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import write_text
from LightningDiT.loading import guidance_of
from LightningDiT.transport import GuidanceSettings

ADAPTER = "adapter"  # key in the metadata of weights: `adapter_digest` of the adapter that they hold
DIGITS = 9  # of the numbers in the file: a float32 exactly
CALIBRATE = "python -m LightningDiT.tools.calibrate_solver --config FILE"


class OtherWeightsError(LightningDiTError):
    """A solver file belongs to other weights."""


@dataclass(frozen=True)
class CalibratedSolver:
    """One solver of n evaluations.

    Raises:
        ValueError: times and coefficients do not fit together.
    """

    guidance: GuidanceSettings  # that it was fitted with
    path_type: str
    times: tuple[float, ...]  # n + 1 rising times
    coefficients: tuple[tuple[float, ...], ...]  # row n holds c_n0 ... c_nn
    error: float  # mean relative error of the final latents, on noises that the fit never saw
    noises: int  # that the fit saw
    guide: str | None = None  # `weights_fingerprint` of the guide; None: classifier-free guidance

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip(self.times, self.times[1:], strict=False)):
            raise ValueError("the times of a solver do not rise")
        if [len(row) for row in self.coefficients] != list(range(1, len(self.times))):
            raise ValueError(f"{len(self.times)} times do not go with rows of {[len(r) for r in self.coefficients]}")

    @property
    def evaluations(self) -> int:
        """Evaluations of the velocity that it takes."""
        return len(self.coefficients)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return times (K,) and lower-triangular coefficients (K - 1, K - 1) in float32."""
        matrix = torch.zeros(self.evaluations, self.evaluations)
        for index, row in enumerate(self.coefficients):
            matrix[index, : len(row)] = torch.tensor(row)
        return torch.tensor(self.times), matrix


@dataclass(frozen=True)
class SolverFile:
    """The solvers of one set of weights."""

    weights: str  # `weights_fingerprint` of the transformer
    solvers: tuple[CalibratedSolver, ...] = ()

    def fitting(self, sample: SampleConfig, path_type: str) -> list[CalibratedSolver]:
        """Return the solvers that were fitted with the guidance and guide of sampling settings."""
        wanted = (guidance_of(sample), guide_fingerprint(sample), path_type)
        return [solver for solver in self.solvers if (solver.guidance, solver.guide, solver.path_type) == wanted]

    def best(self, sample: SampleConfig, path_type: str, evaluations: int | None = None) -> CalibratedSolver | None:
        """Return the fitting solver with the most evaluations, at most `evaluations` of them."""
        solvers = self.fitting(sample, path_type)
        small = [solver for solver in solvers if evaluations is None or solver.evaluations <= evaluations]
        return max(small, key=lambda solver: solver.evaluations, default=None)

    def with_solver(self, solver: CalibratedSolver) -> SolverFile:
        """Return the file with `solver` added; one of the same settings and size stays if it is as good."""

        def key(one: CalibratedSolver) -> tuple[str, str, int]:
            return _purpose(one.guidance, one.guide), one.path_type, one.evaluations

        by_key = {key(one): one for one in self.solvers}
        known = by_key.get(key(solver))
        if known is None or solver.error < known.error:
            by_key[key(solver)] = solver
        return dataclasses.replace(self, solvers=tuple(by_key[name] for name in sorted(by_key)))

    def renamed(self, fingerprints: Mapping[str | None, str]) -> SolverFile:
        """Return the file for the same weights under new fingerprints, given by old ones: rounding changes them."""
        solvers = (dataclasses.replace(one, guide=fingerprints.get(one.guide, one.guide)) for one in self.solvers)
        return SolverFile(fingerprints.get(self.weights, self.weights), tuple(solvers))


def weights_fingerprint(path: str | Path, adapter: str | Path | None = None) -> str:
    """Return a short text that changes with the weights and not with the file that holds them.

    It is a hash of the one-dimensional tensors (biases, norms) in float32, so that a file of 6 GB takes no time and a
    `.pt` and a `.safetensors` file of the same values agree. An adapter, which may change matrices alone, counts whole:
    that beside the weights, or the one that they hold as their metadata say.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(load_weights(path).items()):
        if tensor.dim() == 1:
            digest.update(_bytes_of(name, tensor))
    for held in (inspect(path).metadata.get(ADAPTER), adapter and adapter_digest(adapter)):
        digest.update((held or "").encode())
    return digest.hexdigest()[:16]


def adapter_digest(path: str | Path) -> str:
    """Return a short text that changes with the values of an adapter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_weights(path).items()):
        digest.update(_bytes_of(name, tensor))
    return digest.hexdigest()[:16]


def _bytes_of(name: str, tensor: Tensor) -> bytes:
    return name.encode() + tensor.float().contiguous().numpy().tobytes()


def guide_fingerprint(sample: SampleConfig) -> str | None:
    """Return the `weights_fingerprint` of the guide of sampling settings, or None for classifier-free guidance."""
    return weights_fingerprint(sample.guide_ckpt) if sample.guide_ckpt else None


def load_solvers(path: str | Path) -> SolverFile:
    """Return what a solver file holds.

    Raises:
        LightningDiTError: the file is missing, no YAML, lacks something, or its entries do not fit together.
    """
    if not Path(path).exists():
        raise LightningDiTError(f"sample.solver_file {path} does not exist", CALIBRATE)
    values = read_yaml(path)
    entries = values.pop("solvers", None)
    if not (entries and isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise LightningDiTError(
            f"{path}: solvers is {str(entries)[:80]}; a list of mappings is expected",
            f"restore that file, or remove it and {CALIBRATE}",
        )
    for entry in entries:
        if isinstance(guidance := entry.get("guidance"), dict) and "guide" in guidance:
            entry["guide"] = guidance.pop("guide")
    file = typed(SolverFile, values, str(path), hidden=("solvers",))
    solvers = tuple(typed(CalibratedSolver, entry, f"{path}: solver {n}") for n, entry in enumerate(entries, 1))
    return dataclasses.replace(file, solvers=solvers)


def save_solvers(file: SolverFile, path: str | Path) -> None:
    """Write a solver file, atomically."""
    lines = [
        "# Calibrated solvers, written by `python -m LightningDiT.tools.calibrate_solver`.",
        f"weights: '{file.weights}'",
        "solvers:",
    ]
    for solver in file.solvers:
        guidance = [f"{key}: {value}" for key, value in dataclasses.asdict(solver.guidance).items()]
        guidance += [f"guide: '{solver.guide}'"] if solver.guide else []  # quoted: YAML reads digits as a number
        lines += [
            f"- guidance: {{{', '.join(guidance)}}}",
            f"  path_type: {solver.path_type}",
            f"  error: {solver.error:.3g}",
            f"  noises: {solver.noises}",
            f"  times: {_row(solver.times)}",
            "  coefficients:",
            *(f"  - {_row(row)}" for row in solver.coefficients),
        ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")


def _row(values: Sequence[float]) -> str:
    return f"[{', '.join(_number(value) for value in values)}]"


def _number(value: float) -> str:
    """Return a number that YAML reads as one: its exponents need a point."""
    text = f"{value:.{DIGITS}g}"
    return text.replace("e", ".0e") if "e" in text and "." not in text else text


def _purpose(guidance: GuidanceSettings, guide: str | None) -> str:
    return f"{f'autoguidance (guide {guide})' if guide else 'guidance'} {describe_guidance(guidance)}"


def find_solver(
    sample: SampleConfig, path_type: str, fingerprint: Callable[[], str], evaluations: int | None = None
) -> CalibratedSolver:
    """Return the solver of `sample.solver_file` that fits settings and weights, the one with the most evaluations.

    Args:
        fingerprint: returns the `weights_fingerprint` of the transformer.
        evaluations: the most that are allowed; by default any number.

    Raises:
        OtherWeightsError: the file belongs to other weights.
        LightningDiTError: there is none; says what the file has.
    """
    fix = f"{CALIBRATE}, or another sampling_method"
    if not sample.solver_file:
        raise LightningDiTError("sampling_method calibrated needs sample.solver_file", fix)
    file = load_solvers(sample.solver_file)
    if file.weights != (found := fingerprint()):
        raise OtherWeightsError(f"{sample.solver_file} belongs to weights {file.weights}, and these are {found}", fix)
    solver = file.best(sample, path_type, evaluations)
    if solver is None or sample.reverse:
        fitting = file.fitting(sample, path_type)
        others = sorted({_purpose(one.guidance, one.guide) for one in file.solvers})
        known = f"solvers of {', '.join(str(one.evaluations) for one in fitting)}" if fitting else ", ".join(others)
        most = "" if evaluations is None else f" of at most {evaluations} evaluations"
        wanted = f"{_purpose(guidance_of(sample), guide_fingerprint(sample))}, path {path_type}"
        direction = ", from data to noise" if sample.reverse else ""
        raise LightningDiTError(
            f"{sample.solver_file} has no solver{most} for {wanted}{direction}; it has {known or 'none'}", fix
        )
    return solver
