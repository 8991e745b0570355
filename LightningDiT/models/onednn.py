"""oneDNN's linear layer: torch's private operator, and the gradient that it lacks."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IS_COMPILING = getattr(torch.compiler, "is_compiling", None)  # torch before 2.3 has none
#: oneDNN's linear layer. None if this torch has none, or cannot tell whether it compiles (inductor refuses the
#: operator) or, before 2.4, whether autocast casts a CPU's products.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
KNOWS_ITS_STATE = IS_COMPILING is not None and hasattr(torch.amp, "is_autocast_available")
ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if HAS_ONEDNN and KNOWS_ITS_STATE else None


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Tell whether a linear layer of these tensors computes by oneDNN."""
    if ONEDNN_LINEAR is None or IS_COMPILING() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b (..., out) for x (..., in), W (out, in) and b (out,), with gradients if they are enabled."""
    return (OneDnnLinear.apply if torch.is_grad_enabled() else onednn_product)(x, weight, bias)


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b without a gradient; none of the tensors needs to be contiguous."""
    return ONEDNN_LINEAR(x, weight, bias, "none", [], "")


class OneDnnLinear(torch.autograd.Function):
    """`onednn_product` with the backward pass that oneDNN's operator lacks, its products by oneDNN too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)  # (..., out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)  # (M, out), (M, in)
        products = (
            lambda: onednn_product(grad, weight.t()),  # (..., in)
            lambda: onednn_product(rows.t(), inputs.t()),  # (out, in)
            lambda: rows.sum(0),  # (out,)
        )
        return tuple(make() if needed else None for make, needed in zip(products, ctx.needs_input_grad, strict=True))
