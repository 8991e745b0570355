"""How much memory sampling takes, from the shapes of its tensors.

    peak(batch) = framework + weights + loading + max(batch x step, min(batch, chunk) x decode)

framework   memory of a process before any weight is read: the interpreter, torch and its libraries; on a GPU the
            driver's context
weights     transformer: parameters x bytes per value of the chosen precision, twice with a guide of the same shape;
            tokenizer: parameters x 4 (it stays in float32)
loading     converted weights are read from the file in portions, one at a time; allocators keep about as much of the
            freed ones
step        of one image: guidance computes 2 rows; in half precision the inputs of matrix products are half, the
            tokens, norms and sums float32
decode      of one image; the tokenizer decodes at most `chunk` images at once, whatever the batch size

Step and decode are bounded by all tensors that the largest block makes, as if none were freed before the block ends:
allocators (glibc's heap, torch's cache) keep freed blocks of that size. Measured by `python -m studies.measure_memory`;
the table is in docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from LightningDiT.config import Config
    from LightningDiT.models.lightningdit import LightningDiTSettings
    from LightningDiT.tokenizer.autoencoder import AutoencoderSettings

FLOAT32, HALF = 4, 2  # bytes of a value
MIXED = 3  # average bytes of a value of a step in half precision
ROWS_PER_IMAGE = 2  # guidance computes each state with its class and without one
# Tensors of tokens x width that one transformer block makes: norm, modulated, q, k, v, for q and k each the cosine
# product, the turned copy and the rotated result, the attention's output, its joined heads, their projection, the sum
# with x; again norm, modulated, the MLP's output and the sum.
BLOCK_TENSORS = 19
SWIGLU_TENSORS = 4  # of tokens x hidden width: two of w12, silu of the gate, its product with the value
PLAIN_MLP_TENSORS = 2  # fc1 and GELU
RESIDUAL_MAPS = 8  # of a residual block of the decoder: the input, twice norm, SiLU and convolution, the sum
FRAMEWORK_BYTES = 700_000_000  # docs/memory.md, row "framework" (about 600 MB), and libraries of the first computation
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


def decode_bytes(settings: AutoencoderSettings, images: int, side: int) -> int:
    """Return the bytes of the maps that the decoder's largest residual block makes for images of `side` pixels."""
    maps = [settings.level_channels(0) * side**2]
    # an upsampling level passes its channels to the next larger resolution
    maps += [settings.level_channels(level) * (side >> level - 1) ** 2 for level in range(1, len(settings.ch_mult))]
    return images * RESIDUAL_MAPS * max(maps) * FLOAT32


def parameters_of(config: Config) -> tuple[int, int]:
    """Return the numbers of parameters of a configuration's transformer and tokenizer, without reading weights."""
    from LightningDiT.checkpoint import without_values
    from LightningDiT.loading import model_settings
    from LightningDiT.models.lightningdit import LightningDiT
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    with without_values():
        modules = (
            LightningDiT(model_settings(config)),
            AutoencoderKL(autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))),
        )
    transformer, tokenizer = (sum(value.numel() for value in module.parameters()) for module in modules)
    return transformer, tokenizer


def sampling_need(config: Config, on_gpu: bool, value_bytes: int) -> Need:
    """Return the need of sampling with guidance by a configuration.

    Args:
        on_gpu: in the GPU's memory; else in the machine's.
        value_bytes: FLOAT32 or HALF, of the transformer's precision.
    """
    from LightningDiT.checkpoint import PORTION_BYTES
    from LightningDiT.loading import model_settings
    from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.tokenizer.vavae import autoencoder_settings, images_at_once

    transformer, tokenizer = parameters_of(config)
    networks = 2 if config.sample.guide_ckpt else 1
    sizes = autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))
    side = config.data.image_size
    return Need(
        framework=GPU_CONTEXT_BYTES if on_gpu else FRAMEWORK_BYTES,
        weights=networks * transformer * value_bytes + tokenizer * FLOAT32,
        loading=0 if on_gpu else PORTION_BYTES,
        step=block_bytes(model_settings(config), ROWS_PER_IMAGE, MIXED if value_bytes == HALF else FLOAT32),
        decode=decode_bytes(sizes, 1, side),
        chunk=images_at_once(side**2),
    )
