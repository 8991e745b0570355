"""How much memory sampling takes, from the shapes of what is computed.

    peak(batch) = framework + weights + max(loading, batch x per image)

framework   what a process holds before any weight is read: the interpreter, torch and its libraries;
            on a GPU the driver's context.
weights     transformer: parameters x bytes per value of the chosen precision; tokenizer: parameters
            x 4 (it stays in float32).
loading     a file in another precision than the chosen one is mapped while it is converted, so its
            bytes lie beside the converted ones; only on the CPU, since a GPU gets the converted ones.
            The system takes them back where memory is short: they are part of the peak that is
            measured, and not of what must fit (`held`).
per image   the larger of a transformer step and a decode, which follow each other. A step with
            guidance computes 2 rows an image.

What is computed is bounded by every tensor that the largest block makes, as if none were freed before
the block ends: allocators (glibc's heap, torch's cache) keep freed blocks of that size. Measured by
`python -m setup_steps.measure_memory`; the table is in docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from LightningDiT.config import Config
    from LightningDiT.models.lightningdit import LightningDiTSettings
    from LightningDiT.tokenizer.autoencoder import AutoencoderSettings

FLOAT32, HALF = 4, 2
"""Bytes of a value, which is what a precision comes to here."""
ROWS_PER_IMAGE = 2  # guidance computes each state with its class and with none
# Tensors of tokens x width that one transformer block makes: norm, modulated, q, k, v, for q and k
# each the cosine product, the turned copy and the rotated result, the attention's output, its joined
# heads, their projection, the sum with x; again norm, modulated, the MLP's output and the sum.
BLOCK_TENSORS = 19
# Of tokens x hidden width: w12 makes two, silu of the gate one, its product with the value one.
SWIGLU_TENSORS = 4
PLAIN_MLP_TENSORS = 2  # fc1 and GELU
# Maps that one residual block of the decoder makes: its input, and twice norm, SiLU and convolution,
# then the sum.
RESIDUAL_MAPS = 8
# docs/memory.md, row "framework" (745 MB), with what the first computation loads on top.
FRAMEWORK_BYTES = 850_000_000
# An allowance, not a measurement: what driver, cuBLAS and cuDNN take on a GPU beside torch's tensors.
GPU_CONTEXT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Need:
    """Bytes that sampling takes, by what takes them; see the module's formula."""

    framework: int
    weights: int
    loading: int
    per_image: int

    def peak(self, batch: int) -> int:
        """Resident bytes at the worst moment of sampling `batch` images at a time."""
        return self.framework + self.weights + max(self.loading, batch * self.per_image)

    def held(self, batch: int) -> int:
        """Bytes that sampling `batch` images at a time needs throughout: the peak without what is
        mapped for loading alone.
        """
        return self.framework + self.weights + batch * self.per_image

    def largest_batch(self, memory: float, at_most: int) -> int:
        """The largest batch that `memory` (bytes) holds, from 1 to `at_most`; 1 where none is."""
        room = memory - self.framework - self.weights
        return max(1, min(at_most, int(room // self.per_image)))


def block_bytes(settings: LightningDiTSettings, rows: int, value_bytes: int) -> int:
    """Bytes of the tensors that one transformer block makes of `rows` latents."""
    hidden = int(settings.hidden_size * settings.mlp_ratio)
    inner = SWIGLU_TENSORS * int(2 / 3 * hidden) if settings.use_swiglu else PLAIN_MLP_TENSORS * hidden
    return rows * settings.side**2 * (BLOCK_TENSORS * settings.hidden_size + inner) * value_bytes


def decode_bytes(settings: AutoencoderSettings, images: int, side: int) -> int:
    """Bytes of the maps that the decoder's largest residual block makes for images of `side` pixels."""
    maps = [settings.level_channels(0) * side**2]
    # An upsampling level hands its channels to the next larger resolution.
    maps += [settings.level_channels(level) * (side >> level - 1) ** 2 for level in range(1, len(settings.ch_mult))]
    return images * RESIDUAL_MAPS * max(maps) * FLOAT32


def parameters_of(config: Config) -> tuple[int, int]:
    """Numbers of parameters of a configuration's transformer and tokenizer; no weight is read."""
    import torch

    from LightningDiT.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.models.lightningdit import LightningDiT
    from LightningDiT.pipeline import model_settings
    from LightningDiT.tokenizer.autoencoder import AutoencoderKL
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    with torch.device("meta"):
        modules = (
            LightningDiT(model_settings(config)),
            AutoencoderKL(autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))),
        )
    transformer, tokenizer = (sum(value.numel() for value in module.parameters()) for module in modules)
    return transformer, tokenizer


def sampling_need(config: Config, on_gpu: bool, value_bytes: int, file_bytes: int) -> Need:
    """What sampling with guidance by a configuration takes.

    Args:
        on_gpu: in the device's memory; else in the machine's.
        value_bytes: FLOAT32 or HALF, of the precision that the transformer computes in.
        file_bytes: size of the transformer's weights file. A file with less than 3 bytes for each
            parameter holds half precision; a published one holds more than the weights that are read.
    """
    from LightningDiT.config import load_tokenizer_config, tokenizer_config_path
    from LightningDiT.pipeline import model_settings
    from LightningDiT.tokenizer.vavae import autoencoder_settings

    transformer, tokenizer = parameters_of(config)
    sizes = autoencoder_settings(load_tokenizer_config(tokenizer_config_path(config)))
    stored = HALF if file_bytes < 3 * transformer else FLOAT32
    # The size does not tell bf16 from fp16, so a file in half precision counts as the other one.
    as_stored = on_gpu or stored == value_bytes == FLOAT32
    step = block_bytes(model_settings(config), ROWS_PER_IMAGE, value_bytes)
    return Need(
        framework=GPU_CONTEXT_BYTES if on_gpu else FRAMEWORK_BYTES,
        weights=transformer * value_bytes + tokenizer * FLOAT32,
        loading=0 if as_stored else transformer * stored,
        per_image=max(step, decode_bytes(sizes, 1, config.data.image_size)),
    )
