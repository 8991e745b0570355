"""Loader, sampler and decoder as nodes. ComfyUI itself is used for its progress bar and its stop button alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT import LightningDiTPipeline, bundled_model
from LightningDiT.sampling.views import views

CATEGORY = "LightningDiT"
PIPELINE = "LIGHTNINGDIT"  # type of the link between loader and the other nodes
MOST_SEED, MOST_IMAGES, MOST_STEPS = 2**63 - 1, 256, 1000


def load_pipeline(model: str) -> LightningDiTPipeline:
    """Return the pipeline of a configuration (YAML), a folder, or a repository on the hub; "" is the bundled model."""
    model = model.strip() or str(bundled_model())
    if model.endswith((".yaml", ".yml")):
        return LightningDiTPipeline.from_config(Path(model).expanduser())
    return LightningDiTPipeline.from_pretrained(model)


def classes_of(text: str, count: int) -> list[str]:
    """Return a class for each of `count` images: a line each of `text`, in turn, numbers or names."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("classes is empty; a number or a name is expected, one a line")
    return [lines[index % len(lines)] for index in range(count)]


def images_of(pipe: LightningDiTPipeline, latents: Tensor) -> Tensor:
    """Return RGB values (N, H, W, 3) in [0, 1] for normalised latents (N, C, h, w); levels are in their colour map.

    They are whole 255ths, so that ComfyUI saves the pixels that this project saves.
    """
    with torch.inference_mode():
        decoded = pipe.tokenizer.decode(latents.to(pipe.device))  # (N, C, H, W)
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in views(decoded)])).float() / 255


def watcher(evaluations: int) -> Callable[[int, float, Tensor], None] | None:
    """Return a callback that moves ComfyUI's progress bar and heeds its stop button; None outside of ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar = ProgressBar(evaluations)

    def watch(step: int, _: float, __: Tensor) -> None:
        throw_exception_if_processing_interrupted()
        bar.update_absolute(step + 1, evaluations)

    return watch


class LightningDiTLoader:
    """The networks of a model."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (PIPELINE,), ("lightningdit",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs by name."""
        tip = "configuration (YAML), folder, or owner/name on the hub; empty: the bundled model"
        return {"required": {"model": ("STRING", {"default": "", "tooltip": tip})}}

    def load(self, model: str) -> tuple[LightningDiTPipeline]:
        """Return the pipeline."""
        return (load_pipeline(model),)


class LightningDiTSampler:
    """Latents of images of classes: image k starts from the noise of (seed, k), as everywhere in this project."""

    CATEGORY, FUNCTION = CATEGORY, "sample"
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latents",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs by name; a guidance below 0 and 0 steps are those of the configuration."""
        own = {"tooltip": "as the model's configuration says"}
        return {
            "required": {
                "lightningdit": (PIPELINE,),
                "classes": ("STRING", {"default": "0", "multiline": True, "tooltip": "numbers or names, one a line"}),
                "count": ("INT", {"default": 1, "min": 1, "max": MOST_IMAGES}),
                "seed": ("INT", {"default": 0, "min": 0, "max": MOST_SEED}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1, **own}),
                "steps": ("INT", {"default": 0, "min": 0, "max": MOST_STEPS, **own}),
            },
            "optional": {"conditions": ("STRING", {"default": "", "tooltip": "of a model with a second label"})},
        }

    def sample(
        self,
        lightningdit: LightningDiTPipeline,
        classes: str,
        count: int,
        seed: int,
        guidance: float,
        steps: int,
        conditions: str = "",
    ) -> tuple[dict[str, Tensor]]:
        """Return ComfyUI's dictionary of latents, normalised (N, C, h, w).

        Raises:
            LightningDiTError: a class, condition or setting is wrong.
        """
        points = steps + 1 if steps else None  # of the time grid
        out = lightningdit(
            classes_of(classes, count),
            guidance_scale=None if guidance < 0 else guidance,
            num_inference_steps=points,
            seed=seed,
            output_type="latent",
            callback=watcher(steps or lightningdit.solver(lightningdit.config.sample).steps),
            conditions=classes_of(conditions, count) if conditions.strip() else None,
        )
        return ({"samples": out.images},)


class LightningDiTDecode:
    """Images of latents."""

    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Return the inputs by name."""
        return {"required": {"lightningdit": (PIPELINE,), "latents": ("LATENT",)}}

    def decode(self, lightningdit: LightningDiTPipeline, latents: dict[str, Tensor]) -> tuple[Tensor]:
        """Return the images (N, H, W, 3) in [0, 1].

        Raises:
            ValueError: the latents are those of another model.
        """
        samples, shape = latents["samples"], lightningdit.latent_shape
        if tuple(samples.shape[1:]) != shape:
            raise ValueError(f"latents have the shape {list(samples.shape[1:])}; {list(shape)} is expected")
        return (images_of(lightningdit, samples),)


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (LightningDiTLoader, LightningDiTSampler, LightningDiTDecode)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LightningDiTLoader": "Load LightningDiT",
    "LightningDiTSampler": "LightningDiT Sampler",
    "LightningDiTDecode": "LightningDiT Decode",
}
