"""The first layer with a value that is not finite, in networks whose values are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from LightningDiT.sampling.non_finite import all_finite, first_not_finite


class Chain(nn.Module):
    """x times each of the factors, layer after layer; the square root between the last two."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(1, 1, bias=False)) for _ in factors)
        for layer, factor in zip(self.layers, factors, strict=True):
            nn.init.constant_(layer[0].weight, factor)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.layers[-1](x.sqrt())


def first_in(network: Chain, times: tuple[float, ...] = (0.25,)) -> str | None:
    def replay() -> None:
        for time in times:
            network(torch.ones(1, 1), torch.tensor([time]))

    with torch.no_grad():
        return first_not_finite({"": network}, replay)


def test_the_innermost_layer_that_overflows_is_named() -> None:
    assert first_in(Chain(1.0, 1e30, 1e30, 1.0)) == "the output of layers.2.0 at t = 0.25"


def test_what_lies_between_layers_is_named_by_the_input_that_it_gives() -> None:
    assert first_in(Chain(-1.0, 1.0)) == "the input of layers.1.0 at t = 0.25"  # the root of -1


def test_finite_values_are_none() -> None:
    assert first_in(Chain(1.0, 1e30, 1.0)) is None


def test_the_replay_ends_at_the_first_value_and_no_hook_stays() -> None:
    network, calls = Chain(1e30, 1e30, 1.0), []
    network.register_forward_pre_hook(lambda module, inputs: calls.append(float(inputs[1])))
    assert first_in(network, (0.5, 0.75)) == "the output of layers.1.0 at t = 0.5"
    assert calls == [0.5]
    assert not any(module._forward_hooks for module in network.modules())
    assert len(network._forward_pre_hooks) == 1


def test_each_network_has_its_prefix_and_its_time() -> None:
    good, bad = Chain(1.0, 1.0), Chain(1.0, float("inf"))

    def replay() -> None:
        for time in (0.0, 0.5):
            good(torch.ones(1, 1), torch.tensor([time]))
        bad(torch.ones(1, 1), torch.tensor([0.5]))

    assert first_not_finite({"": good, "guide.": bad}, replay) == "the output of guide.layers.1.0 at t = 0.5"


def test_an_error_of_the_replay_passes_and_leaves_no_hook() -> None:
    network = Chain(1.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        first_not_finite({"": network}, lambda: 1 / 0)
    assert not any(module._forward_hooks for module in network.modules())


def test_all_finite_looks_into_tuples_and_past_what_is_no_number() -> None:
    assert all_finite((torch.ones(2), None, torch.tensor([3])))
    assert not all_finite((torch.ones(2), torch.tensor([1.0, float("nan")])))
    assert not all_finite(torch.tensor(float("-inf")))
