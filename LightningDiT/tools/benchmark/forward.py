"""Seconds of a forward of the transformer, and their parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from LightningDiT.checkpoint import without_values
from LightningDiT.device import gpu_free_bytes
from LightningDiT.models.layers import Attention, attend
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings, preset_settings
from LightningDiT.seeds import generator_for

from .counting import KINDS, OTHERS, kind_of, moved_bytes, product_flops
from .machine import free_memory_bytes, lack_of
from .rounds import Case, Setting, measure, triad_case

LATENT_SHAPE = (32, 16, 16)  # of a 256x256 image
PUBLISHED_FLAGS = {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True}
WEIGHT_STD = 0.02  # any weights but zeros, which some kernels skip
PROFILED_RUNS = 3
GIGA = 10**9
WORK_SPACE = GIGA  # bytes needed beside the weights


def published_settings(model_type: str) -> LightningDiTSettings:
    """Return the settings of a preset with the published flags, for 256x256 images."""
    return preset_settings(model_type, input_size=LATENT_SHAPE[1], in_channels=LATENT_SHAPE[0], **PUBLISHED_FLAGS)


def on_meta(settings: LightningDiTSettings) -> LightningDiT:
    """Return the model on the meta device, without values."""
    with without_values():
        return LightningDiT(settings).to("meta")  # with its tables of positions


def model_flops(model: LightningDiT, batch: int) -> int:
    """Return the operations of one forward of `model` (meta device) on `batch` latents."""
    return product_flops(lambda: model(*model_inputs(model, batch)))


def model_inputs(model: LightningDiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents (N, C, h, w), times (N,) and labels (N,) on the device of `model`."""
    settings, device = model.settings, model.pos_embed.device
    shape = (batch, settings.in_channels, settings.input_size, settings.input_size)
    latents = torch.randn(shape, generator=generator_for(0, batch)).to(device)
    labels = torch.arange(batch, device=device) % settings.num_classes
    return latents, torch.linspace(0.1, 0.9, batch, device=device), labels


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a module from the meta device with small random values, in eval mode on the CPU."""
    module = module.to_empty(device="cpu").eval().requires_grad_(False)
    generator = generator_for(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.normal_(0.0, WEIGHT_STD, generator=generator)
    return module


def room_for(settings: LightningDiTSettings, setting: Setting) -> str | None:
    """Return why a model with random weights has no room, or None."""
    parameters = sum(tensor.numel() for tensor in on_meta(settings).parameters())
    needed = {"main memory": (4 * parameters + WORK_SPACE, free_memory_bytes())}  # the weights are drawn in float32
    on_device = setting.dtype.itemsize * parameters + WORK_SPACE
    return lack_of(needed | {"the GPU's memory": (on_device, gpu_free_bytes(setting.device))})


def forward_cases(settings: LightningDiTSettings, name: str, batches: Sequence[int], setting: Setting) -> list[Case]:
    """Return forwards of a model with random weights, one for each batch."""
    model = on_meta(settings)
    flops = {batch: model_flops(model, batch) for batch in batches}
    model = random_weights(model).to(setting.device, setting.dtype)

    def forward(batch: int) -> Case:
        inputs = model_inputs(model, batch)
        return Case(f"{name} forward, batch {batch}", lambda: model(*inputs), flops=flops[batch], units=batch)

    return [forward(batch) for batch in batches]


@dataclass(frozen=True)
class Plan:
    """The forwards of one model: batches and rounds, in full and with --quick (no batches: skipped)."""

    model_type: str
    batches: tuple[int, ...]
    rounds: int
    quick_batches: tuple[int, ...]
    quick_rounds: int


PLANS = (Plan("B/1", (1, 2, 8), 7, (1, 2), 2), Plan("XL/1", (1, 2, 8), 3, (), 0))


def measure_forwards(setting: Setting, plans: Sequence[Plan] = PLANS) -> dict[str, Any]:
    """Return the results of every plan, and why others are skipped."""
    results, skipped = [], []
    for plan in plans:
        batches, rounds = (plan.quick_batches, plan.quick_rounds) if setting.quick else (plan.batches, plan.rounds)
        settings = published_settings(plan.model_type)
        if reason := "not with --quick" if not batches else room_for(settings, setting):
            skipped.append(f"{plan.model_type}: {reason}")
            continue
        cases = forward_cases(settings, plan.model_type, batches, setting)
        results.append(measure(cases, rounds, setting.device, setting.dtype))
    return {"groups": results, "skipped": skipped}


@dataclass(frozen=True)
class Product:
    """The same layer of all blocks.

    Attributes:
        name: of the layer within its block.
        shape: of its input, (N, ...).
        paths: names of the layers within the model, one a block.
    """

    name: str
    shape: torch.Size
    paths: tuple[str, ...]

    def run(self, model: LightningDiT, x: Tensor) -> Callable[[], object]:
        """Return a function that computes these layers of `model` one after another on the same input, `shape`."""
        layers = [model.get_submodule(path) for path in self.paths]
        if not isinstance(layers[0], Attention):
            return lambda: [layer(x) for layer in layers]
        rows = x.repeat(1, 1, 3).unflatten(-1, (3, layers[0].heads, -1))  # (N, T, 3, heads, head width)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, head width) each
        return lambda: [attend(q, k, v) for _ in layers]

    def flops(self, model: LightningDiT) -> int:
        """Return the operations of all these layers of `model` (meta device)."""
        return product_flops(self.run(model, torch.empty(self.shape, device="meta")))


def products_of(settings: LightningDiTSettings, batch: int) -> list[Product]:
    """Return the matrix products of one forward, layers of all blocks together."""
    found: dict[str, Product] = {}
    model = on_meta(settings)
    paths = {layer: path for path, layer in model.named_modules()}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        path = paths[layer]
        name = "attention" if isinstance(layer, Attention) else re.sub(r"^blocks\.\d+\.", "", path)
        known = found.get(name, Product(name, inputs[0].shape, ()))
        found[name] = replace(known, paths=(*known.paths, path))

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | Attention):
            layer.register_forward_hook(note)
    with torch.inference_mode():
        model(*model_inputs(model, batch))
    return list(found.values())


def measure_profile(
    setting: Setting, settings: LightningDiTSettings | None = None, name: str = "B/1", batch: int = 2
) -> dict[str, Any]:
    """Return the parts of one forward: its products by themselves, torch's profile, and bytes moved."""
    wanted = settings or published_settings(name)
    forward = forward_cases(wanted, name, (batch,), setting)[0]
    skeleton = on_meta(wanted)
    model = random_weights(on_meta(wanted)).to(setting.device, setting.dtype)
    inputs = model_inputs(model, batch)

    def by_itself(product: Product) -> Case:
        x = torch.randn(product.shape, generator=generator_for(3)).to(setting.device, setting.dtype)
        return Case(product.name, product.run(model, x), flops=product.flops(skeleton))

    alone = [by_itself(product) for product in products_of(wanted, batch)]
    activation = batch * wanted.side**2 * wanted.hidden_size
    small = triad_case(setting.device, activation, f"triad of one activation ({activation:,} values)")
    results = measure([forward, *alone, small], 2 if setting.quick else 7, setting.device, setting.dtype)
    return {
        "forward": results[2],
        "product": results[0],
        "triad": results[1],
        "small_triad": results[-1],
        "alone": results[3:-1],
        "kinds": profile_shares(lambda: model(*inputs), setting.device),
        "moved": moved_bytes(lambda: model(*inputs)),
        "weights": sum(tensor.nbytes for tensor in model.parameters()),
    }


