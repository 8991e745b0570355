"""Several processes that share one run: which of them this is, and what they tell one another.

`accelerate launch` and `torchrun` say in the environment how many there are. One process needs neither of them,
and accelerate is imported only where there are more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from LightningDiT.errors import LightningDiTError

if TYPE_CHECKING:
    from torch import Tensor

#: How long a process waits for another one: batches of a large model on a CPU take hours.
PATIENCE = timedelta(days=7)
INTERRUPTED = 130  # exit code after Ctrl-C
SETTLING = 0.1  # seconds for the threads of an exchange to end it

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Each method is called by all of them in the same order, and an error of one is the error of all: the main
    process raises it, the others end with exit code 1 and say nothing.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
        device: where tensors lie that they exchange.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes what all share and speaks to the person."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print `text` once, whatever the number of processes."""
        if self.is_main:
            print(text, flush=True)

    def share(self, action: Callable[[], T]) -> list[T]:
        """Return what `action` gave in each process, by rank."""
        if self.count == 1:
            return [action()]
        value, error = None, None
        try:
            value = action()
        except LightningDiTError as raised:
            error = (raised.message, raised.fix)
        outcomes = _gather((value, error))
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                place = f"process {rank} of {self.count}: " if rank else ""
                self._end(LightningDiTError(place + failed[0], failed[1]))
        return [value for value, _ in outcomes]

    def agree(self, action: Callable[[], T]) -> T:
        """Return what `action` gave in this process, once it has come to an end without error in all."""
        held: list[T] = []
        self.share(lambda: held.append(action()))
        return held[0]

    def from_main(self, action: Callable[[], T]) -> T:
        """Return to every process what `action` gave in the main one, which alone calls it."""
        results: list[Any] = self.share(action if self.is_main else lambda: None)
        return results[0]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes of `values`, which has the same shape in each and lies on `device`."""
        if self.count == 1:
            return values
        import torch.distributed

        total = values.detach().clone()
        _exchange(lambda: torch.distributed.all_reduce(total))
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Return to every process whether `flag` is true in one of them."""
        if self.count == 1:
            return flag
        import torch

        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def end_by_interrupt(self) -> NoReturn:
        """End after Ctrl-C, which the main process alone says."""
        if self.is_main:
            raise KeyboardInterrupt
        raise SystemExit(INTERRUPTED)

    def _end(self, error: LightningDiTError) -> NoReturn:
        if self.is_main:
            raise error
        raise SystemExit(1)


ALONE = Processes()


@contextlib.contextmanager
def launched_processes(on_gpus: bool = False) -> Iterator[Processes]:
    """Give the processes that a launcher started together, or `ALONE` without one.

    Args:
        on_gpus: they exchange gradients, by the GPUs' own means (each process has one). Else they exchange a few
            bytes a batch, by gloo, on CPUs and GPUs alike.

    Raises:
        LightningDiTError: accelerate is not installed, or the processes do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        from accelerate import PartialState

        state = PartialState(cpu=not on_gpus, timeout=PATIENCE)
    except ImportError as error:
        raise LightningDiTError(
            f"several processes need a package that is missing ({error})", "python step1_install_environment.py"
        ) from error
    except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
        raise LightningDiTError(
            f"the processes do not find one another ({_first_line(error)})", "start them by torchrun"
        ) from error
    import torch.distributed

    ended_well = False
    try:
        yield Processes(state.process_index, state.num_processes, str(state.device))
        with contextlib.suppress(RuntimeError):  # the launcher reports a process that died in its last work
            torch.distributed.barrier()
        ended_well = True
    finally:
        if ended_well or not on_gpus:  # on GPUs, work that waits for a dead process may be under way
            _end_group()


def _end_group() -> None:
    """End the threads of the process group.

    A thread of gloo keeps the tensor of the last exchange for a moment and needs Python's lock to let it go. Where
    Python ends meanwhile, the thread aborts the process ("terminate called without an active exception").
    """
    import torch.distributed

    time.sleep(SETTLING)  # leaves the lock to them
    # Old releases (2.2 among them) hold the lock while they wait for the threads, which then hangs for ever.
    if hasattr(torch.distributed.ProcessGroup, "shutdown"):
        torch.distributed.destroy_process_group()


def _gather(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    return _exchange(lambda: gather_object([value]))


def _exchange(action: Callable[[], T]) -> T:
    try:
        return action()
    except RuntimeError as error:
        raise LightningDiTError(
            f"another process of this run has ended ({_first_line(error)})", "see what it said, and start all again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:160]
