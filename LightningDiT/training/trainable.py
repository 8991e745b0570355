"""Which weights a training changes (`train.trainable`): all of them, adapters by LoRA, biases and norms, or a choice.

What is not changed has no gradient, no moments and no average, and is not saved: checkpoints and the file at the end
hold what is changed alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from LightningDiT.config import Config
from LightningDiT.errors import LightningDiTError
from LightningDiT.loading import as_user_error
from LightningDiT.models.adapters import (
    ALPHA,
    BASE,
    KIND,
    RANK,
    base_digest,
    bias_names,
    matching_names,
    parameter_names,
    product_names,
    share_text,
    table_names,
)

ALL, LORA, BIAS = "all", "lora", "bias"
PEFT_NAME = ".default"  # what peft adds to the names of its matrices
ADAPTER_NAME = "adapter.safetensors"


@dataclass(frozen=True)
class Part:
    """What a training changes of a network.

    Attributes:
        kind: all, lora, bias or patterns.
        names: of the file's tensors, with the module's name of each: what is changed, and what the base weights lack.
        trained: the module's names of the tensors that are changed.
        products: layers with an adapter by LoRA.
        rank: of these adapters.
        base: digest of the weights that stay as they are.
    """

    kind: str
    names: Mapping[str, str]
    trained: tuple[str, ...]
    products: tuple[str, ...] = ()
    rank: int = 0
    base: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """What the adapter's file says of itself, each value as JSON; nothing for a whole network."""
        if self.kind == ALL:
            return {}
        values: dict[str, Any] = {KIND: self.kind, BASE: self.base}
        if self.kind == LORA:
            values |= {RANK: self.rank, ALPHA: self.rank}
        return {name: json.dumps(value) for name, value in values.items()}

    def text(self, model: nn.Module) -> str:
        """Return one line: how much of the network is trained, and how."""
        how = f"{len(self.products)} layers with adapters of rank {self.rank}" if self.kind == LORA else self.kind
        return f"trains {share_text(model, self.trained)}: {how}; the rest stays as in train.weight_init"


def kind_of_part(config: Config) -> str:
    """Return all, lora, bias or patterns.

    Raises:
        LightningDiTError: a part is trained of a network that starts at random, or the setting is no known word.
    """
    wish = config.train.trainable
    if wish == ALL:
        return ALL
    if isinstance(wish, str) and wish not in (LORA, BIAS):
        raise LightningDiTError(
            f"{config.source}: train.trainable is {wish!r}; all, lora, bias or a list of patterns of names is expected",
            "edit that value",
        )
    if not config.train.weight_init:
        raise LightningDiTError(
            f"{config.source}: train.trainable trains a part of the network, and without train.weight_init the rest"
            " stays random",
            "set train.weight_init, or remove train.trainable",
        )
    return wish if isinstance(wish, str) else "patterns"


def whole_part(model: nn.Module) -> Part:
    """Return the part that is everything."""
    return Part(ALL, {name: name for name in model.state_dict()}, tuple(parameter_names(model)))


def restrict(model: nn.Module, config: Config, new: Collection[str]) -> Part:
    """Let a network train what `train.trainable` says alone, with adapters where it asks for them.

    Args:
        model: with the weights of `train.weight_init`.
        new: names of the tensors that the weights lack or have in another shape. Of these, parameters are trained.

    Raises:
        LightningDiTError: a pattern or target matches nothing, or peft is missing.
    """
    kind, train = kind_of_part(config), config.train
    if kind == ALL:
        return whole_part(model)
    whole, products = chosen_names(model, config)
    trained = [name for name in parameter_names(model) if name in {*whole, *new}]
    names = {name: name for name in model.state_dict() if name in {*trained, *new}}
    base = base_digest(model.state_dict(), names, model.state_dict())
    if kind == LORA:
        add_adapters(model, products, train.lora_rank)
        pairs = [name for name in parameter_names(model) if ".lora_" in name]
        names = {_in_file(name): name for name in pairs} | {name: _in_model(name, products) for name in names}
        trained = [*pairs, *(_in_model(name, products) for name in trained)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return Part(kind, names, tuple(trained), products, train.lora_rank if products else 0, base)


def chosen_names(model: nn.Module, config: Config) -> tuple[list[str], tuple[str, ...]]:
    """Return the tensors that are trained as a whole, and the layers with an adapter; the model needs no values.

    Raises:
        LightningDiTError: a pattern or target matches nothing.
    """
    kind, train = kind_of_part(config), config.train
    if kind == ALL:
        return parameter_names(model), ()
    if kind == BIAS:
        return bias_names(model), ()
    if kind == LORA:
        with as_user_error(f"{config.source}: train.lora_targets"):
            return table_names(model), tuple(product_names(model, train.lora_targets))
    with as_user_error(f"{config.source}: train.trainable"):
        return matching_names(model, train.trainable), ()


def add_adapters(model: nn.Module, products: Collection[str], rank: int) -> None:
    """Give layers of a network adapters by LoRA, which start at zero; alpha is the rank, so their factor is 1.

    Raises:
        LightningDiTError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise LightningDiTError("train.trainable: lora needs peft, which is missing", "pip install peft") from error
    pattern = "|".join(map(re.escape, products))  # one text is a pattern for whole names
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern), model)


def _in_model(name: str, products: Collection[str]) -> str:
    """Return the name that a tensor of the network has after `add_adapters`."""
    layer, _, own = name.rpartition(".")
    return f"{layer}.base_layer.{own}" if layer in products else name


def _in_file(name: str) -> str:
    """Return what an adapter's file calls one of peft's matrices."""
    return name.replace(f"{PEFT_NAME}.weight", ".weight")
