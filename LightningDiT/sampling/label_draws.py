"""The classes of a run that names none: `sample.labels` says whether they are drawn at random or equally often."""

from __future__ import annotations

import torch

from LightningDiT.seeds import generator_for

RANDOM, BALANCED = "random", "balanced"
CLASS_STREAM, ROUND_STREAM = 1, 3  # of generators; those of the noise have (seed, index) alone


def drawn_labels(kind: str, count: int, num_classes: int, seed: int) -> list[int]:
    """Return a class for each of `count` images as `sample.labels` says; more images only add to the list."""
    draw = {RANDOM: random_labels, BALANCED: balanced_labels}[kind]
    return draw(count, num_classes, seed)


def random_labels(count: int, num_classes: int, seed: int) -> list[int]:
    """Return a class per image; that of image i depends on (seed, i) alone."""
    draws = (
        torch.randint(num_classes, (), generator=generator_for(seed, index, CLASS_STREAM)) for index in range(count)
    )
    return [int(draw) for draw in draws]


def balanced_labels(count: int, num_classes: int, seed: int) -> list[int]:
    """Return a class per image, each class once a round of `num_classes` images.

    The order of round r depends on (seed, r) alone. The images that fill no round are of different classes.
    """
    rounds = -(-count // num_classes)
    orders = (
        torch.randperm(num_classes, generator=generator_for(seed, number, ROUND_STREAM)) for number in range(rounds)
    )
    return [int(label) for order in orders for label in order][:count]


def remainder_line(count: int, num_classes: int, num_conditions: int = 1) -> str:
    """Return a line if `count` images cannot be balanced, with how the rest is spread; empty if they can.

    Args:
        num_conditions: that take turns by rounds of the classes; 1 for none.
    """
    each, rest = divmod(count, num_classes * num_conditions)
    if not rest:
        return ""
    of = f"{num_classes} classes" + (f" x {num_conditions} conditions" if num_conditions > 1 else "")
    return f"{count} images are no multiple of {of}: {rest} of these have {each + 1} images, the others {each}"
