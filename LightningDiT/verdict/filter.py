"""A filter of generated windows, made from training passes alone: is the person who was asked for seen clearly?

What passes it is reported apart, because a filter is a second choice among the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from LightningDiT.errors import LightningDiTError
from LightningDiT.metrics.window_judge import STEPS, train_judge
from LightningDiT.radar.level_images import Windows
from LightningDiT.verdict.classifiers import logits_of
from LightningDiT.verdict.rows import Generated

PARTS = 3  # of the training passes, each judged by the other parts' judge
KEPT = 0.9  # share of the real training windows that a threshold lets through
FILTER_SEED = 880  # neither a trial nor a look during training has it


@dataclass(frozen=True)
class Filter:
    """Judges and thresholds; see `fit_filter`.

    Attributes:
        judges: one for each part of the passes that it was not trained on.
        confidence: least probability of the person who was asked for, mean over the judges.
        margin: least difference of the logit of that person and the highest other one.
        real_kept: share of the real training windows that both thresholds let through, each judged by a judge that did
            not see its pass.
        judged: number of these windows.
    """

    judges: tuple[nn.Module, ...]
    confidence: float
    margin: float
    real_kept: float
    judged: int

    def keeps(self, generated: Generated) -> Tensor:
        """Return whether each window passes, (N,) bool."""
        scores = [scores_of(judge, generated.pixels, generated.people) for judge in self.judges]
        confidence, margin = (torch.stack(part).mean(0) for part in zip(*scores, strict=True))
        return (confidence >= self.confidence) & (margin >= self.margin)


def fit_filter(training: Windows, steps: int = STEPS, kept: float = KEPT, seed: int = FILTER_SEED) -> Filter:
    """Return the filter of training windows, by cross-fitting.

    The passes of each person are dealt to three parts. A judge for each part is trained on the other two, and scores
    the windows of its own. Both thresholds are the value that a share `kept` of these scores reaches. The one training
    pass of a person always trains, and scores nothing.

    Args:
        training: for a row with few images a person, those images.
        steps: of each judge's training.

    Raises:
        LightningDiTError: nobody has two training passes.
    """
    parts = parts_of(training.people, training.passes)
    classes = len(training.class_names)
    judges, confidences, margins = [], [], []
    for part in range(PARTS):
        own = parts == part
        if not own.any():
            continue
        judge = train_judge(training.pixels[~own], training.people[~own], classes, steps, seed + part)
        scores = scores_of(judge, training.pixels[own], training.people[own])
        judges.append(judge)
        confidences.append(scores[0])
        margins.append(scores[1])
    if not judges:
        raise LightningDiTError(
            "a filter is learnt across training passes, and nobody has two of them", "leave out the filtered rows"
        )
    confidence, margin = torch.cat(confidences), torch.cat(margins)
    least = [_reached_by(kept, values) for values in (confidence, margin)]
    passed = (confidence >= least[0]) & (margin >= least[1])
    return Filter(tuple(judges), least[0], least[1], float(passed.double().mean()), len(passed))


def parts_of(people: Tensor, passes: Tensor) -> Tensor:
    """Return the part (N,) of each window, the same for a whole pass; -1 for the windows of a person's only pass."""
    parts = torch.full((len(people),), -1)
    for person in people.unique().tolist():
        own = passes[people == person].unique().tolist()
        if len(own) > 1:
            for at, number in enumerate(own):
                parts[(people == person) & (passes == number)] = (at + person) % PARTS
    return parts


def scores_of(judge: nn.Module, pixels: Tensor, people: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability (N,) of the person who is meant, and its margin in logits over the highest other one."""
    logits = logits_of(judge, pixels)  # (N, classes)
    wanted = people[:, None]
    own = logits.gather(1, wanted)[:, 0]
    others = logits.scatter(1, wanted, -torch.inf).amax(1)
    return logits.softmax(1).gather(1, wanted)[:, 0], own - others


def _reached_by(share: float, values: Tensor) -> float:
    """Return the largest of the values that at least `share` of them reach."""
    ordered = values.sort(descending=True).values
    return float(ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1])  # 0.9 of 10 are 9


def shares_kept(keeps: Tensor, people: Tensor) -> Mapping[int, float]:
    """Return the share of each person's generated windows that pass, by number."""
    return {person: float(keeps[people == person].double().mean()) for person in people.unique().tolist()}
