"""What a forward does, counted: operations of its matrix products, and bytes that everything else moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from LightningDiT.models.layers import Attention
from LightningDiT.tokenizer.autoencoder import AttnBlock

#: Words in the names of torch's operators by what they do; the first row that fits counts, and `OTHERS` else.
KINDS = {
    "attention": ("scaled_dot_product", "softmax", "bmm", "flash_attention", "efficient_attention"),
    "matrix products": ("addmm", "::mm", "linear", "conv", "gemm"),
    "copies and layout": ("copy", "::cat", "::stack", "clone", "contiguous", "::to", "reorder"),
}
OTHERS = "element-wise and norms"
PRODUCTS = ("attention", "matrix products")


def kind_of(operator: str) -> str:
    """Return the row of `KINDS` that an operator such as `aten::addmm` belongs to."""
    return next((kind for kind, words in KINDS.items() if any(word in operator for word in words)), OTHERS)


def product_flops(module: nn.Module, call: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products that `call` makes inside `module`.

    A multiplication and its addition count as two. Linear layers, convolutions and the two products of each
    attention are counted from the shapes that they meet, so a linear layer that sees one vector an image
    counts less than one that sees all tokens. Put the module on the meta device and nothing is computed.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += layer_flops(layer, inputs[0].shape, output.numel())

    counted = (nn.Linear, nn.Conv2d, Attention, AttnBlock)
    hooks = [layer.register_forward_hook(count) for layer in module.modules() if isinstance(layer, counted)]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def layer_flops(layer: nn.Module, shape: torch.Size, outputs: int) -> int:
    """Return the operations of one layer without those of the layers inside it.

    Args:
        shape: of its input: (..., features) of a linear layer, (N, C, H, W) of a convolution or of the decoder's
            attention, (N, T, width) of the transformer's.
        outputs: values that it gives.
    """
    if isinstance(layer, nn.Linear):
        return 2 * outputs * layer.in_features
    if isinstance(layer, nn.Conv2d):
        return 2 * outputs * layer.weight[0].numel()
    tokens = shape[1] if isinstance(layer, Attention) else shape[2] * shape[3]  # there a token a pixel
    return 4 * shape.numel() * tokens  # q k^T, then times v


class _MovedBytes(TorchDispatchMode):
    """Adds up what each operator but views and matrix products reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        given = options or {}
        result = function(*arguments, **given)
        makes_view = any(value.alias_info and not value.alias_info.is_write for value in function._schema.returns)
        allocates = "empty" in function.name()
        if not makes_view and not allocates and kind_of(function.name()) not in PRODUCTS:
            self.total += tensor_bytes(tree_leaves((arguments, given))) + tensor_bytes(tree_leaves(result))
        return result


def tensor_bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the tensors among `values`; a dimension along which one is repeated counts once."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(
        tensor.element_size()
        * torch.Size(
            1 if not stride else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ).numel()
        for tensor in tensors
    )


def moved_bytes(call: Callable[[], object]) -> int:
    """Return the bytes that `call` reads and writes outside matrix products: each operator's inputs and outputs, once.

    What an operator is made of inside (a norm in several passes) is not seen, so this is the least that it moves.
    """
    with torch.no_grad(), _MovedBytes() as counter:
        call()
    return counter.total
