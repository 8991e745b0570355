"""A call of the pipeline in a notebook: its steps as one line that moves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from LightningDiT.console import Progress, in_notebook
from LightningDiT.transport import StepCallback


@contextlib.contextmanager
def moving_line(
    images: int, steps: int, callback: StepCallback | None, in_run: bool = False
) -> Iterator[StepCallback | None]:
    """Show the steps of a call and give the callback that moves the line; outside a notebook give the caller's own.

    Args:
        images: of the call.
        steps: of each of them.
        callback: of the caller, who then shows the progress.
        in_run: the call belongs to a run, which shows its progress.
    """
    if callback is not None or in_run or not in_notebook():
        yield callback
        return
    with Progress(images * steps, "step") as progress:
        done = last = count = 0

        def watch(step: int, t: float, state: Tensor) -> None:
            nonlocal done, last, count
            if step == 0 and last + 1 >= steps:  # the batch before it is finished
                done += count * steps
            last, count = step, len(state)
            progress.reach(min(done + count * (step + 1), progress.total))  # a batch may be sampled again

        yield watch
