"""How a run makes its networks fast: graphs, compiled code, padded batches and kernels of attention.

The choice follows from facts and tables alone, and it is made once for a whole run. Nothing is timed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from LightningDiT.device import ATTENTION_KERNELS, HAS_TF32, Abilities
from LightningDiT.errors import LightningDiTError, first_line, is_out_of_memory, warn_user
from LightningDiT.files import write_text

BLOCK, WHOLE = "block", "whole"  # what is compiled: one block, whose code serves all of them, or the whole forward
BLOCKS_SHARE = (2, 5)  # torch from which the code of one block serves the others
WISHES = ("auto", "on", "off")


@dataclass(frozen=True)
class Way:
    """One way to compute the forward of a network.

    Attributes:
        compiled: BLOCK, WHOLE, or empty.
        graphs: whether the forward is recorded as a graph.
        first, shape: seconds until the first result, and those that each further shape adds.
        forward: milliseconds of a forward of 16 states.
    """

    compiled: str
    graphs: bool
    first: float
    shape: float
    forward: float


#: Forwards of LightningDiT-XL/1 in bf16 with torch 2.11: without graphs on an H100, in an earlier state of this code;
#: by graphs on an H200, where the first result by compiled code includes the decoder's. A slower GPU saves more seconds
#: for the same time of compiling.
WAYS = (
    Way("", False, 0, 0, 20.4),
    Way(BLOCK, False, 11, 4, 11.2),
    Way(WHOLE, False, 22, 22, 9.4),
    Way("", True, 1, 1, 17.6),
    Way(BLOCK, True, 20, 4, 8.44),
    Way(WHOLE, True, 45, 33, 8.45),
)
WAYS_STATES, WAYS_GFLOP = 16, 237.3  # states of those forwards, and the work of each


@dataclass(frozen=True)
class Kernel:
    """A kernel of attention: the capability, the version of torch and the precision that it needs."""

    name: str
    capability: tuple[int, int]
    torch: tuple[int, int]
    only_half: bool


#: The first kernel that a GPU has. Attention of all blocks of XL/1 (width 72 a head) in bf16 on an H100, 16 and 128
#: states: cudnn 0.9 and 4.8 ms, flash 1.1 and 8.5 ms, efficient 1.8 and 13.0 ms.
KERNELS = (
    Kernel("cudnn", (9, 0), (2, 5), True),
    Kernel("flash", (8, 0), (2, 2), True),
    Kernel("efficient", (5, 0), (2, 2), False),
)


@dataclass(frozen=True)
class Work:
    """What a run asks of one process.

    Attributes:
        images: of the whole run in this process.
        batch: images at once, at most.
        states: states that an image sends through a network, over all evaluations.
        shapes: numbers of states with which a network is called: one, or two if only some evaluations are guided.
        gflop: work of one state in 10^9 operations.
        half: whether the weights are in half precision.
        adaptive: whether the solver chooses its steps by what it meets.
        kernels: names of the kernels of attention that compute this network's shapes.
    """

    images: int
    batch: int
    states: int
    shapes: int
    gflop: float
    half: bool
    adaptive: bool = False
    kernels: tuple[str, ...] = tuple(ATTENTION_KERNELS)


@dataclass(frozen=True)
class Plan:
    """How a run computes; the first process chooses it, and the manifest keeps it for the others and for reruns.

    Raises:
        ValueError: a value that no plan has.
    """

    graphs: bool = False  # forwards are recorded as graphs
    compiled: str = ""  # BLOCK or WHOLE
    batch: int | None = None  # images to which smaller batches are padded; None: none is
    attention: str | None = None  # a row of KERNELS; None: torch chooses
    deterministic: bool = False  # every batch is padded, a single picture too, and nothing is compiled
    wish: str = "auto"  # one of WISHES, as the run began
    reason: str = ""
    tf32: bool = False  # products of float32 take TF32 inputs
    half_decoder: bool = False  # the decoder computes in fp16

    def __post_init__(self) -> None:
        if self.compiled not in ("", BLOCK, WHOLE):
            raise ValueError(f"compiled is {self.compiled!r}; {BLOCK}, {WHOLE} or nothing is expected")
        if self.attention not in (None, *ATTENTION_KERNELS):
            raise ValueError(f"attention is {self.attention!r}; {', '.join(ATTENTION_KERNELS)} are known")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}; 1 or more is expected")

    def rows(self, images: int) -> int:
        """Return the number of images to which a batch is padded."""
        return max(images, self.batch or 0)

    def plainly(self) -> Plan:
        """Return the plan for what runs once or in float32: no graphs, no compiled code and, as a rule, no padding."""
        if not self.deterministic:
            return replace(PLAIN, tf32=self.tf32, half_decoder=self.half_decoder)
        return replace(self, graphs=False, attention=self.attention and "efficient")  # which takes every precision

    def of_batch(self, images: int, most: int) -> Plan:
        """Return the plan of one batch of a run, if memory holds `most` images at once.

        A single picture that is left at the end of a run is computed as it is, unless the run is deterministic.
        """
        if self.batch is None:
            return self
        if images == 1 < self.batch and not self.deterministic:
            return self.plainly()
        return replace(self, batch=min(self.batch, most))

    def objection(self, machine: Abilities, wish: str) -> str:
        """Return why a machine, or the wish `--compile` of a rerun, does not go with this plan; empty if they do."""
        kernel = next((row for row in KERNELS if row.name == self.attention), None)
        if self.graphs and machine.no_graphs:
            return f"computes by graphs, and here {machine.no_graphs}"
        if self.compiled and machine.no_compiler:
            return f"computes by compiled code, and here {machine.no_compiler}"
        if self.compiled == BLOCK and machine.torch < BLOCKS_SHARE:
            return "computes by one compiled block, which needs torch 2.5"
        if kernel and not _has(machine, kernel):
            return f"computes attention by {kernel.name}, which {machine.name} with this torch does not have"
        if self.tf32 and (machine.capability or (0, 0)) < HAS_TF32:
            return f"computes in TF32, which {machine.name} does not have"
        if self.half_decoder and machine.capability is None:
            return "decodes in fp16, which takes a GPU"
        if wish == "on" and not self.compiled and self.wish != "on":
            return "computes without compiled code, and compile is on"
        if wish == "off" and self.compiled:
            return "computes by compiled code, and compile is off"
        return ""

    def describe(self) -> str:
        """Return the plan and its reason in a few words."""
        parts = [
            "graphs" if self.graphs else "",
            {BLOCK: "one compiled block", WHOLE: "compiled forward"}.get(self.compiled, ""),
            f"attention by {self.attention}" if self.attention else "",
            f"batches padded to {self.batch}" if self.batch else "",
            "deterministic" if self.deterministic else "",
            "products in TF32" if self.tf32 else "",
            "decoding in fp16" if self.half_decoder else "",
        ]
        what = ", ".join(filter(None, parts)) or "none"
        return f"{what} ({self.reason})" if self.reason else what


PLAIN = Plan()


def choose(
    work: Work, machine: Abilities, wish: str = "auto", deterministic: bool = False, warm: Collection[str] = ()
) -> Plan:
    """Return how a run computes.

    Args:
        wish: `on` compiles if the machine can, `off` does not; `auto` compiles on a GPU if the run gains more than
            compiling costs, or if an earlier run left the code.
        deterministic: see `Plan`; whatever the wish.
        warm: BLOCK, WHOLE or both, for which an earlier run left code.
    """
    rows = [row for row in KERNELS if _has(machine, row) and row.name in work.kernels]
    attention = next((row.name for row in rows if work.half or not row.only_half), None)
    if deterministic:
        batch = None if work.adaptive else work.batch
        graphs = not (machine.no_graphs or work.adaptive)
        return Plan(graphs, "", batch, attention, True, wish, "one shape and one kernel for each layer")
    if work.adaptive:
        reason = "the solver chooses its steps, so each image is computed alone"
        return Plan(attention=attention, wish=wish, reason=reason)
    compiled, reason = _compiled(work, machine, wish, warm)
    graphs = not machine.no_graphs
    batch = min(work.batch, work.images) if graphs or compiled else None
    return Plan(graphs, compiled, batch, attention, False, wish, reason)


def _compiled(work: Work, machine: Abilities, wish: str, warm: Collection[str]) -> tuple[str, str]:
    """Return what is compiled, and why."""
    graphs = not machine.no_graphs
    plain, *others = [way for way in WAYS if way.graphs == graphs]
    ways = {way.compiled: way for way in others if way.compiled == WHOLE or machine.torch >= BLOCKS_SHARE}
    best = min(ways.values(), key=lambda way: _seconds(way, work))
    cost = best.first + best.shape * (work.shapes - 1)
    if wish == "off":
        return "", "compile is off"
    if machine.no_compiler:
        return "", f"nothing is compiled: {machine.no_compiler}"
    if wish == "on":
        return best.compiled, "compile is on"
    if machine.capability is None:
        return "", "on a CPU compiling pays only for long runs of small models: docs/compile.md"
    for kept in (WHOLE, BLOCK):
        if kept in warm and kept in ways:
            return kept, "an earlier run left the compiled code"
    if _seconds(best, work) < _seconds(plain, work):
        return best.compiled, f"{work.images} images gain more than the {cost:.0f} s of compiling"
    return "", f"{work.images} images do not gain the {cost:.0f} s of compiling"


def _seconds(way: Way, work: Work) -> float:
    """Return the seconds that a run would take on the GPU of `WAYS`."""
    forwards = work.images * work.states / WAYS_STATES * work.gflop / WAYS_GFLOP
    return way.first + way.shape * (work.shapes - 1) + forwards * way.forward / 1000


def _has(machine: Abilities, kernel: Kernel) -> bool:
    return machine.capability is not None and machine.capability >= kernel.capability and machine.torch >= kernel.torch


# ---- torch.compile


MOST_SHAPES = 64  # of inputs that one process compiles a network for


class CompiledForward(partial):
    """A forward that `uncompiled` takes away for a while."""


def compile_forward(*modules: nn.Module) -> None:
    """Compile the forward of modules of one class at its first call; the names of their weights stay as they are.

    One code serves all of them (from torch 2.5 on), and each shape of the inputs has its own. Without a compiler for
    the device, or with a torch that cannot compile on this system, the modules warn once and compute as before.
    """
    plain = type(modules[0]).forward
    _keep_code()
    _allow_shapes()
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # the precision tf32 asks for them
    try:
        compiled = torch.compile(plain, dynamic=False)
    except RuntimeError as error:  # older releases refuse newer Pythons, and Windows
        _warn(error)
        return

    def forward(module: nn.Module, *arguments: Tensor) -> Tensor:
        try:
            return compiled(module, *arguments)
        except Exception as error:  # of the compiler, or of any program that it starts
            if is_out_of_memory(error):
                raise
            _warn(error)
            for one in modules:
                vars(one).pop("forward", None)  # uncovers the class's own
        return plain(module, *arguments)

    for module in modules:
        module.forward = CompiledForward(forward, module)


def _allow_shapes() -> None:
    """Let torch compile `MOST_SHAPES` shapes of one code; it stops at 8, and computes later ones uncompiled."""
    from torch._dynamo import config  # takes a second, which runs without compiling do not need

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(config, limit, max(MOST_SHAPES, getattr(config, limit)))


def is_compiled(*modules: nn.Module) -> bool:
    """Return whether all modules have a compiled forward that works, as far as they have been called."""
    return all(isinstance(vars(module).get("forward"), CompiledForward) for module in modules)


@contextlib.contextmanager
def uncompiled(*networks: nn.Module) -> Iterator[None]:
    """Let networks and their parts compute uncompiled within the block."""
    parts = [module for network in networks for module in network.modules() if is_compiled(module)]
    taken = [(module, vars(module).pop("forward")) for module in parts]
    try:
        yield
    finally:
        for module, forward in taken:
            module.forward = forward


def _warn(error: Exception) -> None:
    warn_user(f"torch.compile does not work here ({first_line(error)}); going on uncompiled")


# ---- code that earlier runs left

CODE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable for the folder in which it keeps compiled code


def code_folder() -> Path | None:
    """Return the folder in which torch keeps compiled code: the user's choice, or one in the user's cache; None
    without a home.
    """
    if chosen := os.environ.get(CODE_FOLDER):
        return Path(chosen)
    usual = {"win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local"), "darwin": "~/Library/Caches"}
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # another one has no meaning by the standard
        cache = Path(usual.get(sys.platform, "~/.cache"))
    try:
        return cache.expanduser() / "LightningDiT" / "compiled"
    except RuntimeError:
        return None


def stamp_of(facts: Mapping[str, object]) -> Path | None:
    """Return the file that says that a run left the compiled code which belongs to these facts.

    It lies beside the code, so that both go together.
    """
    folder = code_folder()
    text = json.dumps({name: str(value) for name, value in facts.items()}, sort_keys=True)
    return folder and folder / f"lightningdit-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def leave_stamp(stamp: Path | None, facts: Mapping[str, object]) -> None:
    """Write a stamp of `stamp_of`; a folder that cannot be written costs later runs the time of compiling."""
    if stamp is not None and not stamp.exists():
        with contextlib.suppress(LightningDiTError):
            write_text(stamp, json.dumps({name: str(value) for name, value in facts.items()}, indent=1))


def _keep_code() -> None:
    """Let torch keep compiled code in the user's own cache; its default is a folder for temporary files."""
    folder = code_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(CODE_FOLDER, str(folder))
