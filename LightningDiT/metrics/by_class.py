"""Accuracy of generated images, and the table by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from LightningDiT.metrics.extractors import Activations, Extractor
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.scores import Score, proportion

Row = dict[str, Any]
Labelled = tuple[Activations, Tensor]  # activations of a set and its classes (N,)


def accuracy(labelled: Labelled, extractor: Extractor, outputs: Tensor | None = None) -> Score | None:
    """Return the share of images that the network recognises as their class; None if its outputs are other classes.

    Args:
        outputs: (C,) the network's output for each class, -1 if it has none; by default the class number.
    """
    activations, labels = labelled
    wanted = labels if outputs is None else outputs[labels]
    if not extractor.numbered or "logits" not in activations:
        return None
    if int(wanted.min()) < 0 or int(wanted.max()) >= activations["logits"].shape[1]:
        return None
    share = float((activations["logits"].argmax(1) == wanted).double().mean())
    return proportion(share, len(labels))


def class_table(
    generated: Labelled,
    real: Labelled | None,
    extractor: Extractor,
    names: Sequence[str],
    outputs: Tensor | None = None,
) -> list[Row]:
    """Return a row for each class of the generated images.

    A row has `class`, `name`, `count` and, as far as `real` is given, `count_real`; `accuracy` with its interval and
    `accuracy_real`, see `accuracy`; and `frechet_distance` if both sets have more images of the class than the features
    have dimensions: with fewer, a covariance does not have full rank.

    Args:
        names: of the classes by number, as far as known.
        outputs: see `accuracy`.
    """
    rows = []
    for label in generated[1].unique().tolist():
        made, known = _of_class(generated, label), _of_class(real, label) if real else None
        row: Row = {"class": label, "name": names[label] if label < len(names) else str(label), "count": len(made[1])}
        if score := accuracy(made, extractor, outputs):
            row |= {"accuracy": score.value, "accuracy_low": score.low, "accuracy_high": score.high}
        if known and len(known[1]) and (score := accuracy(known, extractor, outputs)):
            row["accuracy_real"] = score.value
        if known:
            features, references = made[0]["features"], known[0]["features"]
            row["count_real"] = len(references)
            if min(len(features), len(references)) > features.shape[1]:
                row["frechet_distance"] = frechet_distance(features, references)
        rows.append(row)
    return rows


def _of_class(labelled: Labelled, label: int) -> Labelled:
    activations, labels = labelled
    chosen: Tensor = torch.nonzero(labels == label).flatten()
    return {kind: values[chosen] for kind, values in activations.items()}, labels[chosen]
