"""How much memory sampling takes, from the shapes of its tensors.

    peak(batch) = framework + weights + loading + max(batch x step, min(batch, chunk) x decode)

framework   memory of a process before any weight is read: the interpreter, torch and its libraries; on a GPU the
            driver's context
weights     transformer: parameters x bytes per value of the chosen precision, twice with a guide of the same shape;
            tokenizer: parameters x 4 (it stays in float32)
loading     converted weights are read from the file in portions, one at a time; allocators keep about as much of the
            freed ones
step        of one image: guidance computes 2 rows; in half precision the inputs of matrix products are half, the
            tokens, norms and sums float32. On a GPU 2.5 times that: a step that is recorded as a graph is computed once
            before, and the steps with and without guidance have memory of their own
decode      of one image; the tokenizer decodes at most `chunk` images at once, whatever the batch size

Step and decode are bounded by all tensors that the largest block makes, as if none were freed before the block ends:
allocators (glibc's heap, torch's cache) keep freed blocks of that size. Measured by `python -m studies.measure_memory`;
the table is in docs/memory.md.

Nothing here needs torch to be imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from LightningDiT.config import Config
    from LightningDiT.loading import NetworkSettings
    from LightningDiT.models.lightningdit import LightningDiTSettings
    from LightningDiT.tokenizer.autoencoder import AutoencoderSettings

FLOAT32, HALF = 4, 2  # bytes of a value
MIXED = 3  # average bytes of a value of a step in half precision
GPU_STEPS = 2.5  # a warm-up, a recording of guided states, and one of half as many states
LARGEST_GPU_BATCH = 256  # images; twice as many states, with guidance, fill the largest GPUs
GPU_SHARE = 0.85  # of a GPU's memory; the rest is for work space of its libraries and for blocks that cannot be joined
ROWS_PER_IMAGE = 2  # guidance computes each state with its class and without one
# Tensors of tokens x width that one transformer block makes: norm, modulated, q, k, v, for q and k each the cosine
# product, the turned copy and the rotated result, the attention's output, its joined heads, their projection, the sum
# with x; again norm, modulated, the MLP's output and the sum.
BLOCK_TENSORS = 19
SWIGLU_TENSORS = 4  # of tokens x hidden width: two of w12, silu of the gate, its product with the value
PLAIN_MLP_TENSORS = 2  # fc1 and GELU
RESIDUAL_MAPS = 8  # of a residual block of the decoder: the input, twice norm, SiLU and convolution, the sum
# Bytes of a position of all these maps. In the fp16 decoder norms and SiLU are float32; the other maps, and a copy for
# each convolution, are fp16.
DECODER_BYTES = {FLOAT32: RESIDUAL_MAPS * FLOAT32, HALF: 4 * FLOAT32 + 6 * HALF}
FRAMEWORK_BYTES = 700_000_000  # docs/memory.md, row "framework" (about 600 MB), and libraries of the first computation
DIFFUSERS_BYTES = 180_000_000  # what a U-Net's package adds: measured 0.06 to 0.16 GiB by tools/training_memory
GPU_CONTEXT_BYTES = 1_000_000_000  # an allowance, not measured: driver, cuBLAS and cuDNN beside torch's tensors


@dataclass(frozen=True)
class Need:
    """Bytes that sampling takes, by the terms of the module's formula."""

    framework: int
    weights: int
    loading: int
    step: int
    decode: int
    chunk: int

    def peak(self, batch: int) -> int:
        """Return the resident bytes at the worst moment of sampling with this batch size."""
        working = max(batch * self.step, min(batch, self.chunk) * self.decode)
        return self.framework + self.weights + self.loading + working

    def largest_batch(self, memory: float, at_most: int) -> int:
        """Return the largest batch size that fits `memory` (bytes), from 1 to `at_most`; 1 if none does."""
        room = int(memory) - self.framework - self.weights - self.loading
        batch = min(at_most, room // self.step)
        if room < min(batch, self.chunk) * self.decode:
            batch = room // self.decode
        return max(1, batch)


def block_bytes(settings: LightningDiTSettings, rows: int, value_bytes: int) -> int:
    """Return the bytes of the tensors that one transformer block makes of `rows` latents."""
    hidden = int(settings.hidden_size * settings.mlp_ratio)
    inner = SWIGLU_TENSORS * int(2 / 3 * hidden) if settings.use_swiglu else PLAIN_MLP_TENSORS * hidden
    return rows * settings.side**2 * (BLOCK_TENSORS * settings.hidden_size + inner) * value_bytes


def package_bytes(settings: NetworkSettings) -> int:
    """Return the bytes of the package that a network needs beside torch."""
    return DIFFUSERS_BYTES if hasattr(settings, "working_values") else 0


def step_bytes(settings: NetworkSettings, rows: int, value_bytes: int) -> int:
    """Return the bytes of the tensors that a step makes of `rows` latents: those of one block.

    A U-Net's largest block counts, and what waits for the way up.
    """
    if hasattr(settings, "working_values"):
        return rows * settings.working_values * value_bytes
    return block_bytes(settings, rows, value_bytes)


def decode_bytes(settings: AutoencoderSettings, images: int, side: int, value_bytes: int = FLOAT32) -> int:
    """Return the bytes of the maps that the decoder's largest residual block makes for images of `side` pixels."""
    maps = [settings.level_channels(0) * side**2]
    # an upsampling level passes its channels to the next larger resolution
    maps += [settings.level_channels(level) * (side >> level - 1) ** 2 for level in range(1, len(settings.ch_mult))]
    return images * max(maps) * DECODER_BYTES[value_bytes]


def parameters_of(config: Config) -> tuple[int, int]:
    """Return the numbers of parameters of a configuration's network and tokenizer, without reading weights."""
    from LightningDiT.checkpoint import without_values
    from LightningDiT.loading import make_model, model_settings
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    with without_values():
        modules = (
            make_model(model_settings(config)),
            AutoencoderKL(autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))),
        )
    transformer, tokenizer = (sum(value.numel() for value in module.parameters()) for module in modules)
    return transformer, tokenizer


