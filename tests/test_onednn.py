"""Linear layers by oneDNN, and their gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from LightningDiT.models.layers import Linear
from LightningDiT.models.onednn import ONEDNN_LINEAR


@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (2, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients_are_those_of_double_precision(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = Linear(24, 40, bias=bias), torch.randn(shape, requires_grad=True)
    plain, wide = torch.nn.Linear(24, 40, bias=bias).double(), x.detach().double().requires_grad_()
    plain.load_state_dict(linear.state_dict())
    wanted = plain(wide)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x), wanted.float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(linear(x), wanted.float(), atol=1e-6, rtol=1e-6)
    weights = torch.randn(wanted.shape)
    found = torch.autograd.grad((linear(x) * weights).sum(), [x, *linear.parameters()])
    expected = torch.autograd.grad((wanted * weights.double()).sum(), [wide, *plain.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=1e-5)


def test_only_the_gradients_that_are_asked_for_are_computed() -> None:
    linear, x = Linear(24, 40).requires_grad_(False), torch.randn(2, 24, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(2, 24), atol=1e-5, rtol=1e-5)
    assert linear.weight.grad is None


@pytest.mark.skipif(ONEDNN_LINEAR is None, reason="this torch or processor has no oneDNN linear layer to choose")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_takes_onednn_in_float32_alone(dtype: torch.dtype) -> None:
    linear, x = Linear(24, 40), torch.randn(2, 24)
    context = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with context, torch.profiler.profile() as kept:
        out = linear(x)
    assert out.dtype == dtype
    assert ("mkldnn::_linear_pointwise" in {event.key for event in kept.key_averages()}) == (dtype == torch.float32)
