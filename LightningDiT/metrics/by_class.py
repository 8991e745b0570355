"""The table by class: how many images, how many of them are seen as their class, how far from the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from LightningDiT.metrics.extractors import Extractor, Views
from LightningDiT.metrics.formulas import frechet_distance
from LightningDiT.metrics.scores import proportion

Row = dict[str, Any]


def class_table(
    samples: Views,
    labels: Tensor,
    reference: Views | None,
    reference_labels: Tensor | None,
    extractor: Extractor,
    names: Sequence[str],
) -> list[Row]:
    """Return a row for each class of the generated images.

    A row has `class`, `name`, `count`; `accuracy` with its interval where the network's outputs are numbered as the
    labels are; beside it `accuracy_real`, the share of the reference's images of that class that it knows; and
    `frechet_distance` between the two where both have more images than the features have dimensions, below which a
    covariance has no full rank.

    Args:
        labels: (N,) of the generated images.
        reference_labels: (M,) of the real images; None where unknown.
        names: of the classes by number, as far as known.
    """
    sides = [(samples, labels)]
    if reference is not None and reference_labels is not None:
        sides.append((reference, reference_labels))
    rows = []
    for label in sorted(set(labels.tolist())):
        parts = [{name: view[known == label] for name, view in views.items()} for views, known in sides]
        row: Row = {"class": label, "name": names[label] if label < len(names) else str(label)}
        row["count"] = len(parts[0]["features"])
        row |= _accuracies(parts, label, extractor)
        if len(parts) == 2:
            row |= _distance(*(part["features"] for part in parts))
        rows.append(row)
    return rows


def overall_accuracy(views: Views, labels: Tensor, extractor: Extractor) -> Row | None:
    """Return the share of images seen as their class, with its interval; None where the numbers do not compare."""
    if not extractor.numbered or "logits" not in views or int(labels.max()) >= views["logits"].shape[1]:
        return None
    share = float((views["logits"].argmax(1) == labels).double().mean())
    score = proportion(share, len(labels))
    return {"value": share, "low": score.low, "high": score.high}


def _accuracies(parts: Sequence[Views], label: int, extractor: Extractor) -> Row:
    """Return the accuracy in a class's generated images and, where it has any, its real ones."""
    result: Row = {}
    for name, part in zip(("accuracy", "accuracy_real"), parts, strict=False):
        count = len(part["features"])
        seen = overall_accuracy(part, torch.full((count,), label), extractor) if count else None
        if seen:
            result[name] = seen["value"]
            if name == "accuracy":
                result |= {"accuracy_low": seen["low"], "accuracy_high": seen["high"]}
    return result


def _distance(features: Tensor, real: Tensor) -> Row:
    count, width = min(len(features), len(real)), features.shape[1]
    return {"count_real": len(real)} | ({"frechet_distance": frechet_distance(features, real)} if count > width else {})
