"""What a training of a part of a network changes, and how it comes back into the network's weights.

An adapter is a dictionary of tensors. Those under the network's own names replace its tensors. A pair
`NAME.lora_A.weight` (rank, in) and `NAME.lora_B.weight` (out, rank) changes the product NAME: its weight becomes
W + scale * B A (LoRA, Hu et al., arXiv 2106.09685). Of a convolution, A is (rank, in, k, k) and B (out, rank, 1, 1).
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
#: What every such training changes as a whole: tables of classes and conditions, and what tells an augmentation.
TABLES = ("y_embedder.embedding_table.weight", "c_embedder.embedding_table.weight", "a_embedder.weight")
EMBEDDERS = ("x_embedder", "t_embedder", "y_embedder", "c_embedder", "a_embedder", "time_embedding")
#: Keys in the metadata of an adapter's file, whose values are JSON texts.
KIND, BASE, RANK, ALPHA = "adapter_kind", "base_weights", "lora_rank", "lora_alpha"
HASHED = 4096  # values of each tensor


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors that a training of the whole network changes."""
    return [name for name, value in model.named_parameters() if value.requires_grad]


def table_names(model: nn.Module) -> list[str]:
    """Return the names in `TABLES` that a network has."""
    return [name for name in parameter_names(model) if name in TABLES]


def bias_names(model: nn.Module) -> list[str]:
    """Return the names of biases, those of the modulation too, of norms, and of `TABLES` (DiffFit, arXiv 2304.06648).

    DiffFit's further factors on the branches are left out: the bias of a branch's gate acts as one.
    """
    norms = tuple(f"{name}." for name, module in model.named_modules() if type(module).__name__.endswith("Norm"))
    return [
        name
        for name in parameter_names(model)
        if name in TABLES or name.endswith(".bias") or name.startswith(norms or ("\0",))
    ]


def matching_names(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the tensors that match one of the patterns, as a shell matches file names.

    Raises:
        ValueError: a pattern matches none.
    """
    names = parameter_names(model)
    found = {pattern: [name for name in names if fnmatch.fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, matches in found.items():
        if not matches:
            raise ValueError(f"{pattern!r} matches no tensor; their names are like {names[len(names) // 2]}")
    return [name for name in names if any(name in matches for matches in found.values())]


def product_names(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Return the names of the linear layers and convolutions that get an adapter.

    Args:
        targets: ends of their names; by default all of the network's blocks: the transformer's `blocks`, or the U-Net
            without its first and last convolution and the layers of the time.

    Raises:
        ValueError: a target is no end of a name.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets or ():
        if not any(_ends_with(name, target) for name in names):
            raise ValueError(f"{target!r} is no end of a layer's name; they are like {names[len(names) // 2]}")
    if targets:
        return [name for name in names if any(_ends_with(name, target) for target in targets)]
    return [name for name in names if "blocks." in name or "block." in name]


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def matrix_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors with weight decay: matrices and kernels, no embeddings, biases or norms."""
    return [
        name
        for name, value in model.named_parameters()
        if value.requires_grad and value.dim() > 1 and not any(part in EMBEDDERS for part in name.split("."))
    ]


def merged(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights of a network with an adapter in them, changed ones in float32; both stay as they are.

    Args:
        scale: factor on B A, which is alpha / rank.

    Raises:
        ValueError: a pair is not whole, has no weight in `base`, or does not fit it.
    """
    result = dict(base)
    pairs = dict.fromkeys(name.removesuffix(DOWN).removesuffix(UP) for name in adapter if name.endswith((DOWN, UP)))
    for name in pairs:
        down, up, weight = adapter.get(name + DOWN), adapter.get(name + UP), base.get(f"{name}.weight")
        if down is None or up is None or weight is None:
            raise ValueError(f"{name}.weight, or a half of its adapter, is missing")
        if (len(up), *down.shape[1:]) != tuple(weight.shape) or up.flatten(1).shape[1] != len(down):
            raise ValueError(
                f"the adapter of {name}.weight is {list(down.shape)} and {list(up.shape)} for {list(weight.shape)}"
            )
        change = up.float().flatten(1) @ down.float().flatten(1)  # (out, in) or (out, in k k)
        result[f"{name}.weight"] = weight.float() + scale * change.view(weight.shape)
    return result | {name: value for name, value in adapter.items() if not name.endswith((DOWN, UP))}


def merged_shapes(
    base: Mapping[str, tuple[int, ...]], adapter: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that `merged` returns."""
    return {**base, **{name: shape for name, shape in adapter.items() if not name.endswith((DOWN, UP))}}


def base_digest(weights: Mapping[str, Tensor], adapter: Collection[str], names: Iterable[str]) -> str:
    """Return a short text that changes with the weights that an adapter leaves as they are.

    It is a hash of 4096 values of each, in float32, so that a copy in another file format agrees.

    Args:
        adapter: names of the adapter's tensors.
        names: of the network's tensors; others in `weights` do not count.
    """
    found = hashlib.sha256()
    for name in sorted(set(names) - set(adapter)):
        values = weights[name].detach().flatten()
        part = values[:: max(1, values.numel() // HASHED)].float().contiguous().cpu()
        found.update(name.encode() + part.numpy().tobytes())
    return found.hexdigest()[:16]


def share_text(model: nn.Module, names: Collection[str]) -> str:
    """Return how many of a network's weights a training changes, and what they take in float32."""
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    changed = sum(sizes[name] for name in names)
    whole = sum(size for name, size in sizes.items() if ".lora_" not in name)
    return f"{changed:,} of {whole:,} weights ({changed / whole:.2%}, {changed * torch.float32.itemsize / 1e6:.1f} MB)"