def working_need(
    settings: NetworkSettings, decoder: AutoencoderSettings, side: int, on_gpu: bool, value_bytes: int
) -> Need:
    """Return what sampling with guidance takes beyond what is there once the weights are.

    Args:
        side: of the images, in pixels.
        on_gpu: in the GPU's memory; else in the machine's.
        value_bytes: FLOAT32 or HALF, of the transformer's precision.
    """
    from LightningDiT.tokenizer.vavae import images_at_once

    step = step_bytes(settings, ROWS_PER_IMAGE, MIXED if value_bytes == HALF else FLOAT32)
    return Need(
        framework=0,
        weights=0,
        loading=0,
        step=int(GPU_STEPS * step) if on_gpu else step,
        decode=decode_bytes(decoder, 1, side, value_bytes if on_gpu else FLOAT32),
        chunk=images_at_once(side**2, on_gpu),
    )


def sampling_need(config: Config, on_gpu: bool, value_bytes: int) -> Need:
    """Return the need of sampling with guidance by a configuration; see `working_need`."""
    from LightningDiT.checkpoint import PORTION_BYTES
    from LightningDiT.loading import model_settings
    from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    transformer, tokenizer = parameters_of(config)
    networks = 2 if config.sample.guide_ckpt else 1
    settings = model_settings(config)
    decoder = autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))
    return replace(
        working_need(settings, decoder, config.data.image_size, on_gpu, value_bytes),
        framework=GPU_CONTEXT_BYTES if on_gpu else FRAMEWORK_BYTES + package_bytes(settings),
        weights=networks * transformer * value_bytes + tokenizer * FLOAT32,
        loading=0 if on_gpu else PORTION_BYTES,
    )
