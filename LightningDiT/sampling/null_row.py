"""Whether the rows of no class and no condition were ever trained, which classifier-free guidance subtracts.

With train.label_dropout 0 no gradient reaches them. The metadata of weights say so; for weights without it the values
do. A row that no gradient has reached keeps the normal values of std 0.02 that it began with, independent of the other
rows, while those grow: in the bundled model all rows, that of no class too, have 4 to 7 times that size.
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
GROWN = 2.0  # times the initial size that half of the other rows must have before the values tell anything
SIGMAS = 4.0  # of the statistics of a row of initial values
FIX = "sample with the guidance scale 1, or train with train.label_dropout: 0.1"


def null_failure(config: Config, weights: Mapping[str, Tensor]) -> str:
    """Return why the null labels of a network mean nothing, empty if they were trained or nothing tells.

    Args:
        config: names the network's file, and its adapter, whose metadata is read.
        weights: of the network, the adapter among them.
    """
    where, told = config.adapter_path or config.ckpt_path or "the model", trained_nulls(config)
    if told is None:
        return tables_failure(weights, where)
    return "" if told else f"the null class of {where} was never trained, as the file says"


def trained_nulls(config: Config) -> bool | None:
    """Return whether the files of a network say that its null labels were trained; None if they say nothing."""
    for path in (config.adapter_path, config.ckpt_path):
        if path and Path(path).exists() and (told := inspect(path).metadata.get(NULL_TRAINED)) in ("true", "false"):
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


def tables_failure(weights: Mapping[str, Tensor], where: str | Path) -> str:
    """Return which table of labels has a null row that still has its initial values; empty if none has."""
    for name, kind in TABLES.items():
        if name in weights and (size := _grown(weights[name])) and is_initial(weights[name]):
            return (
                f"the null {kind} of {where} was never trained: its row still has the initial values of std"
                f" {INITIAL_STD:g}, those of the {kind} rows have grown to {size:.2g}"
            )
    return ""


def is_initial(table: Tensor) -> bool:
    """Tell whether the last row of a table (rows, width) is what initial values are: their size, mean zero, and no
    direction of the other rows."""
    null, others = table[-1].float(), table[:-1].float()
    width = len(null)
    size = float(null.square().mean().sqrt()) / INITIAL_STD
    cosine = float(torch.cosine_similarity(null, others.mean(0), dim=0))
    return (
        abs(size - 1) < SIGMAS / math.sqrt(2 * width)
        and abs(float(null.mean())) / INITIAL_STD < SIGMAS / math.sqrt(width)
        and abs(cosine) < SIGMAS / math.sqrt(width)
    )


def _grown(table: Tensor) -> float:
    """Return the median size (root mean square) of the rows but the last one, 0 if they have not grown enough."""
    size = float(table[:-1].float().square().mean(1).sqrt().median())
    return size if size >= GROWN * INITIAL_STD else 0.0


def check_guidance(sample: SampleConfig, failure: str) -> None:
    """Refuse guidance by null labels that mean nothing; `failure` is what `null_failure` returned.

    Raises:
        LightningDiTError: classifier-free guidance is on, and the null labels were never trained.
    """
    if failure and sample.cfg_scale != 1 and sample.guide_ckpt is None:
        raise LightningDiTError(f"{failure}; guidance of scale {sample.cfg_scale:g} needs it", FIX)
