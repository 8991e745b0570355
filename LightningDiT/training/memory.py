"""How much memory a training step takes, computed from the model's sizes.

    peak(b) = framework + parameters x 16 + half copies + max(activations(b), gradients)
    peak(b) = framework + parameters x 16 + half copies + activations(b) + gradients     with several micro-batches

parameters x 16   bytes: weights, Adam's two moments and the average, 4 each.
gradients         4 bytes a parameter. They arise while the activations are freed, so both exist whole at once only
                  if a micro-batch adds to the gradients of the one before.
half copies       2 bytes a weight of the linear layers in bf16 and fp16, which autocast keeps for the backward pass.
activations(b)    b x (depth x block + rest + block): what autograd keeps for one sample, in bytes, and the gradients of
                  one layer's tensors, which exist for a while. Block and rest are counted, not estimated: models of
                  one and of two layers, at the real width, run on the CPU, and every tensor that autograd keeps counts
                  once. With activation checkpointing, each layer keeps its input alone, and one layer at a time is
                  computed again: b x (depth x input + block + rest + block).
framework         the interpreter and torch, and for a U-Net diffusers; on a GPU the driver's context.

`python -m LightningDiT.tools.training_memory --config C --measure 1 4` compares it with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import without_values
from LightningDiT.device import autocast
from LightningDiT.loading import Network, NetworkSettings, make_model
from LightningDiT.models.lightningdit import LightningDiTSettings
from LightningDiT.sampling.memory_model import package_bytes

FLOAT32, HALF = 4, 2
STATE_BYTES = 4 * FLOAT32  # a parameter: weight, two moments, average
FRAMEWORK_BYTES = 720_000_000  # resident size on a CPU with a tiny model: docs/training.md
GPU_CONTEXT_BYTES = 1_000_000_000  # an allowance for the driver and libraries, as in sampling


@dataclass(frozen=True)
class TrainingNeed:
    """Bytes that a training step takes, by the terms of the module's formula."""

    framework: int
    parameters: int  # a number, not bytes
    half_copies: int
    activations: int  # of one sample

    @property
    def state(self) -> int:
        """Bytes of weights, moments and average."""
        return self.parameters * STATE_BYTES

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return self.parameters * FLOAT32

    def peak(self, batch: int, accumulates: bool = False) -> int:
        """Return the bytes at the worst moment of a step with `batch` samples at a time."""
        activations = batch * self.activations
        working = activations + self.gradients if accumulates else max(activations, self.gradients)
        return self.framework + self.state + self.half_copies + working

    def largest_batch(self, memory: float, accumulates: bool = True) -> int:
        """Return the most samples at a time that fit into `memory` (bytes); 0 if not even one does."""
        gradients = self.gradients if accumulates else 0
        room = int(memory) - self.framework - self.state - self.half_copies
        return max(0, (room - gradients) // self.activations) if room >= self.gradients else 0


def training_need(settings: NetworkSettings, dtype: torch.dtype, on_gpu: bool) -> TrainingNeed:
    """Return what it takes to train a model of these settings with matrix products in `dtype`."""
    with without_values():
        model = make_model(settings)
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return TrainingNeed(
        framework=GPU_CONTEXT_BYTES if on_gpu else FRAMEWORK_BYTES + package_bytes(settings),
        parameters=sum(value.numel() for value in model.parameters()),
        half_copies=0 if dtype == torch.float32 else HALF * sum(linear),
        activations=activation_bytes(settings, dtype),
    )


def activation_bytes(settings: NetworkSettings, dtype: torch.dtype) -> int:
    """Return the bytes of one sample's activations, and of the gradients that exist with them."""
    if not isinstance(settings, LightningDiTSettings):
        return kept_bytes(settings, dtype) + settings.working_values * FLOAT32
    one, two = (kept_bytes(replace(settings, depth=depth, use_checkpoint=False), dtype) for depth in (1, 2))
    block, rest = two - one, one - (two - one)
    kept = settings.depth * block
    if settings.use_checkpoint:
        kept = settings.depth * settings.side**2 * settings.hidden_size * FLOAT32 + block
    return kept + rest + block


def kept_bytes(settings: NetworkSettings, dtype: torch.dtype) -> int:
    """Return the bytes that autograd keeps for the backward pass of each further sample.

    The difference between two samples and one leaves out what does not grow with the batch, such as autocast's copies
    of the weights.
    """
    with torch.random.fork_rng():
        model = make_model(settings, class_dropout_prob=0.0)
    one, two = (_kept_with_batch(model, batch, dtype) for batch in (1, 2))
    return two - one


def _kept_with_batch(model: Network, batch: int, dtype: torch.dtype) -> int:
    storages: dict[int, int] = {}
    held: list[Tensor] = []  # else the address of a freed tensor could be that of a later one

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    side = model.settings.input_size
    states = torch.zeros(batch, model.settings.in_channels, side, side)
    half = torch.bfloat16 if dtype != torch.float32 else torch.float32  # as many bytes as fp16, and on every CPU
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast(torch.device("cpu"), half):
        model(states, torch.zeros(batch), no_labels(model, batch))
    return sum(storages.values())


def no_labels(model: Network, batch: int) -> Tensor:
    """Return zeros in the shape of a network's labels, (batch,) or with conditions (batch, 2)."""
    return torch.zeros((batch, 2) if model.settings.num_conditions else (batch,), dtype=torch.long)
