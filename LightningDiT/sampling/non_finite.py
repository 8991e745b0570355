"""Where values stop being finite: the first layer, in the order of computing, whose output holds NaN or infinity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class _Found(Exception):  # noqa: N818 - ends the replay, no error
    """Carries the text of `first_not_finite`."""


def first_not_finite(networks: Mapping[str, nn.Module], replay: Callable[[], object]) -> str | None:
    """Return the first layer that gives, or is given, a value that is not finite, or None if all are finite.

    Args:
        networks: by a prefix for the names of their layers, each called as network(x, t, ...).
        replay: calls them uncompiled, since compiled code runs no hooks of layers; it ends at the first such value.

    Returns:
        A text such as `the output of blocks.3.mlp.w12 at t = 0.25`. It names the input of a layer if an operation
        between the layers gave the value.
    """
    time = math.nan
    handles = []

    def remember_time(network: nn.Module, inputs: tuple[object, ...]) -> None:
        nonlocal time
        time = float(inputs[1].flatten()[0])

    def watch(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            for side, values in (("input", inputs), ("output", output)):
                if not all_finite(values):
                    raise _Found(f"the {side} of {name} at t = {time:.4g}")

        return hook

    try:
        for prefix, network in networks.items():
            handles.append(network.register_forward_pre_hook(remember_time))
            # the hook of a layer runs before that of the module which holds it, so the innermost is named
            layers = [(name, layer) for name, layer in network.named_modules() if name]
            handles += [layer.register_forward_hook(watch(prefix + name)) for name, layer in layers]
        replay()
    except _Found as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
    return None


def all_finite(values: object) -> bool:
    """Tell whether a tensor, or every tensor of a tuple, is finite."""
    if isinstance(values, Tensor):
        return not values.is_floating_point() or bool(torch.isfinite(values).all())
    return all(map(all_finite, values)) if isinstance(values, tuple) else True
