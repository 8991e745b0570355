"""How many images fit the memory at once: half as many where it runs out, and more again later."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

from LightningDiT.device import is_out_of_memory, release_memory
from LightningDiT.errors import LightningDiTError

GOOD_BATCHES = 8  # batches that fit before twice as many images are tried again

T = TypeVar("T")


class BatchLimit:
    """The largest number of images at once that the memory is known to hold; none until it ran out.

    After `GOOD_BATCHES` batches the limit doubles, since memory that another program held may be free again;
    each time that fails the next attempt waits twice as long.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._good, self._needed = 0, GOOD_BATCHES

    def of(self, wanted: int) -> int:
        """Return how many of `wanted` images are to be sampled at once."""
        return wanted if self.most is None else min(wanted, self.most)

    def attempt(self, action: Callable[[], T], images: int) -> T | None:
        """Return what `action` gives, or None where it needed more memory than there is for `images`.

        Raises:
            LightningDiTError: the memory does not hold a single image.
        """
        try:
            result = action()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._halve(images, str(error).split("\n")[0][:200])
        else:
            self._count()
            return result
        gc.collect()  # here, since the error above held the frames that hold the tensors
        release_memory()
        return None

    def _halve(self, images: int, reason: str) -> None:
        if images == 1:
            raise LightningDiTError(
                f"the memory does not hold one image ({reason})",
                "close other programs that use it, or choose a smaller model or --precision bf16",
            )
        if self.most is not None:
            self._needed *= 2
        self.most, self._good = images // 2, 0
        # five frames up is who called the pipeline
        warnings.warn(f"memory ran out with {images} images at once; going on with {self.most}", stacklevel=5)

    def _count(self) -> None:
        if self.most is None:
            return
        self._good += 1
        if self._good >= self._needed:
            self.most, self._good = 2 * self.most, 0
