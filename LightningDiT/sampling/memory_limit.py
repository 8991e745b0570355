"""How many images fit the memory at once: half as many when it runs out, and more again later."""

from __future__ import annotations

from LightningDiT.errors import LightningDiTError, warn_user

GOOD_BATCHES = 8  # batches that fit before twice as many images are tried again


class BatchLimit:
    """The largest number of images at once that the memory is known to hold; no limit until it runs out.

    After `GOOD_BATCHES` batches the limit doubles, since memory that another program held may be free again;
    each time that fails the next attempt waits twice as long.
    """

    def __init__(self) -> None:
        self.most: int | None = None
        self._good, self._needed = 0, GOOD_BATCHES

    def of(self, wanted: int) -> int:
        """Return how many of `wanted` images are to be sampled at once."""
        return wanted if self.most is None else min(wanted, self.most)

    def halve(self, images: int, error: BaseException) -> None:
        """Take note that the memory does not hold `images` at once.

        Raises:
            LightningDiTError: that was a single image.
        """
        if images == 1:
            reason = str(error).split("\n")[0][:200]
            raise LightningDiTError(
                f"the memory does not hold one image ({reason})",
                "close other programs that use it, or choose a smaller model or --precision bf16",
            )
        if self.most is not None:
            self._needed *= 2
        self.most, self._good = images // 2, 0
        warn_user(f"memory ran out with {images} images at once; going on with {self.most}")

    def count_success(self) -> None:
        """Take note that the memory held a batch."""
        if self.most is None:
            return
        self._good += 1
        if self._good >= self._needed:
            self.most, self._good = 2 * self.most, 0
