"""Loss scaling, without which small gradients become zero in fp16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

START, FACTOR, PATIENCE = 2.0**16, 2.0, 2000  # the customary values: halved at once, doubled after 2000 good steps


class LossScaler:
    """Multiplies the loss and divides the gradients again (Micikevicius et al., arXiv 1710.03740, section 3.2).

    The scale is a power of two, halved where a gradient is not finite and doubled after 2000 finite ones; disabled, it
    is 1. Our own, because torch.amp.GradScaler begins at torch 2.3 and keeps another state in checkpoints.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.scale = START if enabled else 1.0
        self.good_steps = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to differentiate."""
        return loss * self.scale if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        if self.enabled:
            torch._foreach_mul_([value.grad for value in parameters if value.grad is not None], 1 / self.scale)

    def searches(self, finite: bool) -> bool:
        """Note whether the step's gradient is finite; return whether a smaller scale may fix one that is not."""
        if not self.enabled:
            return False
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(1.0, self.scale / FACTOR)
        elif self.good_steps == PATIENCE:
            self.scale, self.good_steps = self.scale * FACTOR, 0
        return not finite and self.scale > 1

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, if scaling was enabled then and is now."""
        if self.enabled and state["scale"] > 1:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
