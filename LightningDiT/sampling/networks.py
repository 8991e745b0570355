"""The networks of a pipeline as a plan computes them: padded to a fixed shape, compiled, and recorded as graphs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from LightningDiT import models
from LightningDiT.compiling import (
    BLOCK,
    KERNELS,
    WHOLE,
    Plan,
    Work,
    choose,
    compile_forward,
    is_compiled,
    leave_stamp,
    stamp_of,
    uncompiled,
)
from LightningDiT.device import (
    HALF_PRECISIONS,
    Precision,
    Recording,
    abilities,
    attention_by,
    attention_failure,
    float32_products,
    numeric_switches,
)
from LightningDiT.errors import first_line, is_out_of_memory, warn_user
from LightningDiT.files import read_bytes
from LightningDiT.loading import Network, guidance_of
from LightningDiT.sampling.solver_choice import Solver
from LightningDiT.transport import jumps_of

MOST_RECORDINGS = 8  # each keeps the memory of a forward


class Networks:
    """Runs networks by a plan and keeps their recordings; `lock` is held while a thread samples.

    A recording is dropped when a weight of its network lies elsewhere than during the recording: after `to`, a change
    of precision, or weights that were assigned. Values that are copied into the weights show in the next replay.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._recordings: dict[tuple[object, ...], tuple[object, Recording]] = {}
        self._parts: dict[nn.Module, list[nn.Module]] = {}
        self._compiled: set[nn.Module] = set()
        self._graphs_fail = False

    @contextlib.contextmanager
    def under(self, plan: Plan, networks: Sequence[nn.Module]) -> Iterator[None]:
        """Let the networks compute by a plan's code within the block, and as in evaluation: no label is dropped."""
        outer = self._parts  # of the call whose callback this one may be
        self._parts = {network: list(network.modules()) for network in networks}
        for network in networks if plan.compiled else ():
            if network not in self._compiled and not any(map(is_compiled, self._parts[network])):
                compile_forward(*(network.blocks if plan.compiled == BLOCK and _has_blocks(network) else [network]))
                self._compiled.add(network)
        training = [part for parts in self._parts.values() for part in parts if part.training]
        for part in training:
            part.training = False
        try:
            with contextlib.nullcontext() if plan.compiled else uncompiled(*networks):
                yield
        finally:
            self._parts = outer
            for part in training:
                part.training = True

    def predict(self, network: Network, plan: Plan, images: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the float32 prediction (M, C, h, w) of states x (M, C, h, w) of M / `images` predictions an image.

        Args:
            t: times (M,), all equal.
            y: labels (M,), or (M, 2) with a second label.
        """
        states = len(x)
        rows = states // images * plan.rows(images)
        inputs = padded(x, rows), t[:1].to(x.device, non_blocking=True), padded(y, rows)
        with attention_by(plan.attention), float32_products(x.device, plan.tf32):
            out = self._replayed(network, plan, inputs) if plan.graphs else network(*inputs)
        return out[:states].float()

    def __getstate__(self) -> dict[str, object]:
        """Return nothing: a copy of a pipeline in memory or in another process has its own lock and recordings."""
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()

    def drop(self) -> None:
        """Forget all recordings, which frees their memory."""
        self._recordings.clear()

    def _replayed(self, network: Network, plan: Plan, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the output (N, C, h, w), in memory of its own, for inputs x (N, C, h, w), t (1,) and labels y."""
        parts = self._parts[network]
        if self._graphs_fail or any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            return network(*inputs)  # a replay would call no hook
        key = (network, len(inputs[0]), plan.compiled, plan.attention, *numeric_switches())
        if key in self._recordings and self._recordings[key][0] != _places(parts):
            self._recordings = {other: kept for other, kept in self._recordings.items() if other[0] is not network}
        if key not in self._recordings:
            recording = self._recorded(network, inputs)
            if recording is None:
                return network(*inputs)
            self._recordings[key] = (_places(parts), recording)
            for oldest in list(self._recordings)[:-MOST_RECORDINGS]:
                del self._recordings[oldest]
        return self._recordings[key][1](*inputs).clone()  # solvers keep predictions; the next replay writes there

    def _recorded(self, network: Network, inputs: tuple[Tensor, ...]) -> Recording | None:
        try:
            return Recording(network, inputs)
        except Exception as error:  # of the device, its libraries, or the computation
            self.drop()
            causes = [error, error.__context__, error.__cause__]  # the end of a recording hides why it failed
            for cause in causes:
                if cause is not None and is_out_of_memory(cause):
                    raise cause from None
            warn_user(f"graphs do not work here ({first_line(error)}); going on without them")
            self._graphs_fail = True
            return None


def padded(values: Tensor, rows: int) -> Tensor:
    """Return values (N, ...) with zeros behind them, (rows, ...) in all."""
    if len(values) == rows:
        return values
    return torch.cat([values, values.new_zeros(rows - len(values), *values.shape[1:])])


def _places(parts: Sequence[nn.Module]) -> list[tuple[int, torch.dtype]]:
    """Return where the weights and tables of modules lie."""
    tensors = (value for part in parts for held in (part._parameters, part._buffers) for value in held.values())
    return [(value.data_ptr(), value.dtype) for value in tensors if value is not None]


def plan_of(solver: Solver, network: Network, precision: Precision, images: int, batch: int) -> Plan:
    """Return the plan of a run of `images` images in this process, `batch` of them at once; see `choose`."""
    sample, weight = solver.sample, next(network.parameters())
    work = _work(solver, network, images, batch)
    warm = []
    for compiled in (BLOCK, WHOLE):
        stamp = stamp_of(_facts(network, compiled, min(batch, images), work.shapes))
        if stamp is not None and stamp.exists():
            warm.append(compiled)
    plan = choose(work, abilities(weight.device), sample.compile, sample.deterministic, warm)
    compiled = WHOLE if plan.compiled and not _has_blocks(network) else plan.compiled
    return replace(plan, compiled=compiled, tf32=precision.tf32, half_decoder=precision.half_decoder)


def objection_to(plan: Plan, network: Network, wish: str) -> str:
    """Return why this machine, or `compile` of the settings, does not go with a plan; empty if they do."""
    objection = plan.objection(abilities(next(network.parameters()).device), wish)
    if not objection and plan.attention and (failure := _attention_failure(plan.attention, network)):
        return f"computes attention by {plan.attention}, which does not work here ({failure})"
    return objection


def note_code(plan: Plan, solver: Solver, network: Network) -> None:
    """Leave a note for later runs that compiled code of this plan is there, if compiling worked."""
    if plan.compiled and plan.batch and any(map(is_compiled, network.modules())):
        facts = _facts(network, plan.compiled, plan.batch, _work(solver, network, 1, 1).shapes)
        leave_stamp(stamp_of(facts), facts)


def _work(solver: Solver, network: Network, images: int, batch: int) -> Work:
    sample = solver.sample
    guidance, has_guide = guidance_of(sample), sample.guide_ckpt is not None
    return Work(
        images=images,
        batch=batch,
        states=solver.steps * (1 if guidance.cfg_scale == 1 else 2),
        shapes=2 if jumps_of(guidance) and not has_guide else 1,
        gflop=network.settings.gflop,
        half=next(network.parameters()).dtype in HALF_PRECISIONS,
        adaptive=solver.is_adaptive,
        kernels=tuple(row.name for row in KERNELS if not _attention_failure(row.name, network)),
    )


def _attention_failure(kernel: str, network: Network) -> str | None:
    weight = next(network.parameters())
    if abilities(weight.device).capability is None:
        return "there is no GPU"
    if (shape := getattr(network, "attention_shape", None)) is None:
        return "the network has no attention"
    return attention_failure(kernel, *shape, weight.dtype, weight.device)


def _has_blocks(network: Network) -> bool:
    """Return whether a network is made of blocks of one shape, whose code one of them gives to all."""
    return hasattr(network, "blocks")


@functools.cache
def _models_digest() -> str:
    """Return a digest of the modules of networks, whose compiled code serves the same source alone."""
    digest = hashlib.sha256()
    for path in sorted(Path(models.__file__).parent.glob("*.py")):
        digest.update(read_bytes(path))
    return digest.hexdigest()


def _facts(network: Network, compiled: str, batch: int, shapes: int) -> dict[str, Any]:
    """Return what compiled code belongs to."""
    weight = next(network.parameters())
    return {
        "code": _models_digest(),
        "torch": torch.__version__,
        "card": abilities(weight.device).name,
        "model": network.settings,
        "dtype": weight.dtype,
        "compiled": compiled,
        "batch": batch,
        "shapes": shapes,
    }
