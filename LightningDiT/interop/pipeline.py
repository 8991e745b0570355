"""Our transformer and solver as a pipeline of diffusers. Its images are those of `LightningDiTPipeline`, bit for bit.

A folder that `python -m LightningDiT.tools.convert_pipeline` wrote loads by `DiffusionPipeline.from_pretrained(folder,
trust_remote_code=True)`; see docs/diffusers.md.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from LightningDiT.checkpoint import load_into, without_values
from LightningDiT.config import Config, load_config
from LightningDiT.errors import LightningDiTError
from LightningDiT.formats import diffusers_vae
from LightningDiT.hub.repository import CONFIG_NAME
from LightningDiT.interop.pipeline_folder import network_class, write_code, write_solver
from LightningDiT.loading import build_transport, load_stats
from LightningDiT.models.lightningdit import LightningDiT, LightningDiTSettings
from LightningDiT.models.unet import UNet, UNetSettings
from LightningDiT.sampling.conditions import Conditions
from LightningDiT.sampling.null_row import null_failure
from LightningDiT.sampling.pipeline import LightningDiTPipeline
from LightningDiT.tokenizer.autoencoder import AutoencoderKL
from LightningDiT.tokenizer.config import load_tokenizer_config, tokenizer_config_path
from LightningDiT.tokenizer.vavae import LAYOUT, VA_VAE, autoencoder_settings
from LightningDiT.transport import StepCallback

try:
    import diffusers
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
except ModuleNotFoundError as missing:
    raise LightningDiTError(
        "a pipeline of diffusers needs diffusers, which is not installed", "pip install diffusers"
    ) from missing


class _Model(ModelMixin):
    def to(self, *args: Any, **options: Any) -> Any:
        """Move or convert as torch does; diffusers warns of a conversion even where there is none."""
        if options.get("dtype") in (None, self.dtype):
            options.pop("dtype", None)
        return super().to(*args, **options)


def _with_fields(settings: type) -> Callable[[type], type]:
    """Return a decorator that gives a class the constructor of a settings dataclass, by whose names diffusers calls."""

    def decorated(cls: type) -> type:
        signature = inspect.signature(settings)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)

        def __init__(self: Any, **values: Any) -> None:  # noqa: N807 - it is one
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            cls.network.__init__(self, settings(**{**values, **lists}))
            self._gradient_checkpointing_func = None
            self.register_to_config(**dataclasses.asdict(self.settings))

        __init__.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        cls.__init__ = __init__
        return cls

    return decorated


@_with_fields(LightningDiTSettings)
class LightningDiTTransformer(_Model, LightningDiT, ConfigMixin):
    """`LightningDiT` as a model of diffusers."""

    network = LightningDiT


@_with_fields(UNetSettings)
class LightningDiTUNet(_Model, UNet, ConfigMixin):
    """`UNet` as a model of diffusers."""

    network = UNet


class LightningDiTSolver(SchedulerMixin):
    """How images are sampled: the settings in config.yaml, and the calibrated solvers beside it.

    It is no scheduler whose `step` another pipeline could call: the solvers here use several evaluations.

    Attributes:
        config: the settings, whose paths name the other parts of the folder.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str = "", **_: Any) -> LightningDiTSolver:
        """Return the solver in a folder of a pipeline."""
        return cls(load_config(Path(pretrained_model_name_or_path) / subfolder / CONFIG_NAME))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the settings; the weights of the other parts are beside `save_directory` already."""
        write_solver(self.config, Path(save_directory))


class LightningDiTDiffusionPipeline(DiffusionPipeline):
    """Class labels in, images out.

    Args:
        transformer, guide: networks; a guide is that of autoguidance.
        vae: the tokenizer, which also decodes by itself.
        solver: the settings of sampling.
    """

    _optional_components: ClassVar = ["guide"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: diffusers.AutoencoderKL,
        solver: LightningDiTSolver,
        guide: ModelMixin = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, solver=solver, guide=guide)
        self._built: tuple[tuple[Any, ...], LightningDiTPipeline] | None = None

    @property
    def lightningdit(self) -> LightningDiTPipeline:
        """The pipeline of this project with these networks, where they are and in their precision.

        The weights of the VAE are float32; on a GPU it decodes in fp16 beside weights in half precision.
        """
        parts = (self.transformer, self.guide, self.vae, self.solver)
        key = (*map(id, parts), self.transformer.device, self.transformer.dtype, self.vae.device)
        if self._built is None or self._built[0] != key:
            self._built = key, self._build()
        return self._built[1]

    def _build(self) -> LightningDiTPipeline:
        config, device = self.solver.config, self.transformer.device
        known = load_tokenizer_config(tokenizer_config_path(config))
        model, stats = _our_autoencoder(self.vae, autoencoder_settings(known)), load_stats(config)
        tokenizer = VA_VAE(known, config.data.image_size, stats=stats, device=device, model=model)
        transport, dtype = build_transport(config), self.transformer.dtype
        pipe = LightningDiTPipeline(self.transformer, tokenizer, transport, config, device, dtype, self.guide)
        pipe.null_failure = null_failure(config, self.transformer.state_dict())
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        batch_size: int | None = None,
        callback: StepCallback | None = None,
        conditions: Conditions = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Return one image per class label; the arguments are those of `LightningDiTPipeline.__call__`.

        Args:
            return_dict: False: a tuple of the images alone.

        Raises:
            LightningDiTError: a label or a setting is wrong.
        """
        given = (guidance_scale, num_inference_steps, seed, indices, latents, output_type, batch_size)
        images = self.lightningdit(class_labels, *given, callback, conditions).images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the folder again, its code too; see `DiffusionPipeline.save_pretrained` for the options."""
        super().save_pretrained(save_directory, **options)
        write_code(Path(save_directory), network_class(self.transformer), self.guide is not None)


#: diffusers compares parts with the types of this constructor, and does not read them as texts.
LightningDiTDiffusionPipeline.__init__.__annotations__ = get_type_hints(LightningDiTDiffusionPipeline.__init__)


def _our_autoencoder(vae: diffusers.AutoencoderKL, settings: Any) -> AutoencoderKL:
    """Return the tokenizer's network with the weights of diffusers' one in memory, in float32."""
    filled = (settings.embed_dim, settings.z_channels)
    tensors = diffusers_vae.ours(vae.state_dict(), filled if filled[0] != filled[1] else None)
    with without_values():
        model = AutoencoderKL(settings)
    load_into(model, {name: value.float() for name, value in tensors.items()}, "the pipeline's vae")
    return model.to(memory_format=LAYOUT).eval()
