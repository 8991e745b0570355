"""What tells whether two files of a tokenizer's weights give the same latents: a few values of the encoder.

They survive a conversion to another file format or to half precision. A decoder that was trained further keeps the
latents, so its weights do not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from LightningDiT.checkpoint import load_weights
from LightningDiT.config import Config
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path

MANIFEST = "manifest.json"  # beside latents
KEY = "encoder_values"  # in the manifest of latents
ENCODER = ("encoder.", "quant_conv.")  # prefixes of the tensors that make latents
TENSORS = 32  # of which a value is taken
ROUNDING = 2.0**-7  # relative, of two roundings to bfloat16
TINY = 1e-5  # absolute: float16 ends there


def encoder_values(weights: Mapping[str, Tensor]) -> list[float]:
    """Return one value of each of up to 32 tensors of the encoder, spread over its layers."""
    names = sorted(name for name in weights if name.startswith(ENCODER) and weights[name].dim() > 1)
    count = min(TENSORS, len(names))
    chosen = [names[index * (len(names) - 1) // max(1, count - 1)] for index in range(count)]  # the first to the last
    return [float(f"{weights[name].flatten()[weights[name].numel() // 2].item():.6g}") for name in chosen]


def same_latents(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two lists of `encoder_values` are those of the same encoder, apart from rounding."""
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=ROUNDING, abs_tol=TINY) for a, b in pairs)


def values_of_latents(folder: str | Path) -> list[float] | None:
    """Return the `encoder_values` in the manifest of latents, None where it has none or there is no manifest."""
    file = Path(folder) / MANIFEST
    try:
        content: Any = read_json(file) if file.is_file() else None
    except (OSError, ValueError):
        return None  # whoever reads the class names says what is wrong with it
    values = content.get(KEY) if isinstance(content, dict) else None
    return values if isinstance(values, list) and all(isinstance(value, int | float) for value in values) else None


def check_tokenizer_of_latents(config: Config) -> None:
    """Refuse a tokenizer, or latents for validation, of another encoder than that of the latents.

    Nothing is compared where a manifest has no values, or the tokenizer's weights are not there.

    Raises:
        LightningDiTError: names both files.
    """
    folder, valid = config.data.data_path, config.data.valid_path
    ours = values_of_latents(folder) if folder else None
    if folder is None or ours is None:
        return
    where = f"latents in {folder}"
    theirs = values_of_latents(valid) if valid else None
    if theirs is not None and not same_latents(ours, theirs):
        raise LightningDiTError(
            f"{where} and those in {valid} were made with different tokenizers", "extract both with the same one"
        )
    weights = config.vae.ckpt_path or load_tokenizer_config(tokenizer_config_path(config)).ckpt_path
    if weights and Path(weights).is_file() and not same_latents(ours, encoder_values(load_weights(weights))):
        raise LightningDiTError(
            f"{where} were made with another tokenizer than {weights}",
            "set vae.ckpt_path to the tokenizer that made them, or extract them again",
        )