def profile_shares(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the share of each kind of operator in the time of `call`, by torch.profiler."""
    with torch.inference_mode():
        call()
        with torch.profiler.profile() as profiler:
            for _ in range(PROFILED_RUNS):
                call()
    times = dict.fromkeys((*KINDS, OTHERS), 0.0)
    for event in profiler.key_averages():
        if "::" in event.key:  # kernels of a GPU are listed once more under their own names
            times[kind_of(event.key)] += _own_time(event, device)
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


def _own_time(event: Any, device: torch.device) -> float:
    if device.type == "cpu":
        return event.self_cpu_time_total
    older = f"self_{device.type}_time_total"  # torch before 2.4
    return event.self_device_time_total if hasattr(event, "self_device_time_total") else getattr(event, older)


def summary(part: dict[str, Any]) -> dict[str, float]:
    """Return totals of the figures of `measure_profile`.

    Returns:
        alone: seconds of all products by themselves; bound: the share of the square product's rate that the forward
        would reach with them alone; rest: seconds of everything else; in_memory, in_cache: seconds that the bytes
        moved by the rest take at the rates of the two triads.
    """
    forward, product, moved = part["forward"], part["product"], part["moved"]
    alone = sum(result.seconds for result in part["alone"])
    return {
        "alone": alone,
        "bound": (forward.flops / alone) / (product.flops / product.seconds),
        "rest": max(0.0, forward.seconds - alone),
        "in_memory": moved / GIGA / part["triad"].gbytes,
        "in_cache": moved / GIGA / part["small_triad"].gbytes,
    }
