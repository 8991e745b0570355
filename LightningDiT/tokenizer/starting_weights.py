"""The start of a tokenizer's training from weights: a published checkpoint, or the file of another training.

Such a file holds more than the autoencoder. Each part goes by its name to the network that the training has for it;
parts that do not fit are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import check_kinds, kind_of, load_into, load_weights
from LightningDiT.errors import LightningDiTError, fixed_by
from LightningDiT.formats import diffusers_vae

from .autoencoder import AutoencoderKL
from .criterion import Criterion
from .perceptual import PUBLISHED_PREFIX as PERCEPTUAL_PREFIX
from .vision import PUBLISHED_PREFIX as VISION_PREFIX

VISION_PART = "foundation_model."
OF_FOLDER = "tokenizer.safetensors"  # the weights in the folder of a model
#: Parts of a training that a file may hold beside the autoencoder: prefix and title.
PARTS = {
    "loss.discriminator.": "discriminator",
    "loss.logvar": "logarithm of the scale",
    PERCEPTUAL_PREFIX: "LPIPS",
    "linear_proj.": "projection",
    VISION_PART: "vision model",
}
FIRST, LAST = "encoder.conv_in.weight", ("decoder.conv_out.weight", "decoder.conv_out.bias")  # layers at the pixels
FROZEN_PARTS = (PERCEPTUAL_PREFIX, VISION_PART)  # a training builds these networks from them; the rest is `Criterion`'s


@dataclass(frozen=True)
class StartingWeights:
    """The tensors of a file by parts.

    Attributes:
        path: the file.
        autoencoder: name -> tensor, for all tensors outside the parts.
        parts: prefix in `PARTS` -> full name -> tensor.
    """

    path: Path
    autoencoder: Mapping[str, Tensor]
    parts: Mapping[str, Mapping[str, Tensor]]

    def vision(self) -> dict[str, Tensor]:
        """Return the vision model's tensors under timm's names; empty if the file has none."""
        return _stripped(self.parts.get(VISION_PART, {}), VISION_PREFIX)

    def perceptual(self) -> dict[str, Tensor]:
        """Return LPIPS's tensors under the package's names; empty if the file has none."""
        return _stripped(self.parts.get(PERCEPTUAL_PREFIX, {}), PERCEPTUAL_PREFIX)


def _stripped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_starting_weights(path: str | Path) -> StartingWeights:
    """Return the tensors of a weights file by parts.

    Args:
        path: a folder stands for its tokenizer.safetensors, or for its weights in diffusers' layout.

    Raises:
        LightningDiTError: see `load_weights`.
    """
    if diffusers_vae.folder_of(path):
        path = diffusers_vae.weights_file(path)
    path = Path(path) / OF_FOLDER if Path(path).is_dir() else path
    with fixed_by("name a published checkpoint or a run's training.safetensors by --init or train.weight_init"):
        tensors = load_weights(path)
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
    """Copy the tensors of `start` into the autoencoder and the loss, and return a line for each part of the file.

    Args:
        taken: prefixes in `FROZEN_PARTS` from which the networks were built already.

    Raises:
        LightningDiTError: the autoencoder's tensors do not fit the settings.
    """
    check_kinds(model, {name: kind_of(tensor) for name, tensor in start.autoencoder.items()}, start.path)
    tensors, plan = one_channel(start.autoencoder, model)
    load_into(model, {name: tensor.float().clone() for name, tensor in tensors.items()}, start.path)
    lines = [f"autoencoder: {len(start.autoencoder)} tensors taken", *plan]
    for prefix, tensors in start.parts.items():
        if prefix in FROZEN_PARTS:
            reason = "" if prefix in taken else "the training needs none, or has other weights for it"
        else:
            reason = _take(criterion, tensors)
        outcome = f"left out, {reason}" if reason else "taken"
        lines.append(f"{PARTS[prefix]} ({prefix.rstrip('.')}): {len(tensors)} tensors {outcome}")
    missing = [prefix for prefix in PARTS if prefix not in start.parts and _has(criterion, prefix)]
    return lines + [f"{PARTS[prefix]} ({prefix.rstrip('.')}): not in the file, starts new" for prefix in missing]


def one_channel(tensors: Mapping[str, Tensor], model: AutoencoderKL) -> tuple[dict[str, Tensor], list[str]]:
    """Return an autoencoder's tensors as the model of one channel needs them, and a line about what was done.

    The first kernel is summed over its inputs, `sum_c W_c * x = W * (x, x, x)`, and the last layer averaged over its
    outputs. So the encoder is exactly that of several channels on replicated levels, and the decoder gives the mean of
    its channels. Tensors for a model of as many channels are returned unchanged.
    """
    changed, plan = dict(tensors), list[str]()
    settings = model.settings
    if settings.in_channels == 1 and FIRST in tensors and tensors[FIRST].dim() == 4 and tensors[FIRST].shape[1] > 1:
        changed[FIRST] = tensors[FIRST].float().sum(1, keepdim=True)
        plan.append(f"first kernel summed over its {tensors[FIRST].shape[1]} inputs")
    outputs = len(tensors[LAST[0]]) if LAST[0] in tensors and tensors[LAST[0]].dim() else 1
    if settings.out_ch == 1 and outputs > 1:
        changed |= {name: tensors[name].float().mean(0, keepdim=True) for name in LAST if name in tensors}
        plan.append(f"last layer averaged over its {outputs} outputs")
    return changed, [f"one channel from several: {', '.join(plan)}"] if plan else []


def _has(module: nn.Module, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in module.state_dict())


def _take(criterion: Criterion, tensors: Mapping[str, Tensor]) -> str:
    """Copy a whole part of the loss, or return why it does not fit."""
    own = criterion.state_dict()
    unknown = [name for name in tensors if name not in own]
    if unknown:
        return f"the training has no {unknown[0]}"
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            return f"{name} is {list(tensor.shape)}; {list(own[name].shape)} is expected"
        if kind_of(tensor) != kind_of(own[name]):
            return f"{name} is {kind_of(tensor)}; {kind_of(own[name])} numbers are expected"
        if not bool(torch.isfinite(tensor.float()).all()):
            raise LightningDiTError(f"tensor {name} of the starting weights is not finite", "name an undamaged file")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return ""
