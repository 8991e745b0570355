"""Starting a tokenizer's training from weights: a published checkpoint, or those of another training.

Such a file holds more than the autoencoder. Each part goes by its name to what the training has for it; what has no
place, or another shape, is listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import load_into, load_weights
from LightningDiT.errors import LightningDiTError

from .autoencoder import AutoencoderKL
from .criterion import Criterion
from .perceptual import PUBLISHED_PREFIX as PERCEPTUAL_PREFIX
from .vision import PUBLISHED_PREFIX as VISION_PREFIX

#: Parts of a training that a file may hold besides the autoencoder: prefix and what it is.
PARTS = {
    "loss.discriminator.": "discriminator",
    "loss.logvar": "logarithm of the scale",
    PERCEPTUAL_PREFIX: "LPIPS",
    "linear_proj.": "projection",
    "foundation_model.": "vision model",
}
#: Those that a training takes before it is built, see `StartingWeights.part`; the others are `Criterion`'s.
FROZEN_PARTS = (PERCEPTUAL_PREFIX, "foundation_model.")


@dataclass(frozen=True)
class StartingWeights:
    """The tensors of a file, by parts.

    Attributes:
        path: the file.
        autoencoder: name -> tensor of all that no other part claims.
        parts: prefix in `PARTS` -> its tensors under their full names.
    """

    path: Path
    autoencoder: Mapping[str, Tensor]
    parts: Mapping[str, Mapping[str, Tensor]]

    def part(self, prefix: str, stripped: str) -> dict[str, Tensor] | None:
        """Return a part's tensors without the prefix `stripped`, or None where the file has none."""
        found = self.parts.get(prefix)
        return {name.removeprefix(stripped): tensor for name, tensor in found.items()} if found else None

    def vision(self) -> dict[str, Tensor] | None:
        """Return the vision model's tensors under timm's names, or None."""
        return self.part("foundation_model.", VISION_PREFIX)

    def perceptual(self) -> dict[str, Tensor] | None:
        """Return LPIPS's tensors under the package's names, or None."""
        return self.part(PERCEPTUAL_PREFIX, PERCEPTUAL_PREFIX)


def read_starting_weights(path: str | Path) -> StartingWeights:
    """Return the tensors of a weights file by parts.

    Raises:
        LightningDiTError: see `load_weights`.
    """
    try:
        tensors = load_weights(path)
    except LightningDiTError as error:
        fix = "name a published checkpoint or a run's training.safetensors by --init or train.weight_init"
        raise LightningDiTError(error.message, fix) from error
    parts: dict[str, dict[str, Tensor]] = {}
    autoencoder = {}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in PARTS if name.startswith(prefix)), None)
        if prefix is None:
            autoencoder[name] = tensor
        else:
            parts.setdefault(prefix, {})[name] = tensor
    return StartingWeights(Path(path), autoencoder, parts)


def start_from(
    start: StartingWeights, model: AutoencoderKL, criterion: Criterion, taken: tuple[str, ...] = ()
) -> list[str]:
    """Give the autoencoder and the loss the tensors of `start`, and return a line for each part of the file.

    Args:
        taken: prefixes among `FROZEN_PARTS` that the networks were made of already.

    Raises:
        LightningDiTError: the autoencoder's tensors are not those that the settings ask for.
    """
    load_into(model, {name: tensor.float().clone() for name, tensor in start.autoencoder.items()}, start.path)
    lines = [f"autoencoder: {len(start.autoencoder)} tensors taken"]
    for prefix, tensors in start.parts.items():
        if prefix in FROZEN_PARTS:
            reason = "" if prefix in taken else "this training uses none, or other weights for it"
        else:
            reason = _take(criterion, tensors)
        outcome = f"left out, {reason}" if reason else "taken"
        lines.append(f"{PARTS[prefix]} ({prefix.rstrip('.')}): {len(tensors)} tensors {outcome}")
    missing = [prefix for prefix in PARTS if prefix not in start.parts and _has(criterion, prefix)]
    return lines + [f"{PARTS[prefix]} ({prefix.rstrip('.')}): not in the file, starts new" for prefix in missing]


def _has(module: nn.Module, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in module.state_dict())


def _take(criterion: Criterion, tensors: Mapping[str, Tensor]) -> str:
    """Copy a part of the loss as a whole, or return why it does not fit."""
    own = criterion.state_dict()
    unknown = [name for name in tensors if name not in own]
    if unknown:
        return f"this training has no {unknown[0]}"
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            return f"{name} is {list(tensor.shape)}, here {list(own[name].shape)}"
        if not bool(torch.isfinite(tensor.float()).all()):
            raise LightningDiTError(f"tensor {name} of the starting weights is not finite", "name an undamaged file")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return ""
