"""Several processes that share one run: the rank of this one, and what they exchange.

`accelerate launch`, `torchrun` and LightningDiT/sampling/all_gpus.py put the number of processes into the environment.
One process needs none of them, and accelerate is imported only for more than one.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from LightningDiT.console import FAILED, INTERRUPTED
from LightningDiT.errors import LightningDiTError, first_line

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=7)  # how long a process waits for another: batches of a large model on a CPU take hours
SETTLING = 0.1  # seconds in which the threads of an exchange end it
#: Variable of processes whose standard input ends with the process that started them and tells what became of them.
LIFELINE = "LIGHTNINGDIT_LIFELINE"
LOST = 3  # exit code of one that has lost another

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    All of them call each method in the same order. An error of one ends all: the main process raises it, the others
    end silently with exit code 1.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        device: device of the tensors that they exchange.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process writes what all share and speaks to the person."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print `text` in the main process alone."""
        if self.is_main:
            print(text, flush=True)

    def share(self, action: Callable[[], T]) -> list[T]:
        """Return the results of `action` in all processes, by rank."""
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
                if not self.is_main:
                    raise SystemExit(FAILED)
                which = f"process {rank} of {self.count}: " if rank else ""
                raise LightningDiTError(which + failed[0], failed[1])
        return [value for value, _ in outcomes]

    def agree(self, action: Callable[[], T]) -> T:
        """Return the result of `action` in this process, after it succeeded in all of them."""
        held: list[T] = []
        self.share(lambda: held.append(action()))
        return held[0]

    def from_main(self, action: Callable[[], T]) -> T:
        """Return to every process the result of `action` in the main one, which alone calls it."""
        results: list[Any] = self.share(action if self.is_main else lambda: None)
        return results[0]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes of `values`, which have the same shape in each and lie on `device`."""
        if self.count == 1:
            return values
        import torch.distributed

        total = values.detach().clone()
        _exchange(lambda: torch.distributed.all_reduce(total))
        return total / self.count

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process."""
        if self.count == 1:
            return flag
        import torch

        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def end_by_interrupt(self) -> NoReturn:
        """End after Ctrl-C; the main process alone reports it."""
        if self.is_main:
            raise KeyboardInterrupt
        raise SystemExit(INTERRUPTED)


ALONE = Processes()


@contextlib.contextmanager
def launched_processes(on_gpus: bool = False) -> Iterator[Processes]:
    """Give the processes that a launcher started together; `ALONE` without a launcher.

    Args:
        on_gpus: each process has a GPU, and they exchange gradients directly between the GPUs. By default they
            exchange a few bytes a batch by gloo, on CPUs and GPUs alike.

    Raises:
        LightningDiTError: accelerate is not installed, or the processes do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if LIFELINE in os.environ:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_follow, daemon=True).start()
    try:
        from accelerate import PartialState

        state = PartialState(cpu=not on_gpus, timeout=PATIENCE)
    except ImportError as error:
        raise LightningDiTError(
            f"several processes need a package that is missing ({error})", "python step1_install_environment.py"
        ) from error
    except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
        raise LightningDiTError(
            f"the processes do not find one another ({first_line(error)})", "start them by torchrun"
        ) from error
    import torch.distributed

    ended_well = False
    try:
        yield Processes(state.process_index, state.num_processes, str(state.device))
        with contextlib.suppress(RuntimeError):  # the launcher reports a process that died at the end
            torch.distributed.barrier()
        ended_well = True
    finally:
        if ended_well or not on_gpus:  # GPUs may still wait for a dead process
            _end_group()


def _follow() -> None:
    """Take the end of standard input as Ctrl-C."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    _thread.interrupt_main()


def _end_group() -> None:
    """End the threads of the process group.

    A thread of gloo holds the tensor of the last exchange for a moment and needs Python's lock to release it. If
    Python ends meanwhile, the thread aborts the process ("terminate called without an active exception").
    """
    import torch.distributed

    time.sleep(SETTLING)  # leaves them the lock
    # Old releases (2.2 among them) hold the lock while they wait for the threads, and hang.
    if hasattr(torch.distributed.ProcessGroup, "shutdown"):
        torch.distributed.destroy_process_group()


def _gather(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    return _exchange(lambda: gather_object([value]))


def _exchange(action: Callable[[], T]) -> T:
    try:
        return action()
    except RuntimeError as error:
        if LIFELINE in os.environ:
            raise SystemExit(LOST) from error
        raise LightningDiTError(
            f"another process of this run has ended ({first_line(error)})", "read its messages, then start all again"
        ) from error
