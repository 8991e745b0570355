"""Forwards, decoding and training steps of XL/1 on a GPU: ours in every way, beside the published code."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights, without_values
from LightningDiT.compiling import BLOCK, KERNELS, WAYS, WHOLE, Way, compile_forward
from LightningDiT.config import load_config
from LightningDiT.device import (
    Recording,
    abilities,
    attention_by,
    attention_failure,
    autocast,
    float32_products,
    gpu_free_bytes,
)
from LightningDiT.images import to_uint8
from LightningDiT.loading import model_settings
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import TokenizerConfig, load_tokenizer_config
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from LightningDiT.training.memory import training_need

from .forward import model_flops, model_inputs, on_meta, published_settings, random_weights
from .machine import PROJECT
from .published_loop import PlainTransformer, PublishedLoop
from .rounds import Setting
from .rows import Row, Run, cold_code, measured
from .sampling import TOKENIZER
from .training import B1, COMPILED, OURS, PUBLISHED, our_step, trainer_of, write_latents

XL1 = PROJECT / "LightningDiT" / "configs" / "lightningdit_xl1_train.yaml"
GAIN = 0.5  # of random weights: activations keep their size

ALL_WAYS_BATCHES = (2, 16, 128)
GRAPHS_BATCHES = (1, 2, 16, 128, 256)
WHOLE_BATCHES = (16,)  # to compile the whole forward takes 20 to 40 s a shape
PUBLISHED_BATCHES = (16, 128)
QUICK_BATCHES = (2, 16)


def measure_gpu_forwards(setting: Setting, model_type: str = "LightningDiT-XL/1") -> dict[str, Any]:
    """Return the forwards of a preset in every way of `compiling.WAYS`, and the published model's two."""
    settings = published_settings(model_type)
    flops = model_flops(on_meta(settings), 1)
    rows = []
    with cold_code(), torch.inference_mode(False):
        weights = random_state(settings)
        for name, dtype, tf32 in (("bf16 autocast", torch.bfloat16, False), ("float32 with TF32", torch.float32, True)):
            model = plain_transformer(settings, weights, setting.device)
            for batch in QUICK_BATCHES if setting.quick else PUBLISHED_BATCHES:
                build = partial(published_forward, model, batch, dtype, tf32)
                rows.append(measured(f"published, {name}, layers compiled", batch, build, setting, batch * flops))
            del model
        network = LightningDiT(settings)
        network.load_state_dict(weights)
        network = network.to(setting.device, setting.dtype).eval().requires_grad_(False)
        ways = [way for way in WAYS if possible(way, setting.device)]
        for way in ways:
            for batch in batches_of(way, setting.quick):
                build = partial(our_forward, network, way, batch)
                rows.append(measured(f"ours, {named(way)}", batch, build, setting, batch * flops))
                for module in network.modules():
                    vars(module).pop("forward", None)  # uncovers the class's own
    left_out = [f"{named(way)}: {abilities(setting.device).no_compiler}" for way in WAYS if way not in ways]
    return {"rows": rows, "skipped": left_out}


def batches_of(way: Way, quick: bool) -> tuple[int, ...]:
    """Return the numbers of states with which a way is measured."""
    if way.compiled == WHOLE:
        return WHOLE_BATCHES
    if quick:
        return QUICK_BATCHES
    return GRAPHS_BATCHES if way.graphs else ALL_WAYS_BATCHES


def random_state(settings: LightningDiTSettings) -> dict[str, Tensor]:
    """Return random weights, and the model's own tables of positions."""
    tables = LightningDiT(replace(settings, depth=1)).state_dict()
    computed = {name: value for name, value in tables.items() if name == "pos_embed" or name.startswith("feat_rope.")}
    return random_weights(on_meta(settings)).state_dict() | computed


def possible(way: Way, device: torch.device) -> bool:
    """Return whether a device computes in this way."""
    machine = abilities(device)
    return not ((way.graphs and machine.no_graphs) or (way.compiled and machine.no_compiler))


