"""Whether the rows of no class and no condition were ever trained, which classifier-free guidance subtracts.

With train.label_dropout 0 no gradient reaches them. The metadata of weights say so; for weights without it the settings
and the values do. A row that no gradient has reached keeps the normal values of std 0.02 that it began with,
independent of the other rows, while those grow: in the bundled model all rows, that of no class too, have 4 to 7 times
that size. In small trainings (31 classes, width 192, label dropout 0.1, rates 1e-4 and 5e-4) size, mean or direction of
the null row are 5 deviations or more from those of initial values once the median row has grown to 2.8 times its size;
at twice its size they are not yet, so there the values tell nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.checkpoint import inspect, load_weights
from LightningDiT.config import Config, SampleConfig
from LightningDiT.data.labels import NULL_TRAINED
from LightningDiT.errors import LightningDiTError
from LightningDiT.models.lightningdit import CLASS_TABLE, CONDITION_TABLE, INITIAL_STD

TABLES = {CLASS_TABLE: "class", CONDITION_TABLE: "condition"}
GROWN = 3.5  # times the initial size that half of the other rows must have before the values alone tell anything
SIZE_SIGMAS = 3.0  # deviations of the size of a row of initial values
SIGMAS = 4.0  # of its mean, and of its cosine with the mean of the other rows
FIX = "sample with the guidance scale 1, or train with train.label_dropout: 0.1"


def null_failure(config: Config, weights: Mapping[str, Tensor]) -> str:
    """Return why the null labels of a network mean nothing, empty if they were trained or nothing tells.

    Args:
        config: names the network's file, and its adapter, whose metadata is read.
        weights: of the network, the adapter among them.
    """
    where, told = config.adapter_path or config.ckpt_path or "the model", trained_nulls(config)
    if told is not None:
        what = "null labels" if config.data.num_conditions else "null class"
        return "" if told else f"training never reached the {what} of {where}, as the file says"
    without_dropout = config.train.label_dropout == 0
    for name, kind in TABLES.items():
        if name not in weights or not is_initial(weights[name]):
            continue
        size = _size(weights[name])
        reason = f"those of the other rows have grown to {size:.2g}"
        if without_dropout:
            reason = f"train.label_dropout is 0 in {config.source}"
        if without_dropout or size >= GROWN * INITIAL_STD:
            return (
                f"training never reached the null {kind} of {where}: its row has the initial values of std"
                f" {INITIAL_STD:g}, and {reason}"
            )
    return ""


def trained_nulls(config: Config) -> bool | None:
    """Return whether the files of a network say that its null labels were trained; None if they say nothing."""
    for path in filter(None, (config.adapter_path, config.ckpt_path)):
        if Path(path).is_file() and (told := inspect(path).metadata.get(NULL_TRAINED)) in ("true", "false"):
            return told == "true"
    return None


def null_failure_of(config: Config) -> str:
    """Return `null_failure` of the files that a configuration names, without making the network.

    Tensors of an adapter's own names take the place of those of the weights.
    """
    weights = dict[str, Tensor]()
    for path in filter(None, (config.ckpt_path, config.adapter_path)):
        weights |= {name: value for name, value in load_weights(path).items() if name in TABLES}
    return null_failure(config, weights)


def is_initial(table: Tensor) -> bool:
    """Tell whether the last row of a table (rows, width) is what initial values are: their size, mean zero, and no
    direction of the other rows."""
    null, others = table[-1].float(), table[:-1].float()
    width = len(null)
    cosine = float(torch.cosine_similarity(null, others.mean(0), dim=0))
    return (
        abs(float(null.square().mean().sqrt()) / INITIAL_STD - 1) < SIZE_SIGMAS / math.sqrt(2 * width)
        and abs(float(null.mean())) / INITIAL_STD < SIGMAS / math.sqrt(width)
        and abs(cosine) < SIGMAS / math.sqrt(width)
    )


def _size(table: Tensor) -> float:
    """Return the median size (root mean square) of the rows but the last one."""
    return float(table[:-1].float().square().mean(1).sqrt().median())


def check_guidance(sample: SampleConfig, failure: str) -> None:
    """Refuse guidance by null labels that mean nothing; `failure` is what `null_failure` returned.

    Raises:
        LightningDiTError: classifier-free guidance is on, and the null labels were never trained.
    """
    if failure and sample.cfg_scale != 1 and sample.guide_ckpt is None:
        raise LightningDiTError(f"{failure}; guidance of scale {sample.cfg_scale:g} needs it", FIX)
