"""Operators by kind, the operations of matrix products, and the bytes that all other operators move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

#: Words in the names of torch's operators by kind; the first row that fits counts, by default `OTHERS`.
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


def product_flops(call: Callable[[], object]) -> int:
    """Return the floating-point operations of all matrix products in `call`; a multiplication and addition are two.

    Call modules on the meta device: nothing is computed there, and every product is one of torch's own operators
    (torch's counter does not know oneDNN's linear layer).
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class _MovedBytes(TorchDispatchMode):
    """Adds up the bytes that operators read and write, without views and matrix products."""

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
    """Return the bytes of the tensors among `values`; an expanded dimension counts once."""
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

    This is a lower bound: an operator may pass over its inputs several times.
    """
    with torch.no_grad(), _MovedBytes() as counter:
        call()
    return counter.total
