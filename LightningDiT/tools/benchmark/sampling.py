"""Seconds of decoding, of images by the published and by the fast procedure, and their growth."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights, without_values
from LightningDiT.config import SampleConfig
from LightningDiT.images import to_uint8
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.sampling.solver_choice import FAST
from LightningDiT.seeds import generator_for
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import TokenizerConfig, load_tokenizer_config
from LightningDiT.tokenizer.vavae import VA_VAE, autoencoder_settings
from LightningDiT.transport import draw_noise, integrate_ode, time_grid

from .counting import product_flops
from .forward import random_weights
from .machine import PROJECT
from .rounds import Case, Setting, measure

TOKENIZER = PROJECT / "LightningDiT" / "tokenizer" / "configs" / "vavae_f16d32.yaml"
BUNDLED = PROJECT / "models" / "fashion-mnist"
PUBLISHED_EVALUATIONS = 249
PUBLISHED_NAME = f"published procedure: {PUBLISHED_EVALUATIONS} Euler steps, both halves at each"
FAST_NAME = "fast"
COUNT, QUICK_COUNT = 40, 8  # images of the comparison
GROWTH = {  # what grows -> its sizes, in full and with --quick
    "batch": ((1, 2, 4, 8, 16, 32), (1, 4, 16)),
    "evaluations": ((10, 20, 40, 80), (5, 20)),
    "images": ((8, 16, 32, 64), (8, 32)),
}
GROWTH_EVALUATIONS, GROWTH_BATCH = 10, 8  # what does not grow


def decode_cases(config: TokenizerConfig, counts: Sequence[int], setting: Setting) -> list[Case]:
    """Return the decoding of `counts` latents by a tokenizer with random weights, as the library does it."""
    settings = autoencoder_settings(config)
    with without_values():
        model = AutoencoderKL(settings)
    side = settings.resolution // settings.downsample_factor
    shape = (settings.embed_dim, side, side)
    flops = product_flops(lambda: model.decode(torch.empty(1, *shape, device="meta")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.safetensors"
        save_weights(random_weights(model).state_dict(), path)
        tokenizer = VA_VAE(config, ckpt_path=path, device=setting.device)
    size = settings.resolution

    def decode(count: int) -> Case:
        latents = torch.randn(count, *shape, generator=generator_for(2)).to(setting.device)
        name = f"decoding {count} at {size}x{size}"
        return Case(name, lambda: tokenizer.decode_latents(latents), flops=count * flops, units=count)

    return [decode(count) for count in counts]


def measure_decoding(setting: Setting) -> dict[str, Any]:
    """Return the seconds of decoding by VA-VAE f16d32, which is in float32 on every device."""
    cases = decode_cases(load_tokenizer_config(TOKENIZER), (1,) if setting.quick else (1, 4), setting)
    return {"results": measure(cases, 2 if setting.quick else 5, setting.device)}


@torch.inference_mode()
def published_procedure(
    pipe: LightningDiTPipeline,
    sample: SampleConfig,
    noise: Tensor,
    labels: Sequence[int],
    network: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the final latents of Euler with 250 points and both halves of guidance at each, wanted or not.

    Args:
        network: computes in place of the pipeline's transformer.
    """
    network = network or pipe.transformer
    conditional = torch.tensor(labels, device=pipe.device)
    y = torch.cat([conditional, torch.full_like(conditional, pipe.transformer.null_class)])
    settings = pipe.guided(labels, sample).settings
    channels = noise.shape[1] if settings.guided_channels == "all" else settings.guided_channels

    def both_halves(x: Tensor, t: Tensor) -> Tensor:
        cond, null = network(torch.cat([x, x]), torch.cat([t, t]).to(x.device), y).float().chunk(2)
        if not settings.acts_at(t):
            return cond
        mixed = null + settings.cfg_scale * (cond - null)
        return torch.cat([mixed[:, :channels], cond[:, channels:]], dim=1)

    times = time_grid(PUBLISHED_EVALUATIONS + 1, timestep_shift=sample.timestep_shift)
    return integrate_ode(both_halves, noise, times, "euler")


def image_cases(pipe: LightningDiTPipeline, count: int) -> list[Case]:
    """Return the two procedures from the same noise to pixels, `count` images at once."""
    labels = [index % pipe.config.data.num_classes for index in range(count)]
    noise = draw_noise((count, *pipe.latent_shape), [generator_for(0, index) for index in range(count)])

    def published() -> Tensor:
        latents = published_procedure(pipe, pipe.config.sample, noise.to(pipe.device), labels)
        return to_uint8(pipe.tokenizer.decode(latents)).cpu()

    return [
        Case(PUBLISHED_NAME, published, units=count),
        Case(FAST_NAME, lambda: pipe(labels, latents=noise, batch_size=count, output_type="np"), units=count),
    ]


def measure_images(setting: Setting) -> dict[str, Any]:
    """Return the seconds of the bundled model's images by both procedures, in interleaved rounds."""
    pipe = LightningDiTPipeline.from_pretrained(BUNDLED, setting.device)
    assert pipe.config.sample.sampling_method == FAST
    cases = image_cases(pipe, QUICK_COUNT if setting.quick else COUNT)
    return {"results": measure(cases, 1 if setting.quick else 3, setting.device)[2:]}


def growth_cases(pipe: LightningDiTPipeline, what: str, sizes: Sequence[int]) -> list[Case]:
    """Return samplings of latents in which one of `GROWTH` grows and the others stay."""

    def case(size: int) -> Case:
        sizes = {"batch": GROWTH_BATCH, "evaluations": GROWTH_EVALUATIONS, "images": GROWTH_BATCH, what: size}
        count = size if what == "batch" else sizes["images"]
        labels = [index % pipe.config.data.num_classes for index in range(count)]

        def run() -> object:
            points = sizes["evaluations"] + 1
            return pipe(labels, num_inference_steps=points, batch_size=sizes["batch"], output_type="latent")

        return Case(f"{what} {size}", run, units=size)

    return [case(size) for size in sizes]


def measure_growth(setting: Setting) -> dict[str, Any]:
    """Return the seconds of sampling the bundled model against batch, evaluations and image count."""
    pipe = LightningDiTPipeline.from_pretrained(BUNDLED, setting.device)
    growing = {what: sizes[setting.quick] for what, sizes in GROWTH.items()}
    cases = {what: growth_cases(pipe, what, sizes) for what, sizes in growing.items()}
    rounds = 1 if setting.quick else 3
    return {what: measure(listed, rounds, setting.device)[2:] for what, listed in cases.items()}
