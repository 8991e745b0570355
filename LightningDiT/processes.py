"""Several processes that share one run: which of them this is, and what they tell one another.

`accelerate launch` and `torchrun` say in the environment how many there are. One process needs neither of them,
and accelerate is imported only where there are more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from LightningDiT.errors import LightningDiTError

#: How long a process waits for another one: batches of a large model on a CPU take hours.
PATIENCE = timedelta(days=7)
INTERRUPTED = 130  # exit code after Ctrl-C

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Each method is called by all of them in the same order, and an error of one is the error of all: the main
    process raises it, the others end with exit code 1 and say nothing.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

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
            error = (raised.message, raised.mend)
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
def launched_processes() -> Iterator[Processes]:
    """Give the processes that a launcher started together, or `ALONE` without one.

    They exchange a few bytes a batch, by gloo, on CPUs and GPUs alike.

    Raises:
        LightningDiTError: accelerate is not installed, or the processes do not find one another.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        from accelerate import PartialState

        state = PartialState(cpu=True, timeout=PATIENCE)
    except ImportError as error:
        raise LightningDiTError(
            f"several processes need a package that is missing ({error})", "python step1_install_environment.py"
        ) from error
    except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
        raise LightningDiTError(
            f"the processes do not find one another ({_first_line(error)})", "start them by torchrun"
        ) from error
    # The group ends with the process: torch 2.2 hangs where it is destroyed after another process has left.
    yield Processes(state.process_index, state.num_processes)


def _gather(value: Any) -> list[Any]:
    from accelerate.utils import gather_object

    try:
        return gather_object([value])
    except RuntimeError as error:
        raise LightningDiTError(
            f"another process of this run has ended ({_first_line(error)})", "see what it said, and start all again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:160]
