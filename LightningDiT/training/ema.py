"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Ema:
    """Exponential moving average of a module's parameters and buffers (Polyak and Juditsky, 1992).

    Our own, because torch.optim.swa_utils.AveragedModel keeps a second module and another state in checkpoints.

    Args:
        names: what is averaged: the average's names, with the module's name of each. Default: everything, by its name.
    """

    def __init__(self, module: nn.Module, decay: float, names: Mapping[str, str] | None = None) -> None:
        self.decay = decay
        self.steps = 0
        own = module.state_dict(keep_vars=True)  # the module's own tensors
        self._values = own if names is None else {name: own[there] for name, there in names.items()}
        self.weights = {name: value.detach().clone() for name, value in self._values.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module; early steps weigh more, so that the initial weights are forgotten."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.weights.values()), list(self._values.values()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the number of updates."""
        return {"weights": self.weights, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the tensors stay on their device."""
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])
        self.steps = int(state["steps"])
