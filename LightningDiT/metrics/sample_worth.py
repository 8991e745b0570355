"""What generated windows of walkers are worth: seen as asked, copied, and useful to a classifier.

The three are measured on validation passes, to choose weights and guidance. No number here belongs in a verdict: the
best of many looks is too good by chance, and the classifiers of a verdict are others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from LightningDiT.metrics.copies import CopyRates, nearest_under_shift, rates_of
from LightningDiT.metrics.window_judge import predicted, quick_predictions, train_judge
from LightningDiT.radar.level_images import Windows


@dataclass(frozen=True)
class Worth:
    """What a set of generated windows is worth.

    Attributes:
        judge_accuracy: share that the judge, trained on training windows, sees as the person asked for.
        copies: shares of copies among samples and held-out windows.
        utility: accuracy on validation windows of a classifier that was trained on the samples alone (classification
            accuracy score, Ravuri and Vinyals, arXiv 1905.10887).
        error: standard error of `utility` over passes.
    """

    judge_accuracy: float
    copies: CopyRates
    utility: float
    error: float

    def row(self) -> dict[str, float]:
        """Return the numbers for a log."""
        return {
            "judge_accuracy": self.judge_accuracy,
            "copies": self.copies.samples,
            "copies_real": self.copies.held_out,
            "utility": self.utility,
        }


class SampleJudge:
    """Judges generated windows beside the training and validation windows of a split.

    Args:
        classes: number of people.
        drawn: shows held-out windows as the tokenizer draws them, so that these and samples are equally smooth.
        device: of the judge.
        seed: of the judge.

    Attributes:
        real_accuracy: the judge's accuracy on validation windows.
        real_utility: accuracy on validation windows of the classifier trained on the real training windows.
    """

    def __init__(
        self,
        training: Windows,
        validation: Windows,
        classes: int,
        drawn: Callable[[Tensor], Tensor],
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.training, self.validation, self.device = training, validation, device
        self.judge = train_judge(training.pixels.to(device), training.people.to(device), classes, seed=seed)
        self._held_out = self._distances(drawn(validation.pixels))
        self.real_accuracy = self._share_right(validation.pixels, validation.people)
        self.real_utility, _ = self._utility(training.pixels, training.people)

    def worth(self, pixels: Tensor, people: Tensor) -> Worth:
        """Return what samples (N, 1, H, W) in [-1, 1] of people (N,) are worth."""
        copies = rates_of(self._distances(pixels), self._held_out)
        return Worth(self._share_right(pixels, people), copies, *self._utility(pixels, people))

    def _distances(self, pixels: Tensor) -> Tensor:
        return nearest_under_shift(pixels.to(self.device), self.training.pixels.to(self.device))[0]

    def _share_right(self, pixels: Tensor, people: Tensor) -> float:
        return float((predicted(self.judge, pixels) == people).double().mean())

    def _utility(self, pixels: Tensor, people: Tensor) -> tuple[float, float]:
        valid = self.validation
        right = quick_predictions(pixels, people, valid.pixels) == valid.people
        return share_and_error(right, valid.passes)


def share_and_error(right: Tensor, passes: Tensor) -> tuple[float, float]:
    """Return the share of right windows (N,) and its standard error over passes (N,), NaN for one pass.

    Windows of a pass overlap and are right or wrong together, so the passes are the independent draws: the error is
    `sqrt(P / (P - 1) sum_p (sum_(i in p) (r_i - r))^2) / N` (Liang and Zeger, Biometrika 1986, for a mean).
    """
    share = right.double().mean()
    groups = passes.unique(return_inverse=True)[1]
    count = int(groups.max()) + 1
    if count < 2:
        return float(share), math.nan
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, right.double() - share)
    return float(share), float((sums.square().sum() * count / (count - 1)).sqrt()) / len(right)