def named(way: Way) -> str:
    """Return a way in a few words."""
    words = {"": "", BLOCK: "one block compiled", WHOLE: "whole forward compiled"}
    return " and ".join(filter(None, [words[way.compiled], "graphs" if way.graphs else ""])) or "eager"


def plain_transformer(
    settings: LightningDiTSettings, weights: dict[str, Tensor], device: torch.device
) -> PlainTransformer:
    """Return the published model in float32 with these weights."""
    model = PlainTransformer(settings)
    model.load_state_dict(weights)
    return model.to(device).eval().requires_grad_(False)


def published_forward(model: PlainTransformer, batch: int, dtype: torch.dtype, tf32: bool) -> Run:
    """Return a forward of the published model, its layers through torch.compile as released."""
    x, t, y = plain_inputs(model, batch)
    network = compiled_network(model, dtype, tf32)
    return lambda: network(x, t, y)


def plain_inputs(model: PlainTransformer, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents (N, C, h, w), one time for all (N,) and labels (N,)."""
    x, t, y = model_inputs(model, batch)
    return x, t[:1].expand(batch), y


def compiled_network(
    model: PlainTransformer, dtype: torch.dtype, tf32: bool
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the published model as a function that computes under autocast, or from TF32 inputs."""
    device = model.pos_embed.device
    blocks = [torch.compile(block) for block in model.blocks]

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with float32_products(device, tf32), autocast(device, dtype):
            return model(x, t, y, blocks)

    return network


def our_forward(network: LightningDiT, way: Way, batch: int) -> Run:
    """Return a forward of our model in this way, with the kernel of attention that a run would choose."""
    x, t, y = model_inputs(network, batch)
    inputs, kernel = (x, t[:1], y), kernel_for(network)
    if way.compiled:
        compile_forward(*(network.blocks if way.compiled == BLOCK else [network]))
    with attention_by(kernel):
        recording = Recording(network, inputs) if way.graphs else None

    def run() -> Tensor:
        if recording is not None:
            return recording(*inputs)
        with attention_by(kernel):
            return network(*inputs)

    return run


def kernel_for(network: LightningDiT) -> str | None:
    """Return the first kernel of the table that computes the attention of a network; None on the CPU."""
    settings, weight = network.settings, network.pos_embed
    shape = settings.num_heads, settings.side**2, settings.hidden_size // settings.num_heads
    works = (row.name for row in KERNELS if not attention_failure(row.name, *shape, weight.dtype, weight.device))
    return next(works, None) if abilities(weight.device).capability else None


# ---- decoding

DECODINGS = {"fp32, exact": {}, "fp32 from TF32": {"tf32": True}, "fp16": {"half": True}}
COMPILED_DECODING = "fp16"  # what runs compile


def measure_gpu_decoding(setting: Setting, config: TokenizerConfig | None = None) -> dict[str, Any]:
    """Return decodings by precision, that in fp16 compiled too, and their errors in levels of 255 against float32."""
    config = config or load_tokenizer_config(TOKENIZER)
    settings = autoencoder_settings(config)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, cold_code(), torch.inference_mode(False):
        tokenizer = VA_VAE(config, ckpt_path=lively_tokenizer(config, Path(folder)), device=setting.device)
        decoder = tokenizer.model.decoder
        side = settings.resolution // settings.downsample_factor
        for count in (4,) if setting.quick else (1, 16):
            latents = torch.randn(count, settings.embed_dim, side, side, generator=generator_for(2)).to(setting.device)
            exact = to_uint8(tokenizer.decode_latents(latents)).int()
            for name, options in DECODINGS.items():
                for compiled in (False, True):
                    left_out = setting.quick or name != COMPILED_DECODING or abilities(setting.device).no_compiler
                    if compiled and left_out:
                        continue
                    errors: list[str] = []
                    build = partial(decoding, tokenizer, latents, options, compiled, exact, errors)
                    row = measured(f"{name}{', compiled' if compiled else ''}", count, build, setting)
                    rows.append(row if row.note else replace(row, note=errors[0]))
                    vars(decoder).pop("forward", None)
    return {"rows": rows, "skipped": []}


def decoding(
    tokenizer: VA_VAE, latents: Tensor, options: dict[str, bool], compiled: bool, exact: Tensor, errors: list[str]
) -> Run:
    """Return the decoding of latents with options of `decode_latents`.

    Args:
        exact: the pixels in float32.
        errors: takes the difference from them.
    """
    if compiled:
        compile_forward(tokenizer.model.decoder)
    error = (to_uint8(tokenizer.decode_latents(latents, **options)).int() - exact).abs()
    errors.append(f"{error.float().mean():.3f} levels, {int(error.max())} at most")
    return lambda: tokenizer.decode_latents(latents, **options)


def lively_tokenizer(config: TokenizerConfig, folder: Path) -> Path:
    """Write a tokenizer with random weights under which activations neither grow nor shrink, and return the file."""
    with without_values():
        model = AutoencoderKL(autoencoder_settings(config))
    generator = generator_for(0)

    def drawn(name: str, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            return values * GAIN / math.sqrt(math.prod(shape[1:]))
        return 0.02 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)

    path = folder / "tokenizer.safetensors"
    save_weights({name: drawn(name, value.shape) for name, value in model.state_dict().items()}, path)
    return path


# ---- training


@dataclass(frozen=True)
class TrainingPlan:
    """Steps of one model; without a batch it is the largest power of two that fits."""

    name: str
    config: Path
    batch: int | None = None


TRAININGS = (TrainingPlan("XL/1", XL1), TrainingPlan("B/1", B1, 8))
QUICK_TRAININGS = (TrainingPlan("B/1", B1, 8),)
LARGEST_BATCH = 128
LOOPS = (f"{OURS}, compiled", COMPILED)  # as both train on a GPU


def measure_gpu_training(setting: Setting, plans: Sequence[TrainingPlan] | None = None) -> dict[str, Any]:
    """Return steps of our training and of the published one, each with the memory for itself."""
    rows: list[Row] = []
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(setting.dtype, "fp32")
    with tempfile.TemporaryDirectory() as name, cold_code(), torch.inference_mode(False):
        for plan in plans or (QUICK_TRAININGS if setting.quick else TRAININGS):
            batch = plan.batch or filling_batch(plan, setting)
            config = write_latents(load_config(plan.config), Path(name) / plan.config.stem, batch, precision)
            for loop in (OURS, PUBLISHED) if abilities(setting.device).no_compiler else LOOPS:
                build = partial(training_steps, config, loop)
                rows.append(measured(f"{plan.name}, {precision}: {loop}", batch, build, setting, trains=True))
    return {"rows": rows, "skipped": []}


def filling_batch(plan: TrainingPlan, setting: Setting) -> int:
    """Return the largest power of two that the memory holds by `training_need`."""
    need = training_need(model_settings(load_config(plan.config)), setting.dtype, setting.device.type != "cpu")
    free = gpu_free_bytes(setting.device) or 0
    sizes = [2**power for power in range(int(math.log2(LARGEST_BATCH)) + 1)]
    return max((size for size in sizes if need.peak(size) <= free), default=1)


def training_steps(config: Any, loop: str) -> Run:
    """Return a function that takes one step of a loop after another."""
    wish = "on" if loop == f"{OURS}, compiled" else "off"
    trainer = trainer_of(replace(config, train=replace(config.train, compile=wish)))
    if loop.startswith(OURS):
        return partial(_next_step, trainer, [0])
    published = PublishedLoop(trainer)
    batch = trainer.data.make(0)
    blocks = published.compiled_blocks() if loop == COMPILED else None
    return lambda: published.step(batch, blocks)


def _next_step(trainer: Any, step: list[int]) -> None:
    our_step(trainer, step[0])
    step[0] += 1
